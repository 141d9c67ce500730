"""A language model's head and its cross-entropy, computed in chunks of tokens: no ``[B, T, V]`` in float32.

The logits of a chunk are computed, overwritten by their own gradient g, used in the products below, and freed. The
products are those of plain training, each computed once: ``h W^T`` for the logits, ``g W`` for the gradient of h, and
``g_i^T h_i`` for the gradient of W. For the last, either the per-example products are kept or g itself in the model's
dtype, whichever is smaller.

Shapes: B examples, T tokens, D features, V tokens of the vocabulary; h ``[B, T, D]``, W ``[V, D]``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpft.kernels.impl import on_gpu

# Tokens per chunk. On a CPU the chunk's logits should stay close to the caches; a GPU needs products large enough to
# fill it, and reads and writes the [V, D] gradient once per chunk, which 2,048 tokens amortise.
CPU_CHUNK, GPU_CHUNK = 256, 2048
# Logits, elements, that a CPU turns into their gradient at a time: they stay in a core's cache (1 MiB).
_CACHED = 1 << 18
# Rows of the weight's gradient computed by one low-precision product, which is then accumulated in float32.
_ROWS = 8192


@dataclass
class HeadProducts:
    """Results of one chunked forward.

    Attributes:
        losses: ``[B]`` float32 (float64 for float64 inputs), the mean over an example's own unmasked tokens; 0 where
            there are none.
        dh: ``[B, T, D]`` in h's dtype, the gradient of each example's loss; None if not requested.
        weight: ``[B, V, D]`` float32 (float64), per-example gradients of the weight; or None.
        g: ``[B, T, V]`` in h's dtype, the gradient of the logits; or None.
        bias: ``[B, V]`` float32 (float64), per-example gradients of the bias; or None.
    """

    losses: Tensor
    dh: Tensor | None = None
    weight: Tensor | None = None
    g: Tensor | None = None
    bias: Tensor | None = None


def auto_chunk(device: torch.device) -> int:
    """The default number of tokens per chunk."""
    return CPU_CHUNK if device.type == "cpu" else GPU_CHUNK


def keeps_weight_gradient(seq_len: int, dim: int, itemsize: int) -> bool:
    """Whether an example's ``[V, D]`` in float32 is smaller than its ``g [T, V]`` in a dtype of ``itemsize`` bytes."""
    return max(itemsize, 4) * dim <= itemsize * seq_len


