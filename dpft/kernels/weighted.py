"""Weighted sums of per-example gradients. A factor of zero gives exactly zero, even for NaN.

``sum_i c_i g_i^T x_i`` of a linear layer is one product over the tokens of all examples, as in plain training, of
operands one of which is scaled by its example's factor. What the scaling rounds is part of the norm:
:func:`dpft.kernels.linear.upper_sq_norm`.

``finite`` says that no tensor of an example whose factor is zero has an infinity or a NaN, or that no factor is zero:
then nothing is masked. Otherwise both operands are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpft.kernels.gram import InputCache
from dpft.kernels.impl import on_gpu
from dpft.kernels.linear import edge_and_elements, rounds_inputs

# Tokens of one product: copies of its operands are no larger than a few gradients.
_TOKENS = 2048
# From so many tokens on, one product per example does not read and write its result more than it multiplies.
_LONG = 1024


@dataclass(frozen=True)
class RowWeights:
    """Factors of the examples of one backward.

    Attributes:
        factors: ``[B]`` float64.
        finite: see the module.
        inputs: remembers scaled inputs; None: nothing does.
    """

    factors: Tensor
    finite: bool = False
    inputs: InputCache | None = None


def all_finite(sq_norms: Tensor) -> bool:
    """Whether it is known that no example has an infinite or NaN norm: on a CPU. A GPU would have to be waited for."""
    return not on_gpu(sq_norms) and (sq_norms.is_meta or bool(torch.isfinite(sq_norms).all()))


def none_dropped(factors: Tensor) -> bool:
    """Whether it is known that no factor is zero: on a CPU."""
    return not on_gpu(factors) and (factors.is_meta or bool((factors != 0).all()))


def weighted_linear_grad(
    x: Tensor,
    g: Tensor,
    factors: Tensor,
    out_dtype: torch.dtype,
    finite: bool = False,
    inputs: InputCache | None = None,
) -> Tensor:
    """``sum_i factors_i * g_i^T x_i``.

    Args:
        x: ``[B, T, p]``; g: ``[B, T, d]``.
        factors: ``[B]`` float32 or float64, finite.
        out_dtype: dtype of the result; the factors are applied and summed in at least float32.
        finite: see the module.
        inputs: remembers the scaled x, for layers with the same input.

    Returns:
        ``[d, p]`` in ``out_dtype``.
    """
    batch, seq_len, p = x.shape
    d = g.shape[2]
    if x.numel() == 0 or g.numel() == 0:
        return x.new_zeros((d, p), dtype=out_dtype)
    dtype = torch.float64 if out_dtype == torch.float64 else torch.float32
    # A product in TF32 rounds its operands: scaled ones otherwise than those whose norm was taken.
    if batch == 1 or rounds_inputs(x) or (x.dtype.itemsize < 4 and on_gpu(x) and seq_len >= _LONG):
        return _one_by_one(x, g, factors.to(dtype), dtype).to(out_dtype)
    scales = factors.to(dtype).view(-1, 1).expand(batch, seq_len).reshape(-1, 1)
    dropped = None if finite else scales == 0
    xs, gs = x.reshape(-1, p), g.reshape(-1, d)
    step = max(_TOKENS, 2 * max(p, d))
    if inputs is not None and p <= d and len(xs) <= step and x.dtype == dtype:
        scaled = inputs.get(x, "scaled", lambda: _scaled(xs, scales, dropped))
        return (_masked(gs, dropped).mT @ scaled).to(out_dtype)
    return weighted_rows(xs, gs, scales, dropped).to(out_dtype)


def weighted_rows(x: Tensor, g: Tensor, scales: Tensor, dropped: Tensor | None) -> Tensor:
    """``sum_n scales_n * g_n x_n^T``, one product, of which the narrower operand is scaled.

    Args:
        x: ``[N, p]``, N at least 1; g: ``[N, d]``.
        scales: ``[N, 1]`` float32 or float64.
        dropped: ``[N, 1]`` bool, rows that do not count, whatever is in them; None: none.

    Returns:
        ``[d, p]`` in the scales' dtype.
    """
    total: Tensor | None = None
    step = max(_TOKENS, 2 * max(x.shape[1], g.shape[1]))
    for t in range(0, len(x), step):
        rows = slice(t, t + step)
        drop = None if dropped is None else dropped[rows]
        left, right = g[rows], x[rows]
        if x.shape[1] <= g.shape[1]:
            part = _product(_masked(left, drop), _scaled(right.to(scales.dtype), scales[rows], drop), x.dtype)
        else:
            part = _product(_scaled(left.to(scales.dtype), scales[rows], drop), _masked(right, drop), x.dtype)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def _scaled(t: Tensor, scales: Tensor, dropped: Tensor | None) -> Tensor:
    """``t [N, n]`` times ``scales [N, 1]``; exactly zero where dropped."""
    scaled = t * scales
    return scaled if dropped is None else scaled.masked_fill_(dropped, 0)


def _masked(t: Tensor, dropped: Tensor | None) -> Tensor:
    return t if dropped is None else t.masked_fill(dropped, 0)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a^T b`` in at least float32, where one operand is scaled, in float32, and the other in the model's ``dtype``.

    On a GPU a scaled operand is multiplied in two parts of 16 bits, which together have 2^-16 of its rounding.
    """
    if a.dtype == b.dtype or not on_gpu(a):
        wide = torch.promote_types(a.dtype, b.dtype)
        return a.to(wide).mT @ b.to(wide)
    a_parts, b_parts = ([t] if t.dtype == dtype else _halves(t, dtype) for t in (a, b))
    products = [torch.mm(x.mT, y, out_dtype=torch.float32) for x in a_parts for y in b_parts]
    return products[0].add_(products[1])


