"""Linear layers: per-example squared gradient norms ``sq_i = ||g_i^T x_i||_F^2``, and weighted gradients.

Four exact methods compute the same norm (see ``docs/design.md``):

============  =====================  ==============================  ============================
method        FLOPs per example      extra memory                    cheapest when
============  =====================  ==============================  ============================
gram          ``T^2 (p + d)``        one tile of several examples    ``T < p d / (p + d)``
feature       ``2 T p d``            one tile of several examples    ``T > p d / (p + d)``
materialise   ``2 T p d``            ``[B, d, p]``                   the gradient is kept anyway
gram_full     ``2 T^2 (p + d)``      ``[T, T]`` twice                never; the published baseline
============  =====================  ==============================  ============================

The Gram identity is Goodfellow's (2015, arXiv 1510.01799) for ``T = 1`` and Li et al.'s (2022, arXiv 2110.05679) for
sequences. Squares are accumulated in float32 within a tile and float64 across tiles, whatever the inputs' dtype; Gram
products are computed in float64.

With ``impl="triton"`` the same functions run :mod:`dpft.kernels.triton`, where the tiles stay in registers.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dpft.errors import KernelError
from dpft.kernels.impl import Impl, on_gpu, resolve_impl

Method = Literal["gram", "gram_full", "feature", "materialise"]

# Elements of one product tile on a CPU (float32: 2 MiB). *Measured*, 2 cores, widths 512 to 4,096: half or twice as
# many elements take the same time, within the spread of the measurement, as long as no edge is below 512; an edge of
# 128 costs 10 to 40 %.
TILE_ELEMENTS = 1 << 19
GRAM_TILE = 256
_EDGE = 512
# Not measured: 256 blocks of 128 x 128 are two waves on the multiprocessors of one large GPU.
_CUDA_EDGE = 2048
_RUN = 1024


def _check(x: Tensor, g: Tensor) -> None:
    if x.dim() != 3 or g.dim() != 3 or x.shape[:2] != g.shape[:2]:
        raise ValueError(
            f"expected x [B, T, p] and g [B, T, d] with equal B and T, got x {list(x.shape)} and g {list(g.shape)}"
        )
    if x.dtype != g.dtype or x.device != g.device or not x.is_floating_point():
        raise ValueError(
            f"expected x and g of one floating dtype on one device, got x {x.dtype} on {x.device} and g {g.dtype} on "
            f"{g.device}"
        )


def gram_tile(seq_len: int) -> int:
    """Edge of the square tiles into which the gram method splits ``seq_len`` tokens."""
    return max(16, min(GRAM_TILE, -(-seq_len // 4)))


def method_flops(method: Method, seq_len: int, p: int, d: int) -> int:
    """FLOPs (multiply and add counted as two) of one example's squared norm by ``method``."""
    if method == "gram":
        tile = gram_tile(seq_len)
        full, rest = divmod(seq_len, tile)
        return (p + d) * (seq_len * seq_len + full * tile * tile + rest * rest)
    if method == "gram_full":
        return 2 * seq_len * seq_len * (p + d)
    return 2 * seq_len * p * d


def gram_cost(itemsize: int, gpu: bool) -> float:
    """Cost of a FLOP of the Gram method (float64) relative to one of a product in a dtype of ``itemsize`` bytes.

    For 16-bit products on a GPU the ratio of an H100's data sheet (989 to 67 TFLOP/s); otherwise that of float64's and
    float32's widths.
    """
    return 15.0 if gpu and itemsize == 2 else 2.0


def choose_method(seq_len: int, p: int, d: int, cost: float = 2.0) -> Method:
    """The cheaper of gram tiles and feature tiles for ``x [B, T, p]``, ``g [B, T, d]``.

    Compares FLOPs, those of the Gram method multiplied by ``cost`` (:func:`gram_cost`).
    """
    gram, feature = method_flops("gram", seq_len, p, d), method_flops("feature", seq_len, p, d)
    return "gram" if cost * gram < feature else "feature"


def _edge_and_elements(x: Tensor) -> tuple[int, int]:
    """Shortest edge of a product tile, and number of elements of a tile."""
    return (_CUDA_EDGE, 2 * _CUDA_EDGE**2) if on_gpu(x) else (_EDGE, TILE_ELEMENTS)


