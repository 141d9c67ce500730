"""``DPOptimizer``: turns the clipped sum in ``.grad`` into one noised release per logical batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dpft.adamw_bc import AdamWBC, local
from dpft.errors import WrapError
from dpft.noise import GaussianNoise, Place

_GUARD = "_dpft_guard"


class Noise(Protocol):
    """A source of noise: :class:`dpft.GaussianNoise`, or one that is correlated over the releases."""

    def release(self) -> AbstractContextManager[None]:
        """What the noise of one release is added within."""
        ...

    def for_release(self, std: float, sensitivity: float, elements: int) -> float:
        """The std to pass to :meth:`add_`: ``std``, or more where the sum is rounded."""
        ...

    def add_(self, tensor: Tensor, std: float, place: Place | None = None) -> Tensor:
        """Add noise of standard deviation ``std`` (of z, where it is correlated) in place.

        ``place`` is that of a shard's elements; None: the whole of the next parameter.
        """
        ...

    def std_in_release(self, std: float) -> float:
        """Standard deviation of what :meth:`add_` of ``std`` adds to an element in the release that is being made."""
        ...


class Sums(Protocol):
    """Holds the clipped sums instead of ``.grad``: of several processes, or in host memory."""

    parameters: dict[str, nn.Parameter]

    def release(self, noise: Noise, std: float, divisor: float) -> None:
        """``(sum + N(0, std^2)) / divisor`` on all ranks, each element noised once. A collective."""
        ...

    def gradient(self, name: str) -> Tensor:
        """The released gradient of one parameter, in the layout of its ``.grad``."""
        ...

    def discard(self) -> None:
        """Drop the sums."""
        ...


class DPOptimizer(torch.optim.Optimizer):
    """Any torch optimiser, stepping on ``(clipped sum + N(0, (sigma C)^2 I)) / expected_batch_size``.

    ``.grad`` must hold the clipped sum of a logical batch, as :func:`dpft.wrap` leaves it; its physical batches
    accumulate there. bf16 parameters get float32 gradients instead of bf16 ones (``Tensor.grad_dtype``), so that sum,
    noise and division are float32; the inner optimiser then receives the parameter's dtype. A parameter without a
    gradient, and an empty logical batch, still receive noise.

    Args:
        optimizer: the inner optimiser, constructed with the model's parameters.
        noise_multiplier: sigma >= 0; 0 is NOT private.
        max_grad_norm: C > 0, the clip norm that the model was wrapped with.
        expected_batch_size: b > 0, a constant that the user declares; never the size of the drawn batch.
        noise: source of the noise; None creates one seeded by the operating system. One that is correlated over the
            releases keeps its law only if no release is left out.
        secure_rng: see :class:`dpft.noise.GaussianNoise`; only where ``noise`` is None.
        is_last: returns whether the current physical batch ends its logical batch. None: every ``step`` ends one.
        on_release: called before each release, before a parameter changes; an exception prevents the release. The
            ledger records here.
        check: called with the trainable parameters before ``on_release``; raises if they are not the ones that are
            clipped.
        sum_scale: s, if ``.grad`` holds s times the clipped sum (an engine that averages over ranks).
        sums: an engine's clipped sums, used instead of ``.grad``; set by ``dpft.prepare``.

    Raises:
        ValueError: a value out of range, or no parameter.

    Guarantee: with clipped sums of L2 sensitivity C, each ``step`` that ends a logical batch is one Gaussian
    mechanism with noise multiplier sigma (Abadi et al. 2016, arXiv 1607.00133), and adds noise exactly once to every
    element.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_batch_size: float,
        *,
        noise: Noise | None = None,
        secure_rng: bool = False,
        is_last: Callable[[], bool] | None = None,
        on_release: Callable[[], None] | None = None,
        check: Callable[[Iterable[nn.Parameter]], None] | None = None,
        sum_scale: float = 1.0,
        sums: Sums | None = None,
    ) -> None:
        given: Any = optimizer
        if not isinstance(given, torch.optim.Optimizer) or isinstance(given, DPOptimizer):
            raise ValueError(
                f"expected a torch.optim.Optimizer that is not private yet; got a {type(optimizer).__name__}"
            )
        _require("noise_multiplier", noise_multiplier, at_least=0.0)
        for name, value in (
            ("max_grad_norm", max_grad_norm),
            ("expected_batch_size", expected_batch_size),
            ("sum_scale", sum_scale),
        ):
            _require(name, value, above=0.0)
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.inner = optimizer
        self._link()
        self.noise_multiplier = float(noise_multiplier)
        self.max_grad_norm = float(max_grad_norm)
        self.expected_batch_size = float(expected_batch_size)
        self.sum_scale = float(sum_scale)
        self.noise: Noise = GaussianNoise(secure=secure_rng) if noise is None else noise
        self.releases = 0
        self._is_last = is_last
        self._on_release = on_release
        self._check = check
        self.sums = sums
        self._spent = False  # .grad holds a release, not a sum
        self._stepping = False
        previous = optimizer.__dict__.pop(_GUARD, None)
        if previous is not None:  # of a DPOptimizer that this one replaces
            previous.remove()
        optimizer.__dict__[_GUARD] = optimizer.register_step_pre_hook(self._only_through_here)
        self.discard()

    def _only_through_here(self, *_: Any) -> None:
        if not self._stepping:
            raise WrapError(
                "step() of the inner optimiser was called directly: it would release the clipped sum without noise. "
                "Call step() of the optimiser that dpft.prepare returned, or of the DPOptimizer. To continue training "
                "without privacy, call DPOptimizer.detach() first."
            )

    def detach(self) -> torch.optim.Optimizer:
        """Return the inner optimiser, without the guard that refuses direct calls of its ``step``."""
        guard = self.inner.__dict__.pop(_GUARD, None)
        if guard is not None:
            guard.remove()
        return self.inner

    def _link(self) -> None:
        self.param_groups = self.inner.param_groups
        self.state = self.inner.state

    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters of all groups, in order."""
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # no closure, no loss
        """End a physical batch; at the end of its logical batch, release and step the inner optimiser.

        Raises:
            ValueError: a closure, which would evaluate the gradient more than once.
            WrapError: ``zero_grad`` was not called after the last release, or the parameters changed.
        """
        if closure is not None:
            raise ValueError("DPOptimizer.step takes no closure: a release uses one gradient, computed once")
        if self.sums is not None and self._is_rehearsal():
            self._rehearse()
            return
        if self._is_last is not None and not self._is_last():
            return
        if self._spent:
            raise WrapError(
                "step() was called again without zero_grad() after the last release: .grad holds that release "
                "plus new gradients. Call optimizer.zero_grad() after every optimizer.step()."
            )
        self._before_release()
        with self.noise.release():
            self._fill_gradients()
        self._step_inner()
        self.releases += 1
        self._spent = True

    def _fill_gradients(self) -> None:
        """Give each parameter of the inner optimiser its release."""
        std = self.noise_std(self.parameters() if self.sums is None else self.sums.parameters.values())
        if isinstance(self.inner, AdamWBC):
            self.inner.noise_variance = (self.noise.std_in_release(std) / self.expected_batch_size) ** 2
        if self.sums is not None:
            self.sums.release(self.noise, std, self.expected_batch_size)
            names = {id(p): name for name, p in self.sums.parameters.items()}
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad and self.sums is not None:
                    p.grad = self.sums.gradient(names[id(p)]).to(p.dtype)
                elif p.requires_grad:
                    self._release(p, std * self.sum_scale)
                else:
                    p.grad = None  # frozen since then: the inner optimiser would apply its gradient without noise

    def _step_inner(self) -> None:
        self._stepping = True
        try:
            self.inner.step()
        finally:
            self._stepping = False

    def _is_rehearsal(self) -> bool:
        """Whether torch makes this step only to create the optimiser's state before it loads a checkpoint.

        ``torch.distributed.checkpoint.state_dict`` steps an optimiser that has no state on zero gradients with a
        learning rate of zero, and then loads only the entries that exist: without this step the moments would be lost
        silently. In training, ``.grad`` is None whenever ``step`` is called, because the sums are kept elsewhere.
        """
        parameters = self.parameters()
        return (
            not self.state
            and not self._spent
            and all("lr" in group and float(group["lr"]) == 0 for group in self.param_groups)
            and all(p.grad is not None and not bool(local(p.grad).any()) for p in parameters)
        )

    @torch.no_grad()
    def _rehearse(self) -> None:
        if isinstance(self.inner, AdamWBC):
            self.inner.noise_variance = 0.0
        try:
            self._step_inner()
        finally:
            for p in self.parameters():
                p.grad = None

    def _before_release(self) -> None:
        """All checks that can prevent a release, then its line in the ledger."""
        parameters = self.parameters()
        if self._check is not None:
            self._check(parameters)
        for p in parameters:
            if p.grad is None:
                continue
            if self.sums is not None:
                raise WrapError(f"a parameter of shape {list(p.shape)} has a gradient that is not the clipped sum.")
            if p.grad.dtype not in (torch.float32, torch.float64):
                raise WrapError(
                    f"a gradient of shape {list(p.shape)} is {p.grad.dtype}; expected float32, in which sums "
                    "and noise are exact. Create the DPOptimizer before the first backward, and do not replace .grad."
                )
        if self._on_release is not None:
            self._on_release()

    def noise_std(self, parameters: Iterable[nn.Parameter]) -> float:
        """Standard deviation of the noise on the clipped sum of ``parameters``, all that are released together."""
        # Of all ranks: a DTensor counts whole, and what ZeRO-3 has partitioned is empty here.
        elements = sum(int(getattr(p, "ds_numel", 0) or p.numel()) for p in parameters)
        return self.noise.for_release(self.noise_multiplier * self.max_grad_norm, self.max_grad_norm, elements)

    @torch.no_grad()
    def _release(self, p: nn.Parameter, std: float) -> None:
        total: Tensor | None = p.grad
        if total is None:
            dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
            total = torch.zeros(p.shape, dtype=dtype, device=p.device)
        self.noise.add_(total, std)
        total.div_(self.expected_batch_size * self.sum_scale)
        p.grad = None
        if p.dtype != total.dtype:
            p.grad_dtype = p.dtype
        p.grad = total.to(p.dtype)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients at the end of a logical batch.

        If a loader tells where a logical batch ends (``is_last``), this does nothing before the release, because
        ``.grad`` is still accumulating. :meth:`discard` drops it in any case.
        """
        if self._is_last is None or self._spent:
            self.discard()

    def discard(self) -> None:
        """Drop the gradients, also of a logical batch that will not be finished, of which nothing was released."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        for p in parameters:
            p.grad = None
        self._spent = False
        if self.sums is None:
            _accumulate_in_float32(parameters)
        else:
            self.sums.discard()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As the inner optimiser's; the new parameters must be among those that the model was wrapped with."""
        inner = self.__dict__.get("inner")
        if inner is None:  # called by torch.optim.Optimizer.__init__
            super().add_param_group(param_group)
            return
        if self.sums is not None:
            raise WrapError("parameters were added after dpft.prepare; an engine has no clipped sums for them.")
        inner.add_param_group(param_group)
        self._link()
        new = self.param_groups[-1]["params"]
        for p in new:
            p.grad = None
        _accumulate_in_float32(new)

    def state_dict(self) -> dict[str, Any]:
        """The inner optimiser's; it contains no noise, no generator state and no secret."""
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the inner optimiser's."""
        self.inner.load_state_dict(state_dict)
        self._link()

    def __repr__(self) -> str:
        private = "" if self.noise_multiplier > 0 else ", NOT PRIVATE"
        return (
            f"DPOptimizer(noise_multiplier={self.noise_multiplier}, max_grad_norm={self.max_grad_norm}, "
            f"expected_batch_size={self.expected_batch_size}{private}, inner={self.inner!r})"
        )


def _accumulate_in_float32(parameters: Iterable[nn.Parameter]) -> None:
    for p in parameters:
        if p.dtype in (torch.bfloat16, torch.float16):
            p.grad_dtype = torch.float32


def _require(name: str, value: float, at_least: float | None = None, above: float | None = None) -> None:
    number: Any = value  # what the caller passed, whatever the annotation says
    if isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number):
        if at_least is not None and number >= at_least:
            return
        if above is not None and number > above:
            return
    bound = f">= {at_least}" if at_least is not None else f"> {above}"
    raise ValueError(f"{name} is {value!r}; expected a finite number {bound}")
