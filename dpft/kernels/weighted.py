"""Weighted sums of materialised per-example gradients. A factor of zero gives exactly zero, even for NaN."""

from __future__ import annotations

import torch
from torch import Tensor


def weighted_vector(grad: Tensor, factors: Tensor) -> Tensor:
    """``sum_i factors_i * grad[i]`` of ``grad [B, ...]`` in at least float32, out of place; ``factors [B]``."""
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    shape = (-1, *[1] * (grad.dim() - 1))
    return (grad.to(dtype) * factors.to(dtype).view(shape)).masked_fill_((factors == 0).view(shape), 0).sum(0)


def weighted_sum_(grad: Tensor, factors: Tensor, dtype: torch.dtype, multipliers: Tensor | None = None) -> Tensor:
    """``sum_i factors_i * multipliers_i * grad[i]`` of ``grad [B, ...]``, which is overwritten.

    Args:
        grad: per-example gradients; for one example in ``dtype``, its memory becomes the result.
        factors: ``[B]``; a factor of zero masks its example.
        dtype: of the result; the sum is at least float32.
        multipliers: ``[B]``, or None for ones.
    """
    sum_dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    scales = (factors if multipliers is None else factors * multipliers.to(factors)).to(sum_dtype)
    dropped = factors == 0
    total: Tensor | None = None
    for i, g in enumerate(grad.unbind(0)):
        part = g.to(sum_dtype).mul_(scales[i]).masked_fill_(dropped[i], 0)
        if total is not None:
            total.add_(part)
        elif len(grad) > 1 and part is g:
            total = part.clone()  # a view would keep all examples' gradients alive for as long as the sum
        else:
            total = part
    if total is None:
        total = grad.new_zeros(grad.shape[1:], dtype=sum_dtype)
    return total.to(dtype)


def scale_(tensors: list[Tensor], factor: Tensor) -> None:
    """Multiply tensors by one factor in place, with one foreach multiplication per dtype.

    Args:
        tensors: float32 or float64, any shapes.
        factor: ``[]``; zero gives exactly zero, even for NaN.
    """
    for dtype in {t.dtype for t in tensors}:
        of_dtype = [t for t in tensors if t.dtype == dtype]
        torch._foreach_mul_(of_dtype, factor.to(dtype))
        for t in of_dtype:
            t.masked_fill_(factor == 0, 0)
