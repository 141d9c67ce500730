"""The exponential moving average of the trained weights, to be measured; dpft has none, as it does not help here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Average:
    """Of one process; after step t the decay is ``min(decay, (1 + t) / (10 + t))`` (De et al. 2022, arXiv 2204.13650).

    Args:
        model: prepared.
        optimizer: of ``dpft.prepare``.
        decay: in [0, 1).
    """

    def __init__(self, model: nn.Module, optimizer: Any, decay: float) -> None:
        self.decay, self._steps = decay, 0
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._average = [p.detach().clone() for p in self._trained]
        optimizer.optimizer.inner.register_step_post_hook(self._update)

    @torch.no_grad()
    def _update(self, *_: Any) -> None:
        decay = min(self.decay, (1 + self._steps) / (10 + self._steps))
        self._steps += 1
        for average, p in zip(self._average, self._trained, strict=True):
            average.lerp_(p, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the model has the averaged weights."""
        own = [p.detach().clone() for p in self._trained]
        self._copy(self._average)
        yield
        self._copy(own)

    @torch.no_grad()
    def _copy(self, weights: list[Tensor]) -> None:
        for p, w in zip(self._trained, weights, strict=True):
            p.copy_(w)
