"""The head of a causal LM fused with its loss: lazy logits that carry the per-example losses.

A causal LM of transformers calls its head, then ``self.loss_function(logits, labels)``. In a forward with labels, the
head's forward computes the losses in chunks and returns :class:`LazyLogits` instead of the logits; the loss function
reads the losses from them. If a model transforms its logits in between (a soft cap, a scale), they are computed right
then, and from then on the head runs unchanged: nothing is assumed about modelling code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map_only

from dpft.clipping.state import ClipState
from dpft.errors import ClippingError
from dpft.kernels.head import auto_chunk, chunked_head_loss
from dpft.rules.base import attribute
from dpft.rules.head import HeadLossSite

IGNORE_INDEX = -100
# Names in a configuration for a scale or cap of the logits before the loss. Others are noticed when they happen.
_SCALES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
# What can be read from logits that are not computed.
_METADATA = frozenset(
    {
        Tensor.size,
        Tensor.dim,
        Tensor.ndimension,
        Tensor.numel,
        Tensor.nelement,
        Tensor.__len__,
        Tensor.register_hook,
        torch.numel,
        *(
            getattr(Tensor, name).__get__
            for name in ("shape", "device", "ndim", "requires_grad", "grad_fn", "is_leaf", "layout", "_base")
        ),
    }
)


@dataclass
class _Made:
    """Results of one forward of the head, shared by all lazy logits that come from it.

    Attributes:
        losses: ``[B]``, without their graph; None once they were read.
        labels: of the losses.
        labels_version: the labels' version counter at that time.
        weight: the head's.
        weight_version: its version counter at that time.
    """

    losses: Tensor | None
    labels: Tensor
    labels_version: int
    weight: Tensor
    weight_version: int


class LazyLogits(Tensor):
    """Logits that are computed when an operation uses them; shape, dtype and device are known before.

    In the graph they are between the head's node and the losses read from them, so that an engine's hooks on the
    output of a module (with which FSDP2 and DeepSpeed gather before its backward) work as usual.

    Attributes:
        made: results of the same forward of the head; None for concatenated logits.
    """

    made: _Made | None
    _dtype: torch.dtype
    _inside: torch.dtype
    _make: Callable[[], Tensor]
    _real: Tensor | None

    @staticmethod
    def __new__(
        cls,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        make: Callable[[], Tensor],
        made: _Made | None = None,
        inside: torch.dtype | None = None,
    ) -> LazyLogits:
        # In the dtype of the losses, whose gradient passes through; .dtype returns that of the logits.
        inside = inside or torch.promote_types(dtype, torch.float32)
        logits: LazyLogits = Tensor._make_wrapper_subclass(
            cls, shape, dtype=inside, device=device, requires_grad=False
        )
        logits._dtype, logits._inside, logits._make, logits.made, logits._real = dtype, inside, make, made, None
        return logits

    def materialise(self) -> Tensor:
        """The logits, computed at the first call."""
        if self._real is None:
            with torch.set_grad_enabled(self.requires_grad):
                self._real = self._make().to(self._dtype)
        return self._real

    def converted(self, dtype: torch.dtype | None = None) -> LazyLogits:
        """The same in another dtype, or, without one, detached."""
        make = self.materialise
        return LazyLogits(
            tuple(self.shape),
            dtype or self._dtype,
            self.device,
            make if dtype is not None else lambda: make().detach(),
            self.made,
            self._inside,
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            return super().__torch_function__(func, types, args, kwargs)
        first = args[0] if args and isinstance(args[0], LazyLogits) else None
        if first is not None and func == _DTYPE:
            return first._dtype
        if first is not None and func in (Tensor.is_floating_point, torch.is_floating_point):
            return True
        # Accelerate's mixed precision and engines convert outputs, which may never be read.
        target = torch.float32 if func is Tensor.float else args[1] if func is Tensor.to and len(args) == 2 else None
        if first is not None and isinstance(target, torch.dtype) and not kwargs:
            return first if target == first._dtype else _Converted.apply(first, target)
        if first is not None and func is Tensor.detach:
            return first.converted()
        args, kwargs = tree_map_only(LazyLogits, LazyLogits.materialise, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]  # a class method in torch too
        args, kwargs = tree_map_only(LazyLogits, LazyLogits.materialise, (args, kwargs or {}))
        return func(*args, **kwargs)


_DTYPE = Tensor.dtype.__get__  # type: ignore[attr-defined]  # the getter, by which torch names the attribute


class _StandIn(torch.autograd.Function):
    """Losses ``[B]`` -> lazy logits ``[B, T, V]`` that carry them; the gradient is that of the losses."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, shape: Any, dtype: Any, make: Any, made: _Made) -> Tensor:
        return LazyLogits(shape, dtype, losses.device, make, made)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        if any(stride != 0 and size > 1 for stride, size in zip(g.stride()[1:], g.shape[1:], strict=True)):
            raise ClippingError(
                "something besides the loss was differentiated through the logits (an autograd.Function or a layer "
                "that uses them, a hook on them), which dpft computes lazily. Pass loss_chunk=None."
            )
        return g[:, 0, 0], None, None, None, None