@torch.no_grad()
def chunked_head_loss(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    chunk: int,
    *,
    ignore_index: int = -100,
    need_dh: bool = False,
    need_weight: bool = False,
    need_bias: bool = False,
) -> HeadProducts:
    """Per-example losses of a linear head, and their gradients where requested.

    Args:
        h: ``[B, T, D]``, the head's input.
        weight: ``[V, D]`` in h's dtype.
        bias: ``[V]`` in h's dtype, or None.
        targets: ``[B, T]`` int64; ``ignore_index`` where there is nothing to predict.
        chunk: tokens per chunk, >= 1. It affects the result only by rounding.
        ignore_index: label of masked positions: their gradient is exactly zero, whatever their logits.
        need_dh: whether to compute the gradient of h.
        need_weight: whether to compute per-example gradients of the weight: :attr:`HeadProducts.weight` or, if that
            is smaller, :attr:`HeadProducts.g`.
        need_bias: whether to compute per-example gradients of the bias.

    Raises:
        ValueError: the shapes do not match, or ``chunk`` is below 1.
    """
    if h.dim() != 3 or targets.shape != h.shape[:2] or weight.shape[1:] != h.shape[2:] or chunk < 1:
        raise ValueError(
            f"expected h [B, T, D], weight [V, D], targets [B, T] and chunk >= 1, got h {list(h.shape)}, weight "
            f"{list(weight.shape)}, targets {list(targets.shape)} and chunk {chunk}"
        )
    batch, seq_len, dim = h.shape
    vocab = weight.shape[0]
    wide = torch.promote_types(h.dtype, torch.float32)
    products = HeadProducts(torch.zeros(batch, dtype=wide, device=h.device))
    if need_dh:
        products.dh = torch.empty_like(h, memory_format=torch.contiguous_format)
    if need_weight and keeps_weight_gradient(seq_len, dim, h.element_size()):
        products.weight = torch.zeros((batch, vocab, dim), dtype=wide, device=h.device)
    elif need_weight:
        products.g = torch.empty((batch, seq_len, vocab), dtype=h.dtype, device=h.device)
    if need_bias:
        products.bias = torch.zeros((batch, vocab), dtype=wide, device=h.device)
    valid = targets != ignore_index
    share = valid.to(wide) / valid.sum(1, keepdim=True).clamp(min=1)  # weight of each token in its example's mean
    lost = torch.empty((batch, seq_len), dtype=wide, device=h.device)
    # Per-example sums need one example at a time; otherwise a chunk may span several examples.
    whole = products.weight is None and products.bias is None
    flat = [t.reshape(1, -1, *t.shape[2:]) if whole else t for t in (h, targets, valid, share, lost)]
    flat_shape = (batch * seq_len, vocab)
    grads = need_dh or need_weight or need_bias
    for i, (h_i, targets_i, valid_i, share_i, lost_i) in enumerate(zip(*flat, strict=True)):
        for t in range(0, len(h_i), chunk):
            rows = slice(t, t + chunk)
            kept = None if products.g is None else (products.g.view(flat_shape) if whole else products.g[i])[rows]
            z = _logits(h_i[rows], weight, bias, lost.dtype, kept)
            step = len(z) if on_gpu(z) or z.is_meta else max(1, _CACHED // vocab)
            for r in range(0, len(z), step):
                some = slice(t + r, min(t + r + step, t + len(z)))
                _losses_and_gradient(
                    z[r : r + step], targets_i[some], valid_i[some], share_i[some], lost_i[some], grads
                )
            if grads:
                _add_products(products, None if whole else i, rows, z, h_i[rows], weight)
            del z
    products.losses = (lost * share).masked_fill_(~valid, 0).sum(1, dtype=torch.float64).to(wide)
    return products


def _logits(h: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, kept: Tensor | None) -> Tensor:
    """``[c, V]`` in ``dtype``; in the memory of ``kept``, where the gradient will be kept, if that has this dtype."""
    out = kept if kept is not None and kept.dtype == dtype else None
    logits = torch.mm(h, weight.mT, out=out) if bias is None else torch.addmm(bias, h, weight.mT, out=out)
    return logits.to(dtype)


def _losses_and_gradient(
    z: Tensor, targets: Tensor, valid: Tensor, share: Tensor, lost: Tensor, gradient: bool
) -> None:
    """The losses ``lost [c]`` of tokens with logits ``z [c, V]``, which become the gradient of the example's loss."""
    at = targets.where(valid, 0).unsqueeze(1)
    picked = z.gather(1, at).squeeze(1)
    top = z.amax(1)
    total = z.sub_(top.unsqueeze(1)).exp_().sum(1)
    torch.sub(top + total.log(), picked, out=lost)
    if not gradient:
        return
    z.mul_((share / total).unsqueeze(1))
    z.scatter_add_(1, at, -share.unsqueeze(1))
    # A masked token's infinite logits would leave 0 * NaN.
    if on_gpu(z) or z.is_meta:
        z.masked_fill_(~valid.unsqueeze(1), 0)
    else:
        z.index_fill_(0, (~valid).nonzero().squeeze(1), 0)


def _add_products(
    products: HeadProducts, example: int | None, rows: slice, z: Tensor, h: Tensor, weight: Tensor
) -> None:
    """Multiply the gradient of a chunk's logits ``z [c, V]`` into the requested results.

    Args:
        products: changed in place.
        example: index of the example; None: the tokens of all examples are numbered consecutively.
        rows: the chunk's tokens.
        z: ``[c, V]``, the gradient of the chunk's logits.
        h: ``[c, D]``.
        weight: ``[V, D]``.
    """
    g = z.to(h.dtype)
    if products.dh is not None:
        dh = products.dh.flatten(0, 1) if example is None else products.dh[example]
        torch.mm(g, weight, out=dh[rows])
    if products.g is not None and g.dtype != z.dtype:
        (products.g.flatten(0, 1) if example is None else products.g[example])[rows] = g
    if example is None:
        return
    if products.bias is not None:
        products.bias[example] += z.sum(0)
    if products.weight is None:
        return
    grad = products.weight[example]
    if g.dtype == grad.dtype:
        torch.addmm(grad, g.mT, h, out=grad)
        return
    for v in range(0, len(grad), _ROWS):
        grad[v : v + _ROWS] += g[:, v : v + _ROWS].mT @ h


def gradient_rows_at_tokens(grad: Tensor, ids: Tensor, padding_idx: int | None = None) -> Tensor:
    """Rows of per-example gradients ``grad [B, V, D]`` at the tokens ``ids [B, T]``: ``[B, T, D]``.

    Args:
        grad: per-example gradients of the head's weight.
        ids: of the input.
        padding_idx: the embedding's, whose gradient there is zero: so are these rows.
    """
    at = (ids + torch.arange(len(ids), device=ids.device).unsqueeze(1) * grad.shape[1]).flatten()
    rows = grad.flatten(0, 1).index_select(0, at).view(*ids.shape, grad.shape[2])
    return rows if padding_idx is None else rows.masked_fill_((ids == padding_idx).unsqueeze(-1), 0)
