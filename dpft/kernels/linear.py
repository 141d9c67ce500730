"""Per-example squared gradient norms of a linear layer, ``sq_i = ||g_i^T x_i||_F^2``.

Four exact ways to the same number; DESIGN in ``docs/design.md``:

============  =====================  ==============================  ============================
method        FLOPs per example      extra memory                    cheapest when
============  =====================  ==============================  ============================
gram          ``T^2 (p + d)``        one ``[tile, tile]`` pair       ``T < p d / (p + d)``
feature       ``2 T p d``            one ``[tile, p]`` block         ``T > p d / (p + d)``
materialise   ``2 T p d``            ``[B, d, p]``                   the gradient is kept anyway
gram_full     ``2 T^2 (p + d)``      ``[B, T, T]`` twice             never; the published baseline
============  =====================  ==============================  ============================

The Gram identity is Goodfellow's (2015, arXiv 1510.01799) for ``T = 1`` and Li et al.'s (2022, arXiv 2110.05679) for
sequences. Squares are accumulated in float32 within a tile and float64 across tiles, whatever the inputs' dtype; Gram
products are made in float64.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Method = Literal["gram", "gram_full", "feature", "materialise"]

# Elements of one product tile over all examples of the batch (float32: 4 MiB). Large enough that the work is in large
# matrix products, small enough not to show in a peak.
TILE_ELEMENTS = 1 << 20
GRAM_TILE = 256
_RUN = 1024


def _check(x: Tensor, g: Tensor) -> None:
    if x.dim() != 3 or g.dim() != 3 or x.shape[:2] != g.shape[:2]:
        raise ValueError(
            f"expected x [B, T, p] and g [B, T, d] with equal B and T, got x {list(x.shape)} and g {list(g.shape)}"
        )


def gram_tile(seq_len: int) -> int:
    """Edge of the square tiles that the gram method cuts ``seq_len`` tokens into."""
    return max(16, min(GRAM_TILE, -(-seq_len // 4)))


def method_flops(method: Method, seq_len: int, p: int, d: int) -> int:
    """FLOPs (multiply and add counted as two) of one example's squared norm by ``method``."""
    if method == "gram":
        tile = gram_tile(seq_len)
        full, rest = divmod(seq_len, tile)
        blocks = [tile] * full + ([rest] if rest else [])
        return sum(2 * a * b * (p + d) for i, a in enumerate(blocks) for b in blocks[i:])
    if method == "gram_full":
        return 2 * seq_len * seq_len * (p + d)
    return 2 * seq_len * p * d


def choose_method(seq_len: int, p: int, d: int) -> Method:
    """The cheaper of gram tiles and feature tiles for ``x [B, T, p]``, ``g [B, T, d]``.

    By FLOPs, those of the Gram method counted twice: they are made in float64.
    """
    gram, feature = method_flops("gram", seq_len, p, d), method_flops("feature", seq_len, p, d)
    return "gram" if 2 * gram < feature else "feature"


def _gram(x: Tensor, g: Tensor, tile: int) -> Tensor:
    """Sum of ``(x_s . x_t)(g_s . g_t)`` over pairs of tokens, tile by tile, in float64.

    The sum cancels: where tokens are alike and their gradients opposite, its terms are T times its value or more, and
    rounding errors of like tokens are alike too, so they add up. *Measured* in float32: up to 0.65 eps (sum_t |x_t|
    |g_t|)^2 too small, which is all of the norm of a gradient that cancels to 1e-3, and an understated norm breaks the
    bound C. In float64 the same is some 1e-9 of that.
    """
    total = torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)
    for i in range(0, x.shape[1], tile):
        x_i, g_i = x[:, i : i + tile].double(), g[:, i : i + tile].double()
        for j in range(i, x.shape[1], tile):
            x_j, g_j = x[:, j : j + tile].double(), g[:, j : j + tile].double()
            pair = (x_i @ x_j.mT).mul_(g_i @ g_j.mT).sum((1, 2))
            total += pair if i == j else 2 * pair
    return total.clamp_(min=0.0)