class _Converted(torch.autograd.Function):
    """Lazy logits in another dtype."""

    @staticmethod
    def forward(ctx: Any, logits: LazyLogits, dtype: torch.dtype) -> Tensor:
        return logits.converted(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return g, None


class _Losses(torch.autograd.Function):
    """Lazy logits -> the losses ``[B]`` that they carry."""

    @staticmethod
    def forward(ctx: Any, logits: LazyLogits, losses: Tensor) -> Tensor:
        ctx.shape = tuple(logits.shape)
        return losses.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return g.view(-1, 1, 1).expand(ctx.shape), None


def losses_of(logits: Any, labels: Any) -> Tensor | None:
    """The losses that lazy logits carry, if computed from this labels tensor; can be read once. Else None."""
    if not isinstance(logits, LazyLogits) or logits.made is None or labels is not logits.made.labels:
        return None
    if _version(labels) != logits.made.labels_version:
        return None  # changed in place since
    values, logits.made.losses = logits.made.losses, None
    if values is None:
        return None
    losses: Tensor = _Losses.apply(logits, values)
    return losses


def joined(logits: list[Tensor]) -> Tensor:
    """``[B, ...]``: the logits of B one-example forwards, concatenated and detached; lazy if they are."""
    first = logits[0]
    if len(logits) == 1 or not isinstance(first, LazyLogits):
        return first.detach() if len(logits) == 1 else torch.cat([one.detach() for one in logits])
    shape = (len(logits), *first.shape[1:])
    return LazyLogits(shape, first.dtype, first.device, lambda: torch.cat([one.detach() for one in logits]))


def leaves_logits_alone(config: Any) -> bool:
    """Whether a model's configuration has no scale or cap of the logits before the loss."""
    return all(getattr(config, name, None) in (None, 1, 1.0) for name in _SCALES)


@dataclass
class Head:
    """The head of one wrapped causal LM.

    Attributes:
        state: of the wrapped model.
        keys: name within the head -> full name, of its trainable parameters.
        chunk: tokens per chunk.
        direct: whether, as far as is known, the loss gets the head's logits unchanged.
        labels: of the running forward.
    """

    state: ClipState
    keys: dict[str, str]
    chunk: int | Literal["auto"]
    direct: bool
    labels: Tensor | None = None

    @contextmanager
    def expecting(self, labels: Any) -> Iterator[None]:
        """A context in which the head computes its losses with these labels ``[B, T]``; None: it runs unchanged."""
        previous, self.labels = self.labels, labels if isinstance(labels, Tensor) else None
        try:
            yield
        finally:
            self.labels = previous

    def forward(self, module: nn.Module, plain: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
        """The head's forward: lazy logits with their losses, or the output of ``plain``."""
        labels, w, b = self.labels, attribute(module, "weight"), attribute(module, "bias")
        if not (self.direct and labels is not None and type(h) is Tensor and h.dim() == 3):
            return plain(h)
        if labels.shape != h.shape[:2]:
            return plain(h)
        self.labels = None  # if the head is called again in this forward, it predicts something else
        device = h.device.type
        x = h.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else h
        chunk = auto_chunk(h.device) if self.chunk == "auto" else self.chunk
        targets = shifted(labels.to(h.device))
        shape = (*h.shape[:2], w.shape[0])
        if not torch.is_grad_enabled():
            with torch.autocast(device, enabled=False):
                bias = None if b is None else b.to(x.dtype)
                losses = chunked_head_loss(x, w.to(x.dtype), bias, targets, chunk).losses
            made = _Made(losses, labels, _version(labels), w, _version(w))
            return LazyLogits(shape, x.dtype, h.device, lambda: self._make(made, plain, h), made)
        if "weight" in self.keys:
            self.state.record_use(self.keys["weight"])
        losses = HeadLossSite.apply(x, w, b, self.state.tap, _Site(self, w, targets, chunk))
        made = _Made(losses.detach(), labels, _version(labels), w, _version(w))
        logits: Tensor = _StandIn.apply(losses, shape, x.dtype, lambda: self._make(made, plain, h), made)
        return logits

    def _make(self, made: _Made, plain: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
        before_the_loss = made.losses is not None
        if self.state.engine is not None and self.state.engine.sharded:
            raise ClippingError(
                "the logits were read, but dpft computed the loss without keeping them and the engine has sharded the "
                "head's weight again. Pass loss_chunk=None to dpft.prepare to have all logits computed and kept."
            )
        if before_the_loss:
            # The model transforms its logits before the loss.
            self.direct, made.losses = False, None
            if torch.is_grad_enabled() and "weight" in self.keys:
                self.state.trace.uses[self.keys["weight"]] -= 1
            return plain(h)
        if self.state.batch_size is not None:
            return plain(h)  # the forward is still running: a loss term from these logits is a use like any other
        if self.state.alone and _version(made.weight) != made.weight_version:
            raise ClippingError(
                "the logits were read after the head's weight had changed (optimizer.step?), and dpft computes them "
                "when they are read. Read them earlier, or wrap with loss_chunk=None."
            )
        # This use belongs neither to the forward that computed the loss nor to the next one.
        with self.state.unrecorded():
            return plain(h)


class _Site:
    """The non-tensor arguments of the head's node."""

    __slots__ = ("chunk", "host", "keys", "native", "shape", "targets")

    def __init__(self, head: Head, w: Tensor, targets: Tensor, chunk: int) -> None:
        self.host, self.keys, self.shape, self.targets, self.chunk = head.state, head.keys, w.shape, targets, chunk
        self.native = head.state.strategy == "per_example" or head.state.clipping == "none"


def shifted(labels: Tensor) -> Tensor:
    """Labels ``[B, T]`` shifted left by one: position t predicts token t + 1."""
    return nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]


def _version(labels: Tensor) -> int:
    """The version counter of a tensor; 0 for an inference tensor, which has none."""
    return 0 if labels.is_inference() else labels._version
