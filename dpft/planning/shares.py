"""A rank's part in the gradients of an example whose tokens are spread over ranks, without data.

In the place of one-pass's own pass: of each gradient, when it is complete, a rank keeps one share of S in float32
until the norm is known, and two more whole gradients are on their way.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dpft.clipping.passes import BookKeeping, sum_dtype
from dpft.kernels.linear import sq_norm
from dpft.rules.base import full_shape
from dpft.rules.groups import Groups

__all__ = ["SharePass"]

IN_FLIGHT = 2


class SharePass:
    """Keeps shares of gradients.

    Args:
        size: S.
        shared: names of matrices with more than one use, whose gradient is sent when all are added up.
        copies: whether a gradient is put into another order before it is sent: there are several sequence groups.
        batch_size: 1.
        device: meta.
    """

    weighted = probing = False
    groups: Groups | None = None
    row_tokens = 1
    watched: Any = None

    def __init__(self, size: int, shared: set[str], copies: bool, batch_size: int, device: torch.device, keep: str):
        self.batch_size = batch_size
        self.sq = torch.zeros(1, dtype=torch.float64, device=device)
        self._size, self._shared, self._copies = size, shared, copies
        self._parts: dict[str, Tensor] = {}
        self._sent: list[tuple[str, Tensor, Tensor]] = []
        self._shares: dict[str, Tensor] = {}

    def holds(self) -> BookKeeping:
        """As the pass that it stands for."""
        return BookKeeping([self.sq], [*self._parts.values(), *self._shares.values()])

    def vector(self, key: str, grad: Tensor, weight: Tensor) -> None:
        self._add(key, grad[0].to(torch.promote_types(grad.dtype, torch.float32), copy=True))

    def matrix(self, use: Any, x: Tensor, g: Tensor, weight: Tensor) -> None:
        part = use.add_grad(x, g, None)[0].to(sum_dtype(weight)).view(full_shape(weight))
        if use.key in self._shared:
            self._add(use.key, part)
        else:
            self._send(use.key, part)

    def _add(self, key: str, part: Tensor) -> None:
        held = self._parts.get(key)
        self._parts[key] = part if held is None else held + part.view(held.shape)

    def _send(self, key: str, part: Tensor) -> None:
        sent = part.clone() if self._copies else part
        self._sent.append((key, sent, sent.new_empty(math.ceil(sent.numel() / self._size))))
        while len(self._sent) > IN_FLIGHT:
            self._arrive()

    def _arrive(self) -> None:
        key, _, share = self._sent.pop(0)
        self._shares[key] = share

    def finish(self) -> set[str]:
        """Send what is left, and take the norm."""
        for key in list(self._parts):
            self._send(key, self._parts.pop(key))
        while self._sent:
            self._arrive()
        for share in self._shares.values():
            self.sq += sq_norm(share.unsqueeze(0))
        return set()

    def scale(self, factors: Tensor) -> None:
        """Shares are clipped when they are released."""

    def release(self, key: str, weight: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The clipped share ``[numel / S]``, of which the rank's owned part is added to the sums."""
        share = self._shares.pop(key, None)
        return None if share is None else share * 1.0
