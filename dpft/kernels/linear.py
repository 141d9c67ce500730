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

Squares are accumulated in float32 within a tile and float64 across tiles, whatever the inputs' dtype. The Gram method,
its rounding errors and what is done about them: :mod:`dpft.kernels.gram`.

With ``impl="triton"`` the same functions run :mod:`dpft.kernels.triton`, where the tiles stay in registers.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dpft.errors import KernelError
from dpft.kernels.devices import double_cost
from dpft.kernels.gram import GramSums, InputCache, gram_double, gram_single, gram_tile, in_double, token_sizes
from dpft.kernels.impl import Impl, on_gpu, resolve_impl

Method = Literal["gram", "gram_full", "feature", "materialise"]

# Elements of one product tile on a CPU (float32: 2 MiB). *Measured*, 2 cores, widths 512 to 4,096: half or twice as
# many elements take the same time, within the spread of the measurement, as long as no edge is below 512; an edge of
# 128 costs 10 to 40 %.
TILE_ELEMENTS = 1 << 19
_EDGE = 512
# A norm may be computed from tiles rounded to 16 bits, a relative error of at most u = 2^-8 per entry (bf16), and the
# weighted sum in float32: the norm is understated by at most a factor of 1 - u.
LOW_PRECISION_SLACK = 1 / (1 - 2.0**-8) - 1
# Not measured: 256 blocks of 128 x 128 are two waves on the multiprocessors of one large GPU.
_CUDA_EDGE = 2048
_RUN = 1024
# Time of a FLOP of the Gram method (small products, and what is done with them) relative to one of a large product;
# *measured* on a CPU: 1.1 to 1.4.
_GRAM_COST = 1.25


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


def method_flops(method: Method, seq_len: int, p: int, d: int) -> int:
    """FLOPs (multiply and add counted as two) of one example's squared norm by ``method``."""
    if method == "gram":
        tile = gram_tile(seq_len)
        full, rest = divmod(seq_len, tile)
        return (p + d) * (seq_len * seq_len + full * tile * tile + rest * rest)
    if method == "gram_full":
        return 2 * seq_len * seq_len * (p + d)
    return 2 * seq_len * p * d


def choose_method(seq_len: int, p: int, d: int) -> Method:
    """The cheaper of gram tiles and feature tiles for ``x [B, T, p]``, ``g [B, T, d]``."""
    gram, feature = method_flops("gram", seq_len, p, d), method_flops("feature", seq_len, p, d)
    return "gram" if _GRAM_COST * gram < feature else "feature"


def edge_and_elements(x: Tensor) -> tuple[int, int]:
    """Shortest edge of a product tile, and number of elements of a tile."""
    return (_CUDA_EDGE, 2 * _CUDA_EDGE**2) if on_gpu(x) else (_EDGE, TILE_ELEMENTS)


def _feature(x: Tensor, g: Tensor) -> Tensor:
    """Sum of the squares of ``g_i^T x_i`` over tiles as square as possible, each of which is freed at once."""
    batch, _, p = x.shape
    d = g.shape[2]
    edge, elements = edge_and_elements(x)
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
    if method in ("auto", "gram", "gram_full") and rounds_inputs(x):
        if method != "auto":
            raise ValueError(
                f"method={method!r} multiplies x and g unrounded, and the gradient will be computed in TF32, which "
                "rounds them first. Call torch.set_float32_matmul_precision('highest'), or use another method."
            )
        method = "feature"  # multiplies the same rounded numbers as the gradient
    if taken == "triton" and method == "feature" and rounds_inputs(x):
        raise KernelError(
            "impl='triton' multiplies float32 unrounded, and the gradient will be computed in TF32, which rounds it "
            "first. Call torch.set_float32_matmul_precision('highest'), or use impl='torch'."
        )
    if method == "auto":
        method = choose_method(x.shape[1], x.shape[2], g.shape[2])
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
        return gram_sums(x, g).sq
    if method == "gram_full":
        return gram_double(x, g, edge_and_elements(x)[1] // 2, x.shape[1])
    return _feature(x, g) if method == "feature" else sq_norm(linear_grad(x, g))


def gram_sums(x: Tensor, g: Tensor, inputs: InputCache | None = None) -> GramSums:
    """Gram norms of ``x [B, T, p]``, ``g [B, T, d]``, and a bound on their error; ``inputs``: for x's products."""
    elements = edge_and_elements(x)[1]

    def double(x: Tensor, g: Tensor) -> Tensor:
        return gram_double(x, g, elements // 2, gram_tile(x.shape[1]))  # float64 elements are two

    if in_double(x, g):
        sq = double(x, g)
        return GramSums(sq, torch.zeros_like(sq), token_sizes(x, g))
    slow = on_gpu(x) and double_cost(x.device) > 8
    return gram_single(x, g, elements, _feature if slow else double, inputs)


def upper_sq_norm(
    x: Tensor, g: Tensor, method: Method | None = None, impl: Impl = "auto", inputs: InputCache | None = None
) -> Tensor:
    """``[B]`` float64: not below the squared norm of what :func:`~dpft.kernels.weighted.weighted_linear_grad` sums.

    That product is rounded separately from the one whose norm is taken here. Let S be ``sum_t |x_t||g_t|``. Scaling an
    operand by the clip factor moves a contribution by at most 2^-24 S (16 bits: 2^-16 S), besides the product's own
    error; where its terms cancel, the computed norm may be 0, while the released gradient is that error times a factor
    of 1 or more. So with a norm n of relative error at most u (16 bits: 2^-8) this is

        ((n + a S) / (1 - u))^2 + (b S)^2            a = 2^-23, b = 2^-19 (16 bits: 0, 2^-12)

    Args:
        x: ``[B, T, p]``; g: ``[B, T, d]``.
        method: as for :func:`linear_sq_norm`; None is ``"auto"``.
        impl: as there.
        inputs: remembers what the products of x are.
    """
    auto = method is None and resolve_impl(x, impl)[0] == "torch" and not rounds_inputs(x) and x.numel() and g.numel()
    if auto and choose_method(x.shape[1], x.shape[2], g.shape[2]) == "gram":
        sums = gram_sums(x, g, inputs)
        sq, sizes = sums.sq + sums.error, sums.sizes
    else:
        sq, sizes = linear_sq_norm(x, g, method or "auto", impl), token_sizes(x, g)
    if x.dtype.itemsize < 4:
        return sq * (1 + LOW_PRECISION_SLACK) ** 2 + (2.0**-12 * sizes).square()
    eps = torch.finfo(x.dtype).eps
    return (sq.sqrt() + eps * sizes).square() + (16 * eps * sizes).square()


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


def rounds_inputs(x: Tensor) -> bool:
    """Whether products of float32 tensors on x's device round their inputs (TF32)."""
    return x.is_cuda and x.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