def _feature(x: Tensor, g: Tensor) -> Tensor:
    batch, _, p = x.shape
    d = g.shape[2]
    total = torch.zeros(batch, dtype=torch.float64, device=x.device)
    if p > d:  # tile the wider of the two, so that each product is as square as can be
        x, g, p, d = g, x, d, p
    step_p = min(p, 4096)
    step_d = max(1, TILE_ELEMENTS // max(1, batch * step_p))
    for i in range(0, d, step_d):
        for j in range(0, p, step_p):
            total += sq_norm(g[:, :, i : i + step_d].mT @ x[:, :, j : j + step_p])
    return total


def sq_norm(v: Tensor) -> Tensor:
    """``[B]`` float64 squared norms of ``v [B, ...]``; squares in float32, never in bf16.

    Runs of 1,024 elements are reduced in float32 and their sums in float64: torch's float32 ``vector_norm`` over one
    long run is off by 5e-4 at 8 million elements on a CPU (measured, torch 2.13), since it adds in sequence.
    """
    v = v.reshape(v.shape[0], v.shape[1:].numel())
    if v.dtype == torch.float64:
        return v.square().sum(1)
    whole = v.shape[1] // _RUN * _RUN
    runs = torch.linalg.vector_norm(v[:, :whole].unflatten(1, (-1, _RUN)), dim=2, dtype=torch.float32)
    rest = torch.linalg.vector_norm(v[:, whole:], dim=1, dtype=torch.float32)
    return runs.double().square_().sum(1) + rest.double().square_()


def linear_sq_norm(x: Tensor, g: Tensor, method: Method | Literal["auto"] = "auto") -> Tensor:
    """Squared norm of each example's weight gradient.

    Args:
        x: ``[B, T, p]`` the layer's input, any floating dtype.
        g: ``[B, T, d]`` the gradient of its output, same dtype.
        method: see the module's table; ``"auto"`` takes the cheaper of gram and feature tiles.

    Returns:
        ``[B]`` float64 (float32 squares summed in float64). inf and NaN of an example stay in its own entry.

    Raises:
        ValueError: shapes that do not fit, or an unknown method.
    """
    _check(x, g)
    if x.numel() == 0 or g.numel() == 0:
        return torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)
    if method == "auto":
        method = choose_method(x.shape[1], x.shape[2], g.shape[2])
    if method == "gram":
        return _gram(x, g, gram_tile(x.shape[1]))
    if method == "gram_full":
        return _gram(x, g, x.shape[1])
    if method == "feature":
        return _feature(x, g)
    if method == "materialise":
        return sq_norm(linear_grad(x, g))
    raise ValueError(f"method is {method!r}; expected 'auto', 'gram', 'gram_full', 'feature' or 'materialise'")


def linear_grad(x: Tensor, g: Tensor) -> Tensor:
    """Per-example gradients ``g_i^T x_i``, ``[B, d, p]`` in the inputs' dtype, of ``x [B, T, p]``, ``g [B, T, d]``."""
    return g.mT @ x


def weighted_linear_grad(x: Tensor, g: Tensor, factors: Tensor, out_dtype: torch.dtype) -> Tensor:
    """``sum_i factors_i * g_i^T x_i``; an example whose factor is zero contributes exactly zero, NaN or not.

    Args:
        x: ``[B, T, p]``; g: ``[B, T, d]``.
        factors: ``[B]`` float32 or float64, finite.
        out_dtype: dtype of the result; the factors are applied and summed in at least float32.

    Returns:
        ``[d, p]`` in ``out_dtype``.
    """
    batch, seq_len, p = x.shape
    d = g.shape[2]
    if x.numel() == 0 or g.numel() == 0:
        return x.new_zeros((d, p), dtype=out_dtype)
    sum_dtype = torch.float64 if out_dtype == torch.float64 else torch.float32
    dropped = factors == 0
    if batch * seq_len * (p + d) <= 2 * d * p and batch > 1:
        # Many short examples: one product over all tokens, of copies that are smaller than the result.
        drop = dropped.view(-1, 1, 1)
        scaled = (x.to(sum_dtype) * factors.view(-1, 1, 1).to(sum_dtype)).masked_fill_(drop, 0)
        kept = g.to(sum_dtype).masked_fill(drop, 0)
        return (kept.reshape(-1, d).mT @ scaled.reshape(-1, p)).to(out_dtype)
    total: Tensor | None = None
    for i in range(batch):
        # The same product that a norm is taken of, then the factor: what is released is c_i times what was measured.
        grad = (g[i].mT @ x[i]).to(sum_dtype)
        grad = grad.mul_(factors[i].to(sum_dtype)).masked_fill_(dropped[i], 0)
        total = grad if total is None else total.add_(grad)
    assert total is not None
    return total.to(out_dtype)
