"""The norms of :mod:`dpft.kernels.linear` in Triton: tiles of products, squared and summed in registers.

One program computes one tile of one example and writes one partial sum; the partial sums are added by one reduction in
float64. No atomics and no barriers: for the same tile sizes, results are bitwise reproducible. Tile sizes are
autotuned once per class of shapes and process; with torch.use_deterministic_algorithms fixed ones are used.

Products of float32 are IEEE, never TF32; those of bfloat16 and float16 are exact and accumulated in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError

from dpft.errors import KernelError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# A tensor core truncates what it adds to a large sum, always towards zero, so a sum over many tokens would be too
# small: after this many tokens it is added to a second sum, which is rounded to nearest.
FLUSH = tl.constexpr(4096)
_GROUP = tl.constexpr(8)  # neighbouring programs share this many rows of tiles, for cache hits


class Tiles(NamedTuple):
    """Tile sizes: a program computes ``rows x cols`` of a product, ``depth`` of the summed dimension at a time."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int


# By itemsize; without timing the first is used. Rows are of d, columns of p; the narrow ones are for LoRA.
PRODUCT_TILES = {
    2: (
        Tiles(128, 128, 64, 8, 3),
        Tiles(128, 256, 64, 8, 3),
        Tiles(256, 128, 64, 8, 3),
        Tiles(64, 128, 64, 4, 4),
        Tiles(128, 64, 64, 4, 4),
        Tiles(64, 64, 64, 4, 4),
        Tiles(16, 128, 64, 4, 4),
        Tiles(128, 16, 64, 4, 4),
    ),
    4: (
        Tiles(64, 64, 32, 4, 3),
        Tiles(128, 64, 16, 4, 3),
        Tiles(128, 128, 16, 8, 3),
        Tiles(64, 64, 16, 4, 4),
        Tiles(32, 64, 32, 4, 3),
        Tiles(16, 64, 32, 4, 3),
        Tiles(64, 16, 32, 4, 3),
    ),
}
# Rows and columns are tokens, and equal. The depth of the 16-bit ones enters the error bound of :func:`gram_sq_norm`.
GRAM_TILES = {
    2: (Tiles(64, 64, 32, 8, 4), Tiles(64, 64, 32, 4, 3), Tiles(32, 32, 32, 4, 4)),
    4: (Tiles(64, 64, 16, 4, 2), Tiles(64, 64, 16, 8, 3), Tiles(32, 32, 16, 4, 3)),
}
INTERPRETED_TILES = Tiles(16, 16, 16, 4, 1)


