"""A clipped sum by its definition: plain autograd, one example alone and without padding; no code of dpft."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tools.models.building import alone
from tools.models.precision import DOUBLE, Precision

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Expected:
    """The norm of each example's gradient ``[B]``, and the clipped sum of each parameter; C is between two norms."""

    norms: Tensor
    max_grad_norm: float
    sums: dict[str, Tensor]


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """``[]`` the model's own loss."""
    loss: Tensor = model(**batch).loss
    if loss.dim() != 0:
        loss = loss.mean()
    return loss


def expected(model: nn.Module, batch: Batch, precision: Precision = DOUBLE) -> Expected:
    """Norms and clipped sum of the examples of a batch, each of which is run alone, without padding.

    C is the geometric mean of the two smallest norms, so one example is not clipped and the others are.

    Raises:
        ValueError: a gradient is not finite, or zero.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients: list[dict[str, Tensor]] = []
    for i in range(len(batch["input_ids"])):
        # Not autograd.grad: the reversible layers of Reformer call backward in their own, which fills .grad.
        model.zero_grad()
        with precision.context():
            loss_of(model, alone(batch, i)).backward()
        gradients.append({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in parameters.items()})
    model.zero_grad()
    norms = torch.stack([norm_of(g) for g in gradients])
    if not (norms.isfinite().all() and (norms > 0).all()):
        raise ValueError(f"the norms of the examples' gradients are {norms.tolist()}")
    lowest = norms.sort().values
    clip = float((lowest[0] * lowest[1]).sqrt())
    factors = (clip / norms).clamp(max=1.0)
    sums = {n: sum((c * g[n] for c, g in zip(factors, gradients, strict=True)), torch.zeros(())) for n in parameters}
    return Expected(norms, clip, sums)


def norm_of(gradients: Mapping[str, Tensor]) -> Tensor:
    """``[]`` the norm over all parameters."""
    return torch.stack([g.double().norm() for g in gradients.values()]).norm()


def compare(
    norms: Tensor, sums: Mapping[str, Tensor], right: Expected, small: float = DOUBLE.small
) -> tuple[float, str]:
    """The largest relative error, and what has it: a parameter, or ``norms``.

    Args:
        norms: ``[B]`` of the examples.
        sums: of every parameter; one that is missing is zero.
        right: what they should be.
        small: the share of the whole that a parameter's gradient is held to where it is smaller.
    """
    floor = small * norm_of(right.sums)
    worst, where = float(((norms.double() - right.norms).abs() / right.norms).nan_to_num(float("inf")).max()), "norms"
    for name, expected_sum in right.sums.items():
        got = sums.get(name)
        got = torch.zeros_like(expected_sum) if got is None else got
        error = float((got.double() - expected_sum).norm() / torch.maximum(expected_sum.norm(), floor))
        if not error <= worst:
            worst, where = (error if error == error else float("inf")), name  # NaN is larger than any
    return worst, where


def first_output(out: Any) -> Tensor:
    """The logits of a model's output ``[B, ...]``."""
    for name in ("logits", "start_logits", "prediction_logits"):
        value = getattr(out, name, None)
        if isinstance(value, Tensor):
            return value
    raise ValueError(f"a {type(out).__name__} has no logits")


@torch.no_grad()
def dependence(model: nn.Module, batch: Batch, precision: Precision = DOUBLE) -> float:
    """How far the outputs of a row in its batch are from those of the row alone, relative to the largest of them."""
    largest = 0.0
    with precision.context():
        together = first_output(model(**batch))
        for i in range(len(together)):
            single = first_output(model(**alone(batch, i)))[0]
            part = together[i][tuple(slice(size) for size in single.shape)]
            largest = max(largest, float((part - single).abs().max() / single.abs().max()))
    return largest
