"""The oracle: float64, one example at a time, obviously right and slow. It never imports dpft.

Every example is run alone (B = 1, its row of the batch with its own padding), through a float64 copy of the unwrapped
model, with its own loss; its gradient is taken with plain autograd over all trainable parameters, a tied one once.
Everything else (norms, clip factors, clipped sums) follows from these gradients by the definition.

Hugging Face code casts to float32 in many places (``logits.float()``, RMSNorm, the eager softmax), which would make a
float64 model no more exact than a float32 one: :class:`Float64` turns every such cast into one to float64.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Batch = Mapping[str, Tensor]
"""Tensors whose first dimension is the example; `labels` is one of them."""
LossesOf = Callable[[nn.Module, Batch], Tensor]
"""(model, batch) -> per-example losses [B]; called with B = 1 by the oracle."""
Grads = dict[str, Tensor]


class Float64(TorchFunctionMode):
    """Inside, every request for float32 gives float64, and so does the default dtype."""

    def __enter__(self) -> Float64:
        self._default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        torch.set_default_dtype(self._default)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        widen = {torch.float32: torch.float64, torch.bfloat16: torch.float64}
        args = [widen.get(a, a) if isinstance(a, torch.dtype) else a for a in args]
        kwargs = {k: widen.get(v, v) if isinstance(v, torch.dtype) else v for k, v in (kwargs or {}).items()}
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*args, **kwargs)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name, a tied one once (under its first name)."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def row(batch: Batch, i: int) -> dict[str, Tensor]:
    """Example i alone, with B = 1."""
    return {k: v[i : i + 1] for k, v in batch.items()}


def rows(batch: Batch, which: Iterable[int]) -> dict[str, Tensor]:
    """The examples of `which`, in that order."""
    index = torch.tensor(list(which), dtype=torch.long)
    return {k: v[index] for k, v in batch.items()}


def size(batch: Batch) -> int:
    """The number of examples B."""
    return len(next(iter(batch.values())))


def causal_lm_losses(model: nn.Module, batch: Batch) -> Tensor:
    """[B] mean over each example's own unmasked shifted tokens; 0 where there are none. Looped, not vectorised."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    logits_BTV = model(**inputs, use_cache=False).logits.float()
    losses = []
    for logits_TV, labels_T in zip(logits_BTV, batch["labels"], strict=True):
        targets = labels_T[1:]
        kept = targets != -100
        if kept.any():
            losses.append(F.cross_entropy(logits_TV[:-1][kept], targets[kept]))
        else:
            losses.append((logits_TV * 0.0).sum())
    return torch.stack(losses)


@dataclass(frozen=True)
class PerExample:
    """Losses [B] and gradients of every example, each with respect to all trainable parameters, in float64."""

    losses: Tensor
    grads: tuple[Grads, ...]

    @property
    def norms(self) -> Tensor:
        """[B] norm over all trainable parameters."""
        return torch.stack([_norm(g) for g in self.grads])

    def factors(self, max_grad_norm: float, clip_function: str = "abadi", clip_gamma: float = 0.01) -> Tensor:
        """[B] clip factors; 0 where the gradient is not finite."""
        norms = self.norms
        if clip_function == "abadi":
            c = torch.where(norms > max_grad_norm, max_grad_norm / norms, torch.ones_like(norms))
        elif clip_function == "automatic":
            c = max_grad_norm / (norms + clip_gamma)
        else:
            raise ValueError(clip_function)
        return torch.where(norms.isfinite(), c, torch.zeros_like(c))

    def weighted_sum(self, factors: Tensor | Iterable[float]) -> Grads:
        """sum_i factors_i * grad_i, leaving out rows whose factor is zero."""
        total = {name: torch.zeros_like(g) for name, g in self.grads[0].items()}
        for c, grads in zip(factors, self.grads, strict=True):
            if float(c) != 0.0:
                for name, g in grads.items():
                    total[name] += float(c) * g
        return total

    def clipped_sum(self, max_grad_norm: float, clip_function: str = "abadi", clip_gamma: float = 0.01) -> Grads:
        """The clipped sum by its definition."""
        return self.weighted_sum(self.factors(max_grad_norm, clip_function, clip_gamma))


