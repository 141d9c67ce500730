"""The clip boundary: the autograd node between the per-example losses and the scalar that the user calls backward on.

::

    losses [B] --ClipBoundary--> scalar loss

Its value is the mean of the losses; its backward computes the clipped **sum** of their gradients. It keeps the losses'
graph and traverses it itself, in nested backward passes, so the outer backward sees one node whose inputs are the
parameters: hooks on them, including those of engines, fire as in plain training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpft.clipping.state import ClipState
from dpft.clipping.strategies import Job
from dpft.errors import ClippingError


class ClipBoundary(torch.autograd.Function):
    """See the module docstring. ``box`` contains the :class:`Job` until it has run, once."""

    @staticmethod
    def forward(ctx: Any, tap: Tensor, box: list[Job], value: Tensor, *parameters: Tensor) -> Tensor:
        ctx.box, ctx.count, ctx.device = box, len(parameters), value.device.type
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Any, ...]:
        if not ctx.box:
            raise ClippingError(
                "backward was called twice on one loss. Its clipped gradient is in .grad already, and adding it again "
                "would exceed the clip norm. Run a new forward."
            )
        job = ctx.box.pop()
        job.state.backwards += 1
        job.state.deferred_checks.note_scale(scale)
        if job.state.unfinished and any(p.grad is not None for p in job.state.parameters.values()):
            raise ClippingError(
                "an earlier backward failed midway and may have left a partial sum in .grad: some of its examples "
                "would count twice. Call zero_grad() and begin the logical batch again."
            )
        job.state.unfinished = True
        job.state.broken, before = True, job.state.broken
        with torch.autocast(ctx.device, enabled=False):
            if job.state.clipping == "none" and job.strategy != "per_example":
                run_plain(job, scale)
                grads = None
            else:
                grads = job.run(scale)
        job.state.broken, job.state.unfinished = before, False
        if grads is None:
            grads = [None] * ctx.count
        return None, None, None, *grads


def run_plain(job: Job, scale: Tensor) -> None:
    """``clipping="none"``: the plain sum of the gradients of the unpadded examples' losses."""
    losses, job.losses = job.losses, ()
    assert isinstance(losses, Tensor)
    unknown = torch.full((job.batch_size,), torch.nan, dtype=torch.float64, device=losses.device)  # not computed
    weights = job.factors(unknown)
    seeds = (weights * scale.to(weights)).to(losses.dtype)
    torch.autograd.backward(losses, seeds)


def mean_loss(losses: Tensor, weights: Tensor | None) -> Tensor:
    """``[]`` float32, the mean of ``losses [B]`` over rows of positive weight (None: all); 0 where there is none."""
    present = torch.ones_like(losses, dtype=torch.bool) if weights is None else weights > 0
    return torch.where(present, losses.float(), 0.0).sum() / present.sum().clamp(min=1)


def clip_boundary(
    state: ClipState,
    losses: Tensor | Sequence[Tensor],
    weights: Tensor | None,
    strategy: str,
) -> Tensor:
    """The scalar loss whose backward computes the clipped sum.

    Args:
        state: of the wrapped model.
        losses: ``[B]`` per-example losses, or B scalars with a graph each.
        weights: ``[B]``, 0 for padding rows; None means no padding.
        strategy: which strategy to run; see :mod:`dpft.clipping.strategy_choice`.

    Returns:
        ``[]`` float32, the mean of the losses over rows of positive weight; 0 where there is none.

    Raises:
        ClippingError: losses or weights of the wrong shape.
    """
    if isinstance(losses, Tensor):
        detached = losses.detach()
    else:
        detached = torch.stack([x.detach() for x in losses]) if losses else torch.empty(0)
    if detached.dim() != 1:
        raise ClippingError(
            f"expected per-example losses of shape [B], got {list(detached.shape)}. Use reduction='none' and average "
            "over each example's own tokens, not over the batch."
        )
    if weights is None:
        weights = torch.ones_like(detached)
    if weights.shape != detached.shape:
        raise ClippingError(
            f"example_weight has shape {list(weights.shape)}; expected {list(detached.shape)}, one weight per "
            "example: 1, or 0 for a padding row"
        )
    weights = weights.detach().to(detached.device)
    spread = None if state.engine is None else state.engine.spread
    value = mean_loss(detached if spread is None else spread.total(detached), weights)
    leaves = state.engine.leaves() if state.engine is not None and strategy == "per_example" else {}
    groups, state.groups = (None if strategy == "per_example" else state.groups), None
    if groups is not None and groups.examples != len(detached):
        raise ClippingError(
            f"there are {len(detached)} losses of {groups.examples} examples, whose rows example_ids names; expected "
            "one loss for each example, of all its rows"
        )
    job = Job(state, losses, weights, strategy, state.take_trace(), state.row_tokens, groups, leaves)
    native = state.engine is None and strategy in ("one_pass", "per_example")
    delivered = list(state.parameters.values()) if native else []
    loss: Tensor = ClipBoundary.apply(state.tap, [job], value, *delivered)
    return loss
