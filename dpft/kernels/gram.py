"""Gram norms of linear layers: ``sq_i = sum over pairs of tokens of (x_s . x_t)(g_s . g_t)``, no ``[B, d, p]``.

The Gram identity is Goodfellow's (2015, arXiv 1510.01799) for ``T = 1`` and Li et al.'s (2022, arXiv 2110.05679) for
sequences. Its sum is subject to cancellation: for similar tokens with opposite gradients, its terms are T times its
value or more, and their rounding errors are similar too, so they add up. An understated norm is a contribution above
C. So products in float32 come with a bound on their error, and examples for which it is too large a part of the norm
are computed again in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpft.kernels.devices import double_cost
from dpft.kernels.impl import on_gpu

GRAM_TILE = 256

# Error of an inner product of 16-bit numbers in tensor cores, which truncate their sums towards zero.
_TENSOR_CORES = 1e-5
# Part of a squared norm that the bound may be at most, on a CPU: a norm is at most 2^-11 too large.
_TOLERATED = 2.0**-10
# Below so many multiplications of all examples together the products are computed in float64.
_SMALL = 1 << 26
# Longest texts for which the products of an input are remembered for other layers: they are T / p of its size.
REMEMBERED = 512
# A squared norm that may be taken for zero, and what a float32 may be when it becomes zero.
_ZERO = 1e-24
_TINY = torch.finfo(torch.float32).tiny


class InputCache:
    """What the last layer's input was turned into, for layers beside it with the same one: q, k, v; gate, up."""

    def __init__(self) -> None:
        self._input: Tensor | None = None
        self._is: tuple[Any, ...] = ()
        self._made: dict[str, Any] = {}

    def get(self, x: Tensor, name: str, make: Callable[[], Any]) -> Any:
        """``make()``, or what it returned for this ``name`` and an input that is the same memory, unchanged."""
        which = (x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride(), x.dtype, x._version)
        if which != self._is:
            # The reference keeps the memory from being used for another tensor.
            self._input, self._is, self._made = x, which, {}
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def clear(self) -> None:
        """Forget the input."""
        self._input, self._is, self._made = None, (), {}


@dataclass(frozen=True)
class GramSums:
    """Squared norms by the Gram identity.

    Attributes:
        sq: ``[B]`` float64.
        error: ``[B]`` float64, not below the rounding error of ``sq``.
        sizes: ``[B]`` float64, ``sum_t |x_t||g_t|``.
    """

    sq: Tensor
    error: Tensor
    sizes: Tensor


