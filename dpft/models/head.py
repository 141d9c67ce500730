"""The head of a causal LM with its loss in one node: what stands for the logits, and where the labels come from.

A causal LM of transformers calls its head, then ``self.loss_function(logits, labels)``. While a forward with labels
runs, the head's forward computes the losses in chunks and returns :class:`LazyLogits` in the place of the logits; the
loss function finds the losses there. A model that does something to its logits in between (a soft cap, a scale) gets
real ones the moment it does, and from then on the head is left as it was: nothing is assumed of modelling code.
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
# A configuration's name for what a model does to its logits before the loss. Others are noticed when it happens.
_SCALES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
# What can be asked of logits that are not there.
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
    """What one forward of the head made, shared by all that stands for its logits.

    Attributes:
        losses: ``[B]``, without their graph; None once they were taken.
        labels: what they were computed with.
        labels_version: how often the labels had been changed in place.
        weight: the head's.
        weight_version: the same of it.
    """

    losses: Tensor | None
    labels: Tensor
    labels_version: int
    weight: Tensor
    weight_version: int


class LazyLogits(Tensor):
    """Logits that are computed when something is done with them; shape, dtype and device are known.

    They are in the graph between the head's node and the losses that are taken of them, so that what an engine hangs
    on the output of a module (FSDP2's and DeepSpeed's gathering before its backward) finds its place.

    Attributes:
        made: what the head made together with them; None of logits that were joined.
    """

    made: _Made | None
    _dtype: torch.dtype
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
    ) -> LazyLogits:
        # In the dtype of the losses whose gradient passes through; what is said of it is that of the logits.
        inside = torch.promote_types(dtype, torch.float32)
        logits: LazyLogits = Tensor._make_wrapper_subclass(
            cls, shape, dtype=inside, device=device, requires_grad=False
        )
        logits._dtype, logits._make, logits.made, logits._real = dtype, make, made, None
        return logits

    def materialise(self) -> Tensor:
        """The logits themselves, computed now."""
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
        # Accelerate's mixed precision and engines convert outputs that nobody may ever look at.
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
    """Losses ``[B]`` -> lazy logits ``[B, T, V]`` in their place; the gradient is that of the losses."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, shape: Any, dtype: Any, make: Any, made: _Made) -> Tensor:
        return LazyLogits(shape, dtype, losses.device, make, made)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        if any(stride != 0 and size > 1 for stride, size in zip(g.stride()[1:], g.shape[1:], strict=True)):
            raise ClippingError(
                "something besides the loss was differentiated through the logits (an autograd.Function or a layer "
                "that takes them, a hook on them), which dpft computes lazily. Pass loss_chunk=None."
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
    """Lazy logits -> the losses ``[B]`` that they stand for."""

    @staticmethod
    def forward(ctx: Any, logits: LazyLogits, losses: Tensor) -> Tensor:
        ctx.shape = tuple(logits.shape)
        return losses.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return g.view(-1, 1, 1).expand(ctx.shape), None


def losses_of(logits: Any, labels: Any) -> Tensor | None:
    """The losses that came with lazy logits, if they are of these very labels; taken once. Else None."""
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
    """``[B, ...]`` from B outputs of one example each, without a gradient; lazy where they are."""
    first = logits[0]
    if len(logits) == 1 or not isinstance(first, LazyLogits):
        return first.detach() if len(logits) == 1 else torch.cat([one.detach() for one in logits])
    shape = (len(logits), *first.shape[1:])
    return LazyLogits(shape, first.dtype, first.device, lambda: torch.cat([one.detach() for one in logits]))


def leaves_logits_alone(config: Any) -> bool:
    """Whether nothing in a model's configuration says that its logits are scaled or capped before the loss."""
    return all(getattr(config, name, None) in (None, 1, 1.0) for name in _SCALES)


@dataclass
class Head:
    """The head of one wrapped causal LM.

    Attributes:
        state: of the wrapped model.
        keys: own name -> full name of the head's trainable parameters.
        chunk: tokens at a time.
        direct: whether its logits go to the loss as they are, as far as is known.
        labels: of the forward that is running.
    """

    state: ClipState
    keys: dict[str, str]
    chunk: int | Literal["auto"]
    direct: bool
    labels: Tensor | None = None

    @contextmanager
    def expecting(self, labels: Any) -> Iterator[None]:
        """While it lasts, the head computes its losses with these labels ``[B, T]``; None leaves it as it is."""
        previous, self.labels = self.labels, labels if isinstance(labels, Tensor) else None
        try:
            yield
        finally:
            self.labels = previous

    def forward(self, module: nn.Module, plain: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
        """The head's forward: lazy logits with their losses, or what ``plain`` returns."""
        labels, w, b = self.labels, attribute(module, "weight"), attribute(module, "bias")
        if not (self.direct and labels is not None and type(h) is Tensor and h.dim() == 3):
            return plain(h)
        if labels.shape != h.shape[:2]:
            return plain(h)
        self.labels = None  # a head that is called again in this forward predicts something else
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
                "the logits were wanted, and the engine has put the head's weight away: dpft computed the loss "
                "without keeping them. Pass loss_chunk=None to dpft.prepare to have all logits computed and kept."
            )
        if before_the_loss:
            # The model makes something else of its logits, and the loss of that.
            self.direct, made.losses = False, None
            if torch.is_grad_enabled() and "weight" in self.keys:
                self.state.trace.uses[self.keys["weight"]] -= 1
            return plain(h)
        if self.state.batch_size is not None:
            return plain(h)  # the forward is still running: what it adds to its loss is a use like any other
        if self.state.engine is None and _version(made.weight) != made.weight_version:
            raise ClippingError(
                "the logits were read after the head's weight had changed (optimizer.step?), and dpft computes them "
                "when they are read. Read them before, or wrap with loss_chunk=None."
            )
        # This use is none of the forward that made the loss, nor of the next one.
        with self.state.unrecorded():
            return plain(h)


class _Site:
    """What the node needs to know besides tensors."""

    __slots__ = ("chunk", "host", "keys", "native", "shape", "targets")

    def __init__(self, head: Head, w: Tensor, targets: Tensor, chunk: int) -> None:
        self.host, self.keys, self.shape, self.targets, self.chunk = head.state, head.keys, w.shape, targets, chunk
        self.native = head.state.strategy == "per_example"


def shifted(labels: Tensor) -> Tensor:
    """Labels ``[B, T]`` moved one to the left: position t predicts token t + 1."""
    return nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]


def _version(labels: Tensor) -> int:
    """How often a tensor was changed in place; of one made in inference mode it is not known."""
    return 0 if labels.is_inference() else labels._version