@triton.jit
def _rounded(v: tl.tensor, dtype: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Float32 ``v`` rounded to ``dtype`` (nearest, ties to even), and that value in float32."""
    if dtype == tl.bfloat16:
        # By hand: Triton's interpreter truncates, and the tested code should be the code that runs.
        number = v == v
        bits = tl.where(number, v, 0.0).to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        bits = tl.where(number, bits, 0x7FC00000)
        kept, value = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), bits.to(tl.float32, bitcast=True)
    else:
        kept = v.to(dtype)
        value = kept.to(tl.float32)
    return kept, value


@triton.jit(do_not_specialize=["T", "tiles_d", "tiles_p"])
def _product_kernel(
    x: tl.tensor,
    g: tl.tensor,
    out: tl.tensor,
    partial: tl.tensor,
    T: tl.tensor,
    p: tl.tensor,
    d: tl.tensor,
    x_b: tl.tensor,
    x_t: tl.tensor,
    x_p: tl.tensor,
    g_b: tl.tensor,
    g_t: tl.tensor,
    g_d: tl.tensor,
    tiles_d: tl.tensor,
    tiles_p: tl.tensor,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    EMULATED: tl.constexpr,
) -> None:
    """One tile of one example's ``g_i^T x_i``: written to ``out`` if given, the sum of its squares to ``partial``."""
    pid = tl.program_id(0)
    tiles = tiles_d * tiles_p
    b = (pid // tiles).to(tl.int64)
    tile = pid % tiles
    group = _GROUP * tiles_p
    first = tile // group * _GROUP
    rows_of_group = tl.minimum(tiles_d - first, _GROUP)
    row = (first + tile % group % rows_of_group) * ROWS + tl.arange(0, ROWS)
    col = tile % group // rows_of_group * COLS + tl.arange(0, COLS)
    # Offsets are int64: T * p may exceed 2^31.
    g_row = g + b * g_b + row.to(tl.int64)[:, None] * g_d
    x_col = x + b * x_b + col.to(tl.int64)[None, :] * x_p
    depth = tl.arange(0, DEPTH).to(tl.int64)
    total = tl.zeros([ROWS, COLS], dtype=tl.float32)
    for start in range(0, T, FLUSH):
        recent = tl.zeros([ROWS, COLS], dtype=tl.float32)
        for t in range(start, tl.minimum(start + FLUSH, T), DEPTH):
            at = t + depth
            g_tile = tl.load(g_row + at[None, :] * g_t, mask=(row < d)[:, None] & (at < T)[None, :], other=0.0)
            x_tile = tl.load(x_col + at[:, None] * x_t, mask=(at < T)[:, None] & (col < p)[None, :], other=0.0)
            if EMULATED:
                g_tile, x_tile = g_tile.to(tl.float32), x_tile.to(tl.float32)
            recent = tl.dot(g_tile, x_tile, recent, input_precision="ieee")
        total += recent
    if out is not None:
        kept, total = _rounded(total, out.dtype.element_ty)
        at_row = (b * d + row)[:, None] * p
        tl.store(out + at_row + col[None, :], kept, mask=(row < d)[:, None] & (col < p)[None, :])
    tl.store(partial + pid, tl.sum(tl.sum(total * total, axis=1).to(tl.float64), axis=0))


@triton.jit
def _inner_products(
    v: tl.tensor,
    row: tl.tensor,
    col: tl.tensor,
    T: tl.tensor,
    n: tl.tensor,
    v_t: tl.tensor,
    v_n: tl.tensor,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    EMULATED: tl.constexpr,
    WIDE: tl.constexpr,
) -> tl.tensor:
    """``[BLOCK, BLOCK]`` float64 inner products of the tokens ``row`` and ``col`` of one example."""
    v_row = v + row.to(tl.int64)[:, None] * v_t
    v_col = v + col.to(tl.int64)[None, :] * v_t
    depth = tl.arange(0, DEPTH).to(tl.int64)
    high = tl.zeros([BLOCK, BLOCK], dtype=tl.float64 if WIDE else tl.float32)
    low = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    for k in range(0, n, DEPTH):
        at = k + depth
        left = tl.load(v_row + at[None, :] * v_n, mask=(row < T)[:, None] & (at < n)[None, :], other=0.0)
        right = tl.load(v_col + at[:, None] * v_n, mask=(at < n)[:, None] & (col < T)[None, :], other=0.0)
        if WIDE:
            high = tl.dot(left.to(tl.float64), right.to(tl.float64), high, out_dtype=tl.float64)
        else:
            if EMULATED:
                left, right = left.to(tl.float32), right.to(tl.float32)
            part = tl.dot(left, right, input_precision="ieee")
            # Knuth's two-sum keeps the error of every addition, so the error bound is free of the number of parts.
            added = high + part
            back = added - high
            low += (high - (added - back)) + (part - back)
            high = added
    return high.to(tl.float64) + low.to(tl.float64)


@triton.jit(do_not_specialize=["T", "blocks"])
def _gram_kernel(
    x: tl.tensor,
    g: tl.tensor,
    partial: tl.tensor,
    T: tl.tensor,
    p: tl.tensor,
    d: tl.tensor,
    x_b: tl.tensor,
    x_t: tl.tensor,
    x_p: tl.tensor,
    g_b: tl.tensor,
    g_t: tl.tensor,
    g_d: tl.tensor,
    blocks: tl.tensor,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    EMULATED: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """Sum of ``(x_s . x_t)(g_s . g_t)`` over one pair of blocks of tokens of one example, and its mirror image."""
    pid = tl.program_id(0)
    pairs = blocks * (blocks + 1) // 2
    b = (pid // pairs).to(tl.int64)
    # The triangle of pairs folded into a rectangle: its rows k and blocks-1-k together have blocks+1 pairs.
    k = pid % pairs // (blocks + 1)
    place = pid % pairs % (blocks + 1)
    upper = place < blocks - k
    i = tl.where(upper, k, blocks - 1 - k)
    j = tl.where(upper, k + place, place - 1)
    row, col = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    product = _inner_products(x + b * x_b, row, col, T, p, x_t, x_p, BLOCK, DEPTH, EMULATED, WIDE)
    product *= _inner_products(g + b * g_b, row, col, T, d, g_t, g_d, BLOCK, DEPTH, EMULATED, WIDE)
    pair = tl.sum(tl.sum(product, axis=1), axis=0)
    tl.store(partial + pid, tl.where(i == j, pair, 2 * pair))


INTERPRETED = not isinstance(_gram_kernel, triton.JITFunction)
_chosen: dict[tuple[object, ...], Tiles] = {}


def _milliseconds(launch: Callable[[Tiles], Tensor], tiles: Tiles) -> float:
    """Time of ten launches. Triton's do_bench allocates 256 MiB, too much for a step near the memory limit."""
    try:
        launch(tiles)  # compiles
    except (OutOfResources, PTXASError):  # these tiles need a larger device
        return float("inf")
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(10):
        launch(tiles)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _run(name: str, x: Tensor, g: Tensor, choices: tuple[Tiles, ...], launch: Callable[[Tiles], Tensor]) -> Tensor:
    """``[B]`` float64 sums of the partial sums ``[B, n]`` that ``launch`` returns for the fastest tiles."""
    with torch.cuda.device_of(x):
        if INTERPRETED:
            return launch(INTERPRETED_TILES).sum(1)
        if torch.are_deterministic_algorithms_enabled():
            return launch(choices[0]).sum(1)
        batch, seq_len, p = x.shape
        # T in powers of four, B in powers of two: a new length does not mean a new measurement.
        sizes = (p, g.shape[2], min(batch, 8).bit_length(), min(seq_len.bit_length(), 15) // 2)
        key = (name, x.device, x.dtype, x.stride(2) == 1, g.stride(2) == 1, *sizes)
        if key not in _chosen:
            times = {tiles: _milliseconds(launch, tiles) for tiles in choices}
            _chosen[key] = min(times, key=times.__getitem__)
            if times[_chosen[key]] == float("inf"):
                raise KernelError(
                    f"{x.device} has too little shared memory for any tiles of the {name} kernel in {x.dtype}: use "
                    "impl='torch'"
                )
        return launch(_chosen[key]).sum(1)


def _check(x: Tensor, g: Tensor) -> None:
    if x.dtype not in DTYPES or g.dtype != x.dtype or g.device != x.device:
        raise KernelError(
            "the Triton kernels take x and g in one of float32, bfloat16 and float16 on one device, got x in "
            f"{x.dtype} on {x.device} and g in {g.dtype} on {g.device}: use impl='torch', or convert them"
        )


def _product(name: str, x: Tensor, g: Tensor, out: Tensor | None) -> Tensor:
    _check(x, g)
    batch, seq_len, p = x.shape
    d = g.shape[2]
    if batch == 0 or seq_len == 0 or p == 0 or d == 0:
        if out is not None:
            out.zero_()
        return torch.zeros(batch, dtype=torch.float64, device=x.device)

    def launch(tiles: Tiles) -> Tensor:
        tiles_d, tiles_p = triton.cdiv(d, tiles.rows), triton.cdiv(p, tiles.cols)
        partial = torch.empty((batch, tiles_d * tiles_p), dtype=torch.float64, device=x.device)
        _product_kernel[(partial.numel(),)](
            x,
            g,
            out,
            partial,
            seq_len,
            p,
            d,
            *x.stride(),
            *g.stride(),
            tiles_d,
            tiles_p,
            ROWS=tiles.rows,
            COLS=tiles.cols,
            DEPTH=tiles.depth,
            EMULATED=INTERPRETED and x.dtype == torch.bfloat16,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        return partial

    return _run(name, x, g, PRODUCT_TILES[x.element_size()], launch)


def feature_sq_norm(x: Tensor, g: Tensor) -> Tensor:
    """``||g_i^T x_i||_F^2`` by tiles of the product, which stay in registers.

    An element of the product is off by at most 2^-23 (4,608 + T / 8,192) sum_t |g_td x_tp|, reached if every addition
    of a tensor core were truncated in the same direction. In the interpreter, norms of random inputs agree with
    float64 to 1e-7; the compiled kernels have not been measured yet.

    Args:
        x: ``[B, T, p]`` float32, bfloat16 or float16, any strides; g: ``[B, T, d]`` alike.

    Returns:
        ``[B]`` float64.

    Raises:
        KernelError: another dtype, or no tiles that fit the device.
    """
    return _product("feature", x, g, None)


def grad_sq_norm(x: Tensor, g: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Per-example gradients ``[B, d, p]`` in ``dtype``, and ``[B]`` float64 squared norms of exactly these values.

    Sums in float32 as in :func:`feature_sq_norm`, rounded once to ``dtype`` (one of :data:`DTYPES`); same errors.
    """
    if dtype not in DTYPES:
        raise KernelError(f"the Triton kernel writes float32, bfloat16 or float16, not {dtype}: use impl='torch'")
    out = torch.empty((x.shape[0], g.shape[2], x.shape[2]), dtype=dtype, device=x.device)
    return out, _product("materialise", x, g, out)


def _gram_slack(x: Tensor, g: Tensor, depth: int) -> Tensor:
    """``[B]`` bound on how much 16-bit Gram products understate the sum, which :func:`gram_sq_norm` adds to it.

    A part adds ``depth`` exact products. Let each of its additions lose up to 2^-23 of the sum of magnitudes
    (truncated, not rounded), plus one for every eight for the alignment of a block in tensor cores: 9/8 depth 2^-23.
    Adding up the parts with their errors kept loses less than 2^-24. So an inner product is off by at most
    e |x_s| |x_t| with e = 5/4 depth 2^-23 (Cauchy-Schwarz), a term of the sum by (2 e + e^2) |x_s| |x_t| |g_s| |g_t|,
    and all terms together by (2 e + e^2) (sum_t |x_t| |g_t|)^2. The factor 1 + 2^-8 covers this bound's own rounding.
    """
    e = 1.25 * depth * 2.0**-23
    norms = [torch.linalg.vector_norm(v, dim=2, dtype=torch.float32).double() for v in (x, g)]
    return (norms[0] * norms[1]).sum(1).square() * ((2 * e + e * e) * (1 + 2.0**-8))


def gram_sq_norm(x: Tensor, g: Tensor) -> Tensor:
    """``||g_i^T x_i||_F^2`` by tiles of the two Gram matrices' upper triangle, which stay in registers.

    The sum is subject to cancellation (see ``dpft.kernels.linear``) and must not be understated. Float32 inputs are
    multiplied in float64, as there. 16-bit inputs are multiplied on tensor cores, and a bound on their error is added:
    at most 1e-5 (sum_t |x_t| |g_t|)^2, so a relative 1e-5 T for the squared norm of T unrelated tokens.

    Args:
        x: ``[B, T, p]`` float32, bfloat16 or float16, any strides; g: ``[B, T, d]`` alike.

    Returns:
        ``[B]`` float64.

    Raises:
        KernelError: another dtype, or no tiles that fit the device.
    """
    _check(x, g)
    batch, seq_len, p = x.shape
    d = g.shape[2]
    if batch == 0 or seq_len == 0 or p == 0 or d == 0:
        return torch.zeros(batch, dtype=torch.float64, device=x.device)
    choices = GRAM_TILES[x.element_size()]
    wide = x.dtype == torch.float32

    def launch(tiles: Tiles) -> Tensor:
        blocks = triton.cdiv(seq_len, tiles.rows)
        partial = torch.empty((batch, blocks * (blocks + 1) // 2), dtype=torch.float64, device=x.device)
        _gram_kernel[(partial.numel(),)](
            x,
            g,
            partial,
            seq_len,
            p,
            d,
            *x.stride(),
            *g.stride(),
            blocks,
            BLOCK=tiles.rows,
            DEPTH=tiles.depth,
            EMULATED=INTERPRETED and not wide,
            WIDE=wide,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        return partial

    total = _run("gram", x, g, choices, launch)
    if not wide:
        total += _gram_slack(x, g, max(tiles.depth for tiles in choices))
    return total.clamp_(min=0.0)
