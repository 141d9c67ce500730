"""The per-example strategy: the backward of one example at a time, which is exact for any architecture."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from dpft.clipping.aliasing import is_sole_owner
from dpft.clipping.coverage import may_accumulate
from dpft.clipping.factors import row_weights
from dpft.clipping.passes import BookKeeping, WeightedPass, grad_dtype, sum_dtype
from dpft.clipping.state import ClipState, ClipStats
from dpft.errors import ClippingError
from dpft.kernels.linear import sq_norm
from dpft.kernels.weighted import RowWeights
from dpft.rules.base import full_shape


class Job(Protocol):
    """See :class:`dpft.clipping.strategies.Job`."""

    state: ClipState
    losses: Tensor | Sequence[Tensor]
    weights: Tensor
    strategy: str
    leaves: dict[str, Tensor]
    batch_size: int


def no_gradient(parameter: Tensor, device: torch.device) -> Tensor:
    """The part of a rank that did not use a parameter."""
    return torch.zeros(full_shape(parameter), dtype=sum_dtype(parameter), device=device)


def run_per_example(job: Job, scale: Tensor) -> list[Tensor | None] | None:
    """Backward of one example at a time. The last one's clipped gradient is returned, the others' go to ``.grad``.

    So a parameter's gradient is delivered by autograd once, and one gradient is kept besides ``.grad``.
    """
    engine = job.state.engine
    names, parameters = list(job.state.parameters), list(job.state.parameters.values())
    leaves: list[Tensor] = [job.leaves.get(name, p) for name, p in job.state.parameters.items()]
    squares: list[Tensor] = []
    all_factors = []
    result: list[Tensor | None] = [None] * len(parameters)
    losses, job.losses = list(job.losses), ()
    for i in range(job.batch_size):
        loss, losses[i] = losses[i], torch.empty(0)
        grads = _example_gradient(job.state, loss, leaves)
        job.state.holds = functools.partial(_held, squares, grads)
        loss_device = loss.device
        del loss
        owned = [is_sole_owner(grads, k) for k in range(len(grads))]  # before anything here refers to one, too
        sq, factor, by_name = _factors_of_one(job, dict(zip(names, grads, strict=True)), job.weights[i : i + 1])
        squares.append(sq)
        all_factors.append(factor)
        for k, grad in enumerate(grads):
            multiplier = (by_name(names[k]) * scale.to(factor)).squeeze()
            p = parameters[k]
            if grad is None and engine is None:
                continue
            grads[k] = None
            if grad is None:
                part = no_gradient(p, loss_device)
            else:
                wide = torch.promote_types(grad.dtype, torch.float32)
                part = grad.to(wide)
                # Autograd may return one tensor for two parameters, or one that a Function has kept: copy those.
                part = part.mul_(multiplier) if part is not grad or owned[k] else part * multiplier
                part.masked_fill_(multiplier == 0, 0)
            if engine is not None:
                engine.add(names[k], part.to(sum_dtype(p)))
                del grad, part
                continue
            part = part.to(grad_dtype(p))
            if i + 1 == job.batch_size:
                result[k] = part
            elif p.grad is None:
                p.grad = part
            else:
                p.grad.add_(part)
            del grad, part
    job.state.last = ClipStats(
        norms=torch.cat(squares).sqrt().float() if squares else torch.empty(0),
        clip_factors=torch.cat(all_factors).float() if squares else torch.empty(0),
        example_weights=job.weights.float(),
        strategy=job.strategy,
    )
    return result if engine is None else None


def _factors_of_one(
    job: Job, grads: dict[str, Tensor | None], weight: Tensor
) -> tuple[Tensor, Tensor, Callable[[str], Tensor]]:
    """Of one example: squared norm ``[1]``, (smallest) factor ``[1]``, and the factor of each parameter by name."""
    state, groups = job.state, job.state.clip_groups
    if groups is None:
        sq = _sq_norm_of(grads.values(), weight.device)
        factor = row_weights(weight) if state.clipping == "none" else state.factors(sq, weight)
        return sq, factor, lambda name: factor
    squares = [_sq_norm_of([grads[name] for name in names], weight.device) for names in groups.members()]
    factors = [state.group_factors(each, weight, g) for g, each in enumerate(squares)]
    return torch.stack(squares).sum(0), torch.stack(factors).amin(0), lambda name: factors[groups.of[name]]


def _held(squares: list[Tensor], grads: list[Tensor | None]) -> BookKeeping:
    return BookKeeping(squares, [grad for grad in grads if grad is not None])


def _sq_norm_of(grads: Iterable[Tensor | None], device: torch.device) -> Tensor:
    sq = torch.zeros(1, dtype=torch.float64, device=device)
    for grad in grads:
        if grad is not None:
            sq += sq_norm(grad.unsqueeze(0))
    return sq


def _example_gradient(state: ClipState, loss: Tensor, parameters: list[Tensor]) -> list[Tensor | None]:
    """Gradients of one loss, without touching ``.grad``.

    Raises:
        ClippingError: an operation's own backward put a gradient into ``.grad`` under an engine.
    """
    previous, state.active = state.active, _Anything()
    before = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    try:
        if state.alone and may_accumulate(loss):
            # What a backward inside of a backward computes can only be found in .grad.
            torch.autograd.backward(loss)
            return [p.grad for p in parameters]
        grads: list[Tensor | None] = list(torch.autograd.grad(loss, parameters, allow_unused=True))
        if any(p.grad is not None for p in parameters):
            raise ClippingError(
                "an operation in the model runs a backward of its own (a reentrant checkpoint, reversible layers), "
                "whose gradients an engine would take for clipped. Use non-reentrant checkpointing, or one process."
            )
        return grads
    finally:
        state.active = previous
        for p, grad in zip(parameters, before, strict=True):
            p.grad = grad


class _Anything(WeightedPass):
    """Marks that a per-example backward is running; no site reports to it, since the strategy has no sites."""

    def __init__(self) -> None:
        super().__init__(RowWeights(torch.ones(1, dtype=torch.float64)))
