"""Sums by which two traversals of one graph are compared: of a site's output gradient, and of its input."""

from __future__ import annotations

import torch
from torch import Tensor


def checksum(g: Tensor) -> Tensor:
    """``[2, B]`` float64: per example the sum of ``g [B, ...]`` and of its absolute values."""
    flat = g.reshape(g.shape[0], g.shape[1:].numel())
    dtype = torch.promote_types(g.dtype, torch.float32)
    return torch.stack([flat.sum(1, dtype=dtype), torch.linalg.vector_norm(flat, 1, dim=1, dtype=dtype)]).double()


def signs(n: int, like: Tensor) -> Tensor:
    """``[n]`` pseudorandom signs 1 and -1, the same every time, on ``like``'s device and in its dtype."""
    bits = (torch.arange(n, device=like.device) * 2654435761 >> 15) & 1
    return (1 - 2 * bits).to(like.dtype)


def input_checksum(x: Tensor) -> Tensor:
    """``[2, B]`` float64 of ``x [B, T, ...]``: a sum with signs over tokens and features, and a bound on it."""
    rows = x @ signs(x.shape[2], x) if x.is_floating_point() else x.double().cos()
    sizes = torch.linalg.vector_norm(x, dim=2) if x.is_floating_point() else torch.ones_like(rows)
    rows = rows.double()
    return torch.stack([(rows * signs(x.shape[1], rows)).sum(1), sizes.sum(1, dtype=torch.float64)])
