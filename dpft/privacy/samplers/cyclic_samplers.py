"""The samplers of correlated noise: two steps that share an example are at least so far apart as its accounting says.

Which steps an example can be in follows from its index and the number of examples by a fixed function, not from
anything in the data, and not from a seed: a run that is resumed, on another number of processes or with another
version of a library, keeps it. Neighbouring datasets (one example's gradient is replaced by zero) have it in common.
"""

from __future__ import annotations

import numpy as np

from dpft.errors import PrivacyConfigError
from dpft.privacy.samplers.logical_sampler import Indices, LogicalBatchSampler


def spread_order(dataset_size: int) -> Indices:
    """A fixed permutation of the indices without a visible pattern, int64 ``[dataset_size]``.

    Not ``numpy.random``: its streams may change from one version to the next. SplitMix64 (Steele, Lea, Flood 2014)
    maps 64-bit numbers one to one, so that no two examples tie.
    """
    x = np.arange(1, dataset_size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(x ^ (x >> np.uint64(31)))


class CyclicPoissonSampler(LogicalBatchSampler):
    """Step t draws each example of group ``t % cycle`` independently with probability ``sample_rate``, and no other.

    Args:
        dataset_size: number of examples N.
        sample_rate: of the examples of a group, in (0, 1].
        cycle: number of groups, whose sizes differ by at most one; 1 to N.
        ranks: as :class:`LogicalBatchSampler`.
    """

    draws_globally = False

    def __init__(self, dataset_size: int, sample_rate: float, cycle: int, **ranks: int | None) -> None:
        super().__init__(dataset_size, **ranks)  # type: ignore[arg-type]  # rank and world_size are never None
        if not 0 < sample_rate <= 1:
            raise PrivacyConfigError(f"sample_rate={sample_rate!r}; expected a probability in (0, 1].")
        if not 1 <= cycle <= dataset_size:
            raise PrivacyConfigError(f"cycle={cycle!r}; expected 1 to {dataset_size}, the number of examples.")
        self.sample_rate, self.cycle = sample_rate, cycle
        order = spread_order(dataset_size)
        self._groups = [self._mine(order[group::cycle]) for group in range(cycle)]

    def draw(self, step: int) -> Indices:
        group = self._groups[step % self.cycle]
        count = self._rng.binomial(len(group), self.sample_rate)
        return np.sort(self._rng.choice(group, size=count, replace=False, shuffle=False))


class FixedOrderSampler(LogicalBatchSampler):
    """The same batches in every epoch: an example is in the steps that are equal modulo ``steps_per_epoch``.

    Nothing is drawn: the order is no secret, and no amplification may be claimed. The last batch of an epoch may be
    short.

    Args:
        dataset_size: number of examples N.
        batch_size: 1 to N.
        ranks: as :class:`LogicalBatchSampler`.
    """

    draws_globally = False

    def __init__(self, dataset_size: int, batch_size: int, **ranks: int | None) -> None:
        super().__init__(dataset_size, **ranks)  # type: ignore[arg-type]  # rank and world_size are never None
        if not 1 <= batch_size <= dataset_size:
            raise PrivacyConfigError(
                f"batch_size={batch_size!r}; expected 1 to {dataset_size}, the number of examples."
            )
        self.batch_size, self.steps_per_epoch = batch_size, -(-dataset_size // batch_size)
        self._order = spread_order(dataset_size)

    def draw(self, step: int) -> Indices:
        start = step % self.steps_per_epoch * self.batch_size
        return self._mine(self._order[start : start + self.batch_size])