def _inner_products(a: Tensor, b: Tensor, elements: int) -> Tensor:
    """``a b^T [B, s, t]`` in float64 of ``a [B, s, n]``, ``b [B, t, n]``, converted a few features at a time."""
    out = a.new_zeros((*a.shape[:2], b.shape[1]), dtype=torch.float64)
    step = max(1, elements // (a.shape[0] * a.shape[1]))
    for i in range(0, a.shape[2], step):
        left = a[:, :, i : i + step].double()
        right = left if a is b else b[:, :, i : i + step].double()
        torch.baddbmm(out, left, right.mT, out=out)
    return out


def _gram(x: Tensor, g: Tensor, tile: int) -> Tensor:
    """Sum of ``(x_s . x_t)(g_s . g_t)`` over pairs of tokens, tile by tile, in float64.

    The sum is subject to cancellation: for similar tokens with opposite gradients, its terms are T times its value or
    more, and their rounding errors are similar too, so they add up. *Measured* in float32: up to 0.65 eps (sum_t |x_t|
    |g_t|)^2 too small, which is the whole norm of a gradient that cancels to 1e-3, and with an understated norm a
    contribution exceeds C. In float64 the error is about 1e-9 of that.
    """
    batch = len(x)
    elements = _edge_and_elements(x)[1] // 2  # of float64
    total = torch.zeros(batch, dtype=torch.float64, device=x.device)
    step = max(1, elements // (tile * tile))
    for k in range(0, batch, step):
        xs, gs = x[k : k + step].split(tile, 1), g[k : k + step].split(tile, 1)
        for i in range(len(xs)):
            for j in range(i, len(xs)):
                pair = _inner_products(xs[i], xs[j], elements).mul_(_inner_products(gs[i], gs[j], elements))
                total[k : k + step].add_(pair.sum((1, 2)), alpha=1 if i == j else 2)
    return total.clamp_(min=0.0)


# In units of eps / 2 * sum_t |x_t||g_t|. Products over 3 tokens that cancel to zero were off by 0.3 (*measured*).
_ROUNDING = 32


def rounding_of_product(x: Tensor, g: Tensor) -> Tensor:
    """``[B]`` float64: bound on the rounding error of ``g_i^T x_i``, computed in at least float32.

    If its terms cancel, the computed norm may be 0 while the released gradient is that error times a factor of 1 or
    more.
    """
    sizes = [torch.linalg.vector_norm(t, dim=2, dtype=torch.promote_types(t.dtype, torch.float32)) for t in (x, g)]
    half = torch.finfo(sizes[0].dtype).eps / 2
    return _ROUNDING * half * (sizes[0].double() * sizes[1]).sum(1)


def _feature(x: Tensor, g: Tensor) -> Tensor:
    """Sum of the squares of ``g_i^T x_i`` over tiles as square as possible, each of which is freed at once."""
    batch, _, p = x.shape
    d = g.shape[2]
    edge, elements = _edge_and_elements(x)
    total = torch.zeros(batch, dtype=torch.float64, device=x.device)
    step_p = min(p, edge)
    step = min(batch, max(1, elements // (step_p * min(d, edge))))
    step_d = max(1, elements // (step * step_p))
    for k in range(0, batch, step):
        for i in range(0, d, step_d):
            g_T = g[k : k + step, :, i : i + step_d].mT
            for j in range(0, p, step_p):
                total[k : k + step] += sq_norm(torch.bmm(g_T, x[k : k + step, :, j : j + step_p]))
    return total


def sq_norm(v: Tensor) -> Tensor:
    """``[B]`` float64 squared norms of ``v [B, ...]``; squares in float32, never in bf16.

    Runs of 1,024 elements are reduced in float32 and their sums in float64: torch's float32 ``vector_norm`` over one
    long run is off by 5e-4 at 8 million elements on a CPU (measured, torch 2.13), since it sums sequentially.
    """
    v = v.reshape(v.shape[0], v.shape[1:].numel())
    if v.dtype == torch.float64:
        return v.square().sum(1)
    whole = v.shape[1] // _RUN * _RUN
    runs = torch.linalg.vector_norm(v[:, :whole].unflatten(1, (-1, _RUN)), dim=2, dtype=torch.float32)
    rest = torch.linalg.vector_norm(v[:, whole:], dim=1, dtype=torch.float32)
    return runs.double().square_().sum(1) + rest.double().square_()


@torch.no_grad()
def linear_sq_norm(x: Tensor, g: Tensor, method: Method | Literal["auto"] = "auto", impl: Impl = "auto") -> Tensor:
    """Squared norm of each example's weight gradient.

    Args:
        x: ``[B, T, p]`` the layer's input, any floating dtype and strides; it is not copied.
        g: ``[B, T, d]`` the gradient of its output, same dtype.
        method: see the module's table; ``"auto"`` takes the cheaper of gram and feature tiles.
        impl: ``"torch"`` (any device), ``"triton"`` (CUDA; float32, bfloat16, float16), or ``"auto"``, see
            :func:`dpft.kernels.resolve_impl`. One requested by name is never replaced.

    Returns:
        ``[B]`` float64 (float32 squares summed in float64). inf and NaN of an example affect only its own entry.

    Raises:
        ValueError: the shapes do not match, or the method or ``impl`` is unknown, or ``impl`` lacks the method.
        KernelError: ``impl="triton"`` cannot run here.
    """
    _check(x, g)
    taken, _ = resolve_impl(x, impl)
    if method in ("auto", "gram", "gram_full") and _rounds_inputs(x):
        if method != "auto":
            raise ValueError(
                f"method={method!r} multiplies x and g unrounded, and the gradient will be computed in TF32, which "
                "rounds them first. Call torch.set_float32_matmul_precision('highest'), or use another method."
            )
        method = "feature"  # multiplies the same rounded numbers as the gradient
    if taken == "triton" and method == "feature" and _rounds_inputs(x):
        raise KernelError(
            "impl='triton' multiplies float32 unrounded, and the gradient will be computed in TF32, which rounds it "
            "first. Call torch.set_float32_matmul_precision('highest'), or use impl='torch'."
        )
    if method == "auto":
        method = choose_method(x.shape[1], x.shape[2], g.shape[2], gram_cost(x.element_size(), on_gpu(x)))
    if method not in ("gram", "gram_full", "feature", "materialise"):
        raise ValueError(f"method is {method!r}; expected 'auto', 'gram', 'gram_full', 'feature' or 'materialise'")
    if taken == "triton":
        from dpft.kernels import triton as fused

        if method == "materialise":
            return fused.grad_sq_norm(x, g, x.dtype)[1]
        if method == "gram_full":
            raise ValueError("method 'gram_full' has no Triton kernel: use impl='torch', or method='gram'")
        return fused.gram_sq_norm(x, g) if method == "gram" else fused.feature_sq_norm(x, g)
    if x.numel() == 0 or g.numel() == 0:
        return torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)
    if method == "gram":
        return _gram(x, g, gram_tile(x.shape[1]))
    if method == "gram_full":
        return _gram(x, g, x.shape[1])
    return _feature(x, g) if method == "feature" else sq_norm(linear_grad(x, g))


def linear_grad_sq_norm(
    x: Tensor, g: Tensor, dtype: torch.dtype | None = None, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """Per-example gradients, and the squared norms of exactly the returned values.

    Args:
        x: ``[B, T, p]``; g: ``[B, T, d]`` in the same dtype.
        dtype: of the gradients; None: the inputs'. ``"torch"`` computes the product in the inputs' dtype first.
        impl: as for :func:`linear_sq_norm`; ``"triton"`` does it in one kernel, rounding float32 sums once.

    Returns:
        ``[B, d, p]`` in ``dtype``, and ``[B]`` float64.

    Raises:
        ValueError: the shapes do not match, or ``impl`` is unknown.
        KernelError: ``impl="triton"`` cannot run here.
    """
    _check(x, g)
    dtype = x.dtype if dtype is None else dtype
    taken, _ = resolve_impl(x, impl)
    if taken == "triton":
        from dpft.kernels import triton as fused

        return fused.grad_sq_norm(x, g, dtype)
    grad = linear_grad(x, g).to(dtype)
    return grad, sq_norm(grad)


def linear_grad(x: Tensor, g: Tensor) -> Tensor:
    """Per-example gradients ``g_i^T x_i``, ``[B, d, p]`` in the inputs' dtype, of ``x [B, T, p]``, ``g [B, T, d]``."""
    return g.mT @ x


def _rounds_inputs(x: Tensor) -> bool:
    """Whether products of float32 tensors on x's device round their inputs (TF32)."""
    return x.is_cuda and x.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"


def _wide_product(g: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """``g^T x`` of ``g [T, d]``, ``x [T, p]`` in float32 or float64, without rounding to 16 bits in between.

    Two passes release c_i times this product, but take the norm from another one: the norm has to be enlarged for
    every rounding that happens here.
    """
    if x.dtype == dtype:
        return g.mT @ x
    if (on_gpu(x) or x.is_meta) and dtype == torch.float32:
        return torch.mm(g.mT, x, out_dtype=dtype)
    total = torch.zeros((g.shape[1], x.shape[1]), dtype=dtype, device=x.device)
    for t in range(0, len(x), _RUN):  # copies only a few tokens at a time
        torch.addmm(total, g[t : t + _RUN].to(dtype).mT, x[t : t + _RUN].to(dtype), out=total)
    return total


def weighted_linear_grad(x: Tensor, g: Tensor, factors: Tensor, out_dtype: torch.dtype) -> Tensor:
    """``sum_i factors_i * g_i^T x_i``; an example whose factor is zero contributes exactly zero, even if NaN.

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
        grad = _wide_product(g[i], x[i], sum_dtype)
        grad = grad.mul_(factors[i].to(sum_dtype)).masked_fill_(dropped[i], 0)
        total = grad if total is None else total.add_(grad)
    assert total is not None
    return total.to(out_dtype)