def _halves(t: Tensor, dtype: torch.dtype) -> list[Tensor]:
    high = t.to(dtype)
    return [high, (t - high).to(dtype)]


def _one_by_one(x: Tensor, g: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
    """The same by one product per example, which is scaled afterwards."""
    total: Tensor | None = None
    for x_i, g_i, factor in zip(x, g, factors, strict=True):
        grad = _unrounded(g_i, x_i, dtype).mul_(factor).masked_fill_(factor == 0, 0)
        total = grad if total is None else total.add_(grad)
    assert total is not None
    return total


def _unrounded(g: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """``g^T x`` of ``g [T, d]``, ``x [T, p]`` in float32 or float64, without rounding to 16 bits in between."""
    if x.dtype == dtype:
        return g.mT @ x
    if on_gpu(x) and dtype == torch.float32:
        return torch.mm(g.mT, x, out_dtype=dtype)
    total = torch.zeros((g.shape[1], x.shape[1]), dtype=dtype, device=x.device)
    for t in range(0, len(x), _TOKENS):  # copies only a few tokens at a time
        torch.addmm(total, g[t : t + _TOKENS].to(dtype).mT, x[t : t + _TOKENS].to(dtype), out=total)
    return total


def weighted_vector(grad: Tensor, factors: Tensor, finite: bool = False) -> Tensor:
    """``sum_i factors_i * grad[i]`` of ``grad [B, ...]`` in at least float32, out of place; ``factors [B]``."""
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    flat = grad.reshape(len(grad), grad.shape[1:].numel()).to(dtype)
    scaled = _scaled(flat, factors.to(dtype).unsqueeze(1), None if finite else (factors == 0).unsqueeze(1))
    return scaled.sum(0).view(grad.shape[1:])


def weighted_sum_(
    grad: Tensor, factors: Tensor, dtype: torch.dtype, multipliers: Tensor | None = None, finite: bool = False
) -> Tensor:
    """``sum_i factors_i * multipliers_i * grad[i]`` of ``grad [B, ...]``, which is overwritten.

    Args:
        grad: per-example gradients; for one example in ``dtype``, its memory becomes the result.
        factors: ``[B]``; a factor of zero masks its example.
        dtype: of the result; the sum is at least float32.
        multipliers: ``[B]``, or None for ones.
        finite: see the module.
    """
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    scales = (factors if multipliers is None else factors * multipliers.to(factors)).to(wide)
    if len(grad) == 0:
        return grad.new_zeros(grad.shape[1:], dtype=dtype)
    if not finite:
        grad.masked_fill_((factors == 0).view(-1, *[1] * (grad.dim() - 1)), 0)
    if len(grad) == 1:
        return grad[0].to(wide).mul_(scales[0]).to(dtype)
    flat = grad.reshape(len(grad), -1)
    if not on_gpu(grad) and grad.dtype == wide:
        return (scales @ flat).view(grad.shape[1:]).to(dtype)
    # A GPU may round the operands of a product (TF32). A few columns at a time: the scaled copy is small.
    total = torch.empty(flat.shape[1], dtype=wide, device=grad.device)
    step = edge_and_elements(grad)[1] // len(grad) + 1
    for i in range(0, flat.shape[1], step):
        columns = slice(i, i + step)
        torch.sum(flat[:, columns].to(wide) * scales.unsqueeze(1), 0, out=total[columns])
    return total.view(grad.shape[1:]).to(dtype)


def scale_(tensors: list[Tensor], factor: Tensor, finite: bool = False) -> None:
    """Multiply tensors by one factor in place, with one foreach multiplication per dtype.

    Args:
        tensors: float32 or float64, any shapes.
        factor: ``[]``; zero gives exactly zero, even for NaN.
        finite: see the module.
    """
    for dtype in {t.dtype for t in tensors}:
        of_dtype = [t for t in tensors if t.dtype == dtype]
        torch._foreach_mul_(of_dtype, factor.to(dtype))
        if not finite:
            for t in of_dtype:
                t.masked_fill_(factor == 0, 0)