def _norm(grads: Grads) -> Tensor:
    return torch.stack([g.double().square().sum() for g in grads.values()]).sum().sqrt()


def _widened(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def oracle(model: nn.Module, batch: Batch, losses_of: LossesOf = causal_lm_losses) -> PerExample:
    """Per-example losses and gradients of `model` (unwrapped; not touched) on `batch`, in float64, one at a time."""
    model = copy.deepcopy(model).double()
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False
    params = trainable(model)
    losses, grads = [], []
    with Float64(), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        for i in range(size(batch)):
            alone = {k: _widened(v) for k, v in row(batch, i).items()}
            (loss,) = losses_of(model, alone)
            assert loss.dtype == torch.float64
            got = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
            losses.append(loss.detach())
            grads.append(
                {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(params.items(), got, strict=True)}
            )
    return PerExample(torch.stack(losses), tuple(grads))


def grads_of(model: nn.Module) -> Grads:
    """`.grad` of the trainable parameters, zeros where there is none; a copy."""
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in trainable(model).items()}


def relative_error(grads: Grads, expected: Grads) -> float:
    """||grads - expected|| / ||expected|| over the whole gradient, in float64; just the norm if that is zero."""
    assert list(grads) == list(expected), "not the same parameters"
    difference = _norm({n: grads[n].double() - expected[n].double() for n in expected})
    scale = _norm(expected)
    return float(difference / scale) if scale > 0 else float(difference)


def plain_gradients(
    model: nn.Module,
    batch: Batch,
    losses_of: LossesOf = causal_lm_losses,
    factors: Tensor | None = None,
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Iterator[Grads]:
    """sum_i factors_i * grad_i by plain PyTorch in the model's own precision: one example at a time, and batched.

    Args:
        model: unwrapped; not touched.
        batch: the examples.
        losses_of: per-example losses of a model and a batch.
        factors: [B], the oracle's; ones if not given. A row whose factor is zero is left out.
        context: entered around each forward, for instance an autocast.
    """
    factors = torch.ones(size(batch)) if factors is None else factors.float()
    used = [i for i in range(size(batch)) if factors[i] != 0]
    for parts in ([[i] for i in used], [used]):
        alone = copy.deepcopy(model)
        alone.zero_grad(set_to_none=True)
        for part in parts:
            with context():
                losses = losses_of(alone, rows(batch, part))
            (losses.float() * factors[part]).sum().backward()
        yield grads_of(alone)


def plain_error(
    model: nn.Module,
    batch: Batch,
    exact: PerExample,
    losses_of: LossesOf = causal_lm_losses,
    factors: Tensor | None = None,
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> float:
    """The larger relative error of plain PyTorch's own two ways to the same (weighted) sum, against float64."""
    expected = exact.weighted_sum(torch.ones(size(batch)) if factors is None else factors)
    return max(relative_error(g, expected) for g in plain_gradients(model, batch, losses_of, factors, context))


def plain_norm_error(
    model: nn.Module,
    batch: Batch,
    exact: PerExample,
    losses_of: LossesOf = causal_lm_losses,
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> float:
    """The largest relative error of plain PyTorch's gradient of one example, in the model's own precision.

    It bounds the relative error of the norm of that gradient.
    """
    worst = 0.0
    for i, expected in enumerate(exact.grads):
        if _norm(expected) > 0 and math.isfinite(float(_norm(expected))):
            one = PerExample(exact.losses[i : i + 1], (expected,))
            worst = max(worst, plain_error(model, row(batch, i), one, losses_of, None, context))
    return worst
