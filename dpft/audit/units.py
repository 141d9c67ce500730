"""Releases in units of the claimed noise: in each coordinate N(0, 1), independent over coordinates and steps.

Where the clip norm adapts, a release has one coordinate more: the noised count of examples whose norm is at most C,
which follows from two clip norms. Where noise is correlated over the steps, it is undone (:mod:`correlation`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpft.audit.correlation import Uncorrelated, unit_of_noise
from dpft.privacy import PrivacySchedule


class Units:
    """Of one audited run.

    Attributes:
        released: takes scaled releases in order, and gives their rows without correlation.
        expected: the same of what is expected in them.
    """

    def __init__(self, schedule: PrivacySchedule) -> None:
        self._schedule = schedule
        strategy, steps = schedule.strategy, schedule.num_steps
        self._unit = 1.0 if strategy is None else unit_of_noise(strategy)
        self.released, self.expected = Uncorrelated(strategy, steps), Uncorrelated(strategy, steps)
        self._sum_noise, self._count_noise = schedule.noise_multiplier, 0.0
        if schedule.adaptive_clip is not None:
            # One example changes sum and count together by at most 1 / noise_multiplier, in units of their noises.
            given, batch = schedule.adaptive_clip.count_noise, schedule.expected_batch_size
            self._count_noise = max(batch / 20, 5 * schedule.noise_multiplier) if given is None else given
            self._sum_noise = (schedule.noise_multiplier**-2 - (2 * self._count_noise) ** -2) ** -0.5

    def contribution(self, clipped: Tensor, below: bool, clip_norm: float) -> Tensor:
        """What one example adds, from its clipped gradient ``[d]`` and whether its norm is at most the clip norm."""
        return self._joined(clipped, below - 0.5, clip_norm)

    def release(self, total: Tensor, clip_norm: float, next_norm: float) -> Tensor:
        """From a released sum ``[d]``, its clip norm and the next one."""
        adaptive, count = self._schedule.adaptive_clip, 0.0
        if adaptive is not None:
            share = adaptive.quantile - math.log(next_norm / clip_norm) / adaptive.learning_rate
            count = (share - 0.5) * float(self._schedule.expected_batch_size)
        return self._joined(total, count, clip_norm)

    def _joined(self, vector: Tensor, count: float, clip_norm: float) -> Tensor:
        scaled = vector / (self._sum_noise * clip_norm * self._unit)
        if self._schedule.adaptive_clip is None:
            return scaled
        return torch.cat([scaled, torch.tensor([count / self._count_noise], dtype=scaled.dtype)])
