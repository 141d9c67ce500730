"""The reference implementation of the kernels, for tests: float64, materialised, obviously right and slow.

Nothing in dpft imports this file.
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear_grad(x: Tensor, g: Tensor) -> Tensor:
    """Per-example gradient ``g_i^T x_i`` of a linear layer's weight.

    Args:
        x: ``[B, T, p]`` the layer's input.
        g: ``[B, T, d]`` the gradient of its output.

    Returns:
        ``[B, d, p]`` float64.
    """
    return torch.einsum("btd,btp->bdp", g.double(), x.double())


def linear_sq_norm(x: Tensor, g: Tensor) -> Tensor:
    """``||g_i^T x_i||_F^2`` of ``x [B, T, p]`` and ``g [B, T, d]``, as ``[B]`` float64."""
    return linear_grad(x, g).square().sum((1, 2))


def embedding_grad(ids: Tensor, g: Tensor, num_embeddings: int, padding_idx: int | None = None) -> Tensor:
    """Per-example gradient ``[B, V, D]`` float64 of an embedding's weight.

    Args:
        ids: ``[B, T]`` token ids.
        g: ``[B, T, D]`` gradient of the output.
        num_embeddings: V.
        padding_idx: a row that receives no gradient.
    """
    rows = []
    for ids_i, g_i in zip(ids, g, strict=True):
        grad = torch.zeros(num_embeddings, g.shape[-1], dtype=torch.float64, device=g.device)
        for token, g_t in zip(ids_i.tolist(), g_i.double(), strict=True):
            if token != padding_idx:
                grad[token] += g_t
        rows.append(grad)
    return torch.stack(rows) if rows else g.new_zeros((0, num_embeddings, g.shape[-1]), dtype=torch.float64)


def embedding_sq_norm(ids: Tensor, g: Tensor, num_embeddings: int, padding_idx: int | None = None) -> Tensor:
    """Squared norms ``[B]`` float64 of :func:`embedding_grad`."""
    return embedding_grad(ids, g, num_embeddings, padding_idx).square().sum((1, 2))


def tied_sq_norm(
    ids: Tensor, g_embedding: Tensor, h: Tensor, g_head: Tensor, padding_idx: int | None = None
) -> Tensor:
    """Squared norms ``[B]`` float64 of a weight that is both embedding and output head.

    Args:
        ids: ``[B, T]``; g_embedding: ``[B, T, D]``, the gradient of the embedding's output.
        h: ``[B, S, D]``; g_head: ``[B, S, V]``, the gradient of the head's output.
        padding_idx: of the embedding; the head still has a gradient there.
    """
    total = embedding_grad(ids, g_embedding, g_head.shape[-1], padding_idx) + linear_grad(h, g_head)
    return total.square().sum((1, 2))
