"""Sums by which two traversals of one graph are compared: of a site's output gradient, and of its input."""

from __future__ import annotations

import torch
from torch import Tensor

from dpft.kernels.impl import on_gpu

# Elements of 16 bits that a CPU converts to float32 at a time: it has no sum that converts as it reads.
_CONVERTED = 1 << 22


def checksum(g: Tensor) -> Tensor:
    """``[2, B]`` float64: per example the sum of ``g [B, ...]`` and of its absolute values."""
    flat = g.reshape(g.shape[0], g.shape[1:].numel())
    dtype = torch.promote_types(g.dtype, torch.float32)
    step = max(1, flat.shape[1] if dtype == g.dtype or on_gpu(g) else _CONVERTED // max(1, len(flat)))
    total: Tensor | None = None
    for part in flat.split(step, 1):
        sums = (part.sum(1, dtype=dtype), torch.linalg.vector_norm(part, 1, dim=1, dtype=dtype))
        found = torch.stack(sums).double()
        total = found if total is None else total.add_(found)
    assert total is not None
    return total


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