def gram_tile(seq_len: int) -> int:
    """Edge of the tiles into which the gram method splits ``seq_len`` tokens; products of edges below 64 are slow."""
    return max(1, min(seq_len, GRAM_TILE, max(64, -(-seq_len // 4))))


def in_double(x: Tensor, g: Tensor) -> bool:
    """Whether all products are computed in float64: for float64 inputs, and where it takes no longer than float32."""
    if x.dtype == torch.float64:
        return True
    if on_gpu(x):
        return x.dtype == torch.float32 and double_cost(x.device) <= 1.0
    return x.shape[0] * x.shape[1] ** 2 * (x.shape[2] + g.shape[2]) < _SMALL


def _inner(a: Tensor, b: Tensor, elements: int) -> Tensor:
    """``a b^T`` in float32 of ``a [B, s, n]``, ``b [B, t, n]``: products of 16-bit numbers are not rounded."""
    if a.dtype == torch.float32:
        return torch.bmm(a, b.mT)
    if on_gpu(a):
        return torch.bmm(a, b.mT, out_dtype=torch.float32)
    return _inner_converted(a, b, elements, torch.float32)


def token_sizes(x: Tensor, g: Tensor) -> Tensor:
    """``[B]`` float64, ``sum_t |x_t||g_t|`` of ``x [B, T, p]``, ``g [B, T, d]``.

    Infinite where a square overflows in float32: operands of such a size are not scaled, since the norm is infinite.
    """
    sizes = [torch.linalg.vector_norm(t, dim=2, dtype=torch.promote_types(t.dtype, torch.float32)) for t in (x, g)]
    return (sizes[0].double() * sizes[1]).sum(1)


def _spans(batch: int, seq_len: int, tile: int, elements: int) -> list[tuple[slice, slice]]:
    """Rows and columns of the blocks of the upper triangle of ``[T, T]``, the last row first.

    A row's first block begins on the diagonal, so that the sizes of a block's tokens are known when it is processed.
    """
    width = max(tile, elements // (2 * batch * tile))
    rows = [slice(i, i + tile) for i in reversed(range(0, seq_len, tile))]
    return [(r, slice(j, j + width)) for r in rows for j in range(r.start, seq_len, width)]


def _all_inner(x: Tensor, spans: list[tuple[slice, slice]], elements: int) -> list[Tensor]:
    return [_inner(x[:, r], x[:, c], elements) for r, c in spans]


def _error_of_dot(n: int, gpu: bool) -> float:
    """Bound on the error of a float32 inner product of n terms, in eps of the product of the norms.

    It is largest where all terms are equal: then each addition is rounded the same way. *Measured* for such, on a CPU,
    whose BLAS adds up blocks of some 300 terms: n / 8 up to 256 terms, 32 at 512, 47 at 4,096, 50 at 8,000.
    """
    return n / 6 if gpu else min(n / 6, 56 + n / 500)


def _single(x: Tensor, g: Tensor, elements: int, inputs: InputCache | None) -> tuple[Tensor, Tensor, Tensor]:
    """Squared norms from float32 products, a bound on their error, and ``sum_t |x_t||g_t|``, each ``[B]`` float64.

    With ``K = x x^T`` and ``L = g g^T``, of which the entries have errors of at most ``e |x_s||x_t|`` and
    ``f |g_s||g_t|``, the error of ``sum_st K_st L_st`` is at most ``sum_st e |x_s||x_t||L_st| + f |g_s||g_t||K_st|``.
    """
    batch, seq_len, p = x.shape
    tile = gram_tile(seq_len)
    step = max(1, elements // (2 * tile * tile))
    eps = torch.finfo(torch.float32).eps
    rounds = x.dtype == torch.float32 or not on_gpu(x)
    of_x, of_g = (_error_of_dot(t.shape[2], on_gpu(x)) * eps if rounds else _TENSOR_CORES for t in (x, g))
    sq, error, sizes = (torch.zeros(batch, dtype=torch.float64, device=x.device) for _ in range(3))
    for k in range(0, batch, step):
        some = slice(k, k + step)
        xs, gs = x[some], g[some]
        spans = _spans(len(xs), seq_len, tile, elements)
        made: list[Tensor] | None = None
        if inputs is not None and step >= batch and seq_len <= REMEMBERED:
            made = inputs.get(x, "gram", functools.partial(_all_inner, x, spans, elements))
        x_size, g_size = (torch.zeros((len(xs), seq_len, 1), device=x.device) for _ in range(2))  # of the tokens
        for n, (r, c) in enumerate(spans):
            a = _inner(xs[:, r], xs[:, c], elements) if made is None else made[n]
            b = _inner(gs[:, r], gs[:, c], elements)
            edge = a.shape[1] if r.start == c.start else 0  # of the square on the diagonal, each pair of which is once
            if edge:
                for sizes_of, products in ((x_size, a), (g_size, b)):
                    torch.sqrt(products.diagonal(dim1=1, dim2=2).unsqueeze(2), out=sizes_of[:, r])
            for products, size, e in ((b, x_size, of_x), (a, g_size, of_g)):
                columns = 2 * size[:, c]
                columns[:, :edge] *= 0.5
                error[some].add_((torch.bmm(products.abs(), columns) * size[:, r]).sum((1, 2)), alpha=e)
            b.mul_(a)
            sq[some] += b[:, :, :edge].sum((1, 2))
            if b.shape[2] > edge:
                sq[some].add_(b[:, :, edge:].sum((1, 2)), alpha=2)
            del a, b, columns, products
        sizes[some] = (x_size * g_size).sum((1, 2))
        largest = [t.amax((1, 2)).double().square() for t in (x_size, g_size)]
        error[some] += _TINY * seq_len**2 * (p * largest[1] + g.shape[2] * largest[0] + 1)
    # The sums of the products, and of their bound, are rounded too.
    return sq, error * (1 + 1e-4) + 4 * eps * sq.abs(), sizes


def gram_single(
    x: Tensor, g: Tensor, elements: int, again: Callable[[Tensor, Tensor], Tensor], inputs: InputCache | None = None
) -> GramSums:
    """Gram norms from float32 products.

    Args:
        x: ``[B, T, p]``; g: ``[B, T, d]``, float32 or 16 bits.
        elements: of a tile.
        again: computes the squared norms of examples for which float32 is not enough. On a CPU of all of them; on a
            GPU, where their number cannot be known without waiting, of the worst eighth: the others keep their bound,
            whatever it is.
        inputs: remembers the products of x.
    """
    sq, error, sizes = _single(x, g, elements, inputs)
    part = error / (sq + _ZERO)
    if on_gpu(x):
        worst = torch.nan_to_num(part, nan=torch.inf, posinf=torch.inf).topk(-(-len(x) // 8)).indices
        sq = sq.index_copy(0, worst, again(x.index_select(0, worst), g.index_select(0, worst)))
        error = error.index_fill(0, worst, 0.0)
    elif not x.is_meta:
        for i in (~(part <= _TOLERATED)).nonzero().flatten().tolist():  # also where it is NaN
            sq[i], error[i] = again(x[i : i + 1], g[i : i + 1])[0], 0.0
            sizes[i] = token_sizes(x[i : i + 1], g[i : i + 1])[0]
    return GramSums(sq.clamp_(min=0.0), error, sizes)


def gram_double(x: Tensor, g: Tensor, elements: int, tile: int) -> Tensor:
    """``[B]`` float64: the same sum in float64, tile by tile. Its error is about 1e-9 of that in float32."""
    batch = len(x)
    total = torch.zeros(batch, dtype=torch.float64, device=x.device)
    step = max(1, elements // (tile * tile))
    for k in range(0, batch, step):
        xs, gs = x[k : k + step].split(tile, 1), g[k : k + step].split(tile, 1)
        for i in range(len(xs)):
            for j in range(i, len(xs)):
                a, b = (_inner_converted(t[i], t[j], elements, torch.float64) for t in (xs, gs))
                pair = a.mul_(b)
                total[k : k + step].add_(pair.sum((1, 2)), alpha=1 if i == j else 2)
    return total.clamp_(min=0.0)


def _inner_converted(a: Tensor, b: Tensor, elements: int, dtype: torch.dtype) -> Tensor:
    """``a b^T [B, s, t]`` in ``dtype`` of ``a [B, s, n]``, ``b [B, t, n]``, converted a few features at a time."""
    out = a.new_zeros((*a.shape[:2], b.shape[1]), dtype=dtype)
    step = max(1, elements // (a.shape[0] * a.shape[1]))
    for i in range(0, a.shape[2], step):
        left = a[:, :, i : i + step].to(dtype)
        right = left if a is b else b[:, :, i : i + step].to(dtype)
        torch.baddbmm(out, left, right.mT, out=out)
    return out
