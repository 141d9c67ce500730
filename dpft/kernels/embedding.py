"""Embedding layers, also tied to the output head: per-example squared gradient norms, and weighted gradients.

An embedding's per-example gradient has one nonzero row per distinct token: the sum of the output's gradients over that
token's positions. The norms take O(T D) work and need neither ``[T, T]`` nor ``[B, V, D]``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dpft.kernels.linear import edge_and_elements, sq_norm


def _masked(ids: Tensor, padding_idx: int | None) -> Tensor | None:
    return None if padding_idx is None else (ids == padding_idx).unsqueeze(-1)


def _segments(ids: Tensor) -> Tensor:
    """``[B, T]`` index in 0..T-1 of the distinct token at each position, without a device synchronisation."""
    ordered, order = ids.sort(dim=1)
    starts = torch.zeros_like(ordered)
    starts[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).to(starts.dtype)
    return torch.empty_like(ids).scatter_(1, order, starts.cumsum(1))


def embedding_sq_norm(ids: Tensor, g: Tensor, padding_idx: int | None = None) -> Tensor:
    """Squared norm of each example's embedding gradient.

    Args:
        ids: ``[B, T]`` int64 token ids.
        g: ``[B, T, D]`` gradient of the output.
        padding_idx: a token whose row receives no gradient.

    Returns:
        ``[B]`` float64.
    """
    batch, seq_len, dim = g.shape
    total = torch.zeros(batch, dtype=torch.float64, device=g.device)
    if g.numel() == 0:
        return total
    rows = (_segments(ids) + torch.arange(batch, device=ids.device).unsqueeze(1) * seq_len).reshape(-1)
    dtype = torch.float64 if g.dtype == torch.float64 else torch.float32
    skip = _masked(ids, padding_idx)
    step = max(1, edge_and_elements(g)[1] // (batch * seq_len))
    for i in range(0, dim, step):
        block = g[:, :, i : i + step].to(dtype)
        if skip is not None:
            block = block.masked_fill(skip, 0)
        summed = block.new_zeros((batch * seq_len, block.shape[2])).index_add_(0, rows, block.flatten(0, 1))
        total += sq_norm(summed.view(batch, -1))
    return total


def add_embedding_grad(out: Tensor, ids: Tensor, g: Tensor, padding_idx: int | None = None) -> Tensor:
    """Add each example's embedding gradient to ``out [B, V, D]`` in place; ``ids [B, T]``, ``g [B, T, D]``."""
    skip = _masked(ids, padding_idx)
    rows = _rows_of_all(ids, out.shape[1]).view(ids.shape)
    for tokens in _spans(g):
        part = g[:, tokens].to(out.dtype)
        part = part if skip is None else part.masked_fill(skip[:, tokens], 0)
        out.view(-1, out.shape[2]).index_add_(0, rows[:, tokens].flatten(), part.reshape(-1, g.shape[2]))
    return out


def _spans(g: Tensor) -> list[slice]:
    """Tokens of ``g [B, T, D]`` that are converted at a time."""
    step = max(1, edge_and_elements(g)[1] // max(1, 4 * len(g) * g.shape[2]))
    return [slice(t, t + step) for t in range(0, g.shape[1], step)]


def _rows_of_all(ids: Tensor, vocab: int) -> Tensor:
    """``[B T]`` rows of a flattened ``[B V, D]`` that ``ids [B, T]`` are of ``[B, V, D]``."""
    return (ids + torch.arange(len(ids), device=ids.device).unsqueeze(1) * vocab).flatten()


def weighted_embedding_grad(
    ids: Tensor, g: Tensor, factors: Tensor, out: Tensor, padding_idx: int | None = None, finite: bool = False
) -> Tensor:
    """Add ``sum_i factors_i * grad_i`` to ``out [V, D]`` (float32 or float64) in place.

    An example whose factor is zero contributes exactly zero, even if its gradient is NaN; ``finite``: none is.
    """
    skip = _masked(ids, padding_idx)
    drop = factors == 0
    step = max(1, edge_and_elements(g)[1] // max(1, g[0].numel())) if len(ids) else 1
    for i in range(0, len(ids), step):
        chunk = slice(i, i + step)
        for tokens in _spans(g[chunk]):
            rows = g[chunk, tokens].to(out.dtype) * factors[chunk].to(out.dtype).view(-1, 1, 1)
            if not finite:
                rows.masked_fill_(drop[chunk].view(-1, 1, 1), 0)
            if skip is not None:
                rows.masked_fill_(skip[chunk, tokens], 0)
            out.index_add_(0, ids[chunk, tokens].flatten(), rows.flatten(0, 1))
            del rows  # before the next ones
    return out


def head_rows_at_tokens(ids: Tensor, h: Tensor, g_head: Tensor, padding_idx: int | None = None) -> Tensor:
    """Rows of the head's per-example gradient at the tokens of the input, ``m_t = sum_s g_head[s, ids_t] h_s``.

    The inner product of a tied weight's two gradients is ``sum_t <g_embedding_t, m_t>``; its squared norm is the
    embedding's plus the head's plus twice that inner product.

    Args:
        ids: ``[B, T]``; h: ``[B, S, D]``; g_head: ``[B, S, V]``.
        padding_idx: the embedding's, whose gradient there is zero: so are these rows.

    Returns:
        ``[B, T, D]`` in float32 (float64 for float64 inputs).
    """
    batch, seq_len = ids.shape
    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    out = torch.empty((batch, seq_len, h.shape[2]), dtype=dtype, device=h.device)
    # Tokens of all examples whose columns are copied at a time.
    step = max(1, edge_and_elements(h)[1] // max(1, h.shape[1]))
    many = max(1, step // max(1, seq_len))
    for i in range(0, batch, many):
        some = slice(i, i + many)
        for t in range(0, seq_len, step):
            at = ids[some, None, t : t + step]
            columns = g_head[some].gather(2, at.expand(-1, h.shape[1], -1))
            out[some, t : t + step] = columns.to(dtype).mT @ h[some].to(dtype)
    skip = _masked(ids, padding_idx)
    return out if skip is None else out.masked_fill_(skip, 0)


def tied_cross_term(rows_of: Callable[[slice], Tensor], ids: Tensor, g: Tensor, padding_idx: int | None) -> Tensor:
    """``[B]`` float64, twice the inner product of a head's gradient and a tied embedding's.

    Args:
        rows_of: of some tokens the rows ``[B, t, D]`` of the head's gradient, which are made as they are needed.
        ids: ``[B, T]``; g: ``[B, T, D]``, of the embedding.
        padding_idx: the embedding's.
    """
    total = torch.zeros(len(g), dtype=torch.float64, device=g.device)
    for tokens in _spans(g):
        products = rows_of(tokens).double() * g[:, tokens]
        if padding_idx is not None:
            products.masked_fill_((ids[:, tokens] == padding_idx).unsqueeze(-1), 0)
        total += products.sum((1, 2))
    return 2 * total
