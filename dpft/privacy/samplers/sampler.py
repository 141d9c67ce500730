"""Which examples are in a logical batch, and how it is cut into physical ones.

A sampler draws, per step, the indices of **this rank's part** of the logical batch. Rank r of W owns the examples
whose index is r modulo W: for any W, every example is owned by exactly one rank.

- :class:`PoissonSampler`: every example is included independently with probability q. The number of included examples
  is drawn from Binomial(n, q), then which ones, without replacement: the same distribution, in time O(batch). Ranks
  draw from their own parts, independently; nothing need be shared.
- :class:`TruncatedPoissonSampler`: the same over the whole dataset; if more than the cap are included, a uniform
  subset of the size of the cap is kept. The cap is global, so every rank draws the same logical batch, from one shared
  seed, and keeps its own part.
- :class:`FixedSizeSampler`: a uniform subset of fixed size, fresh at every step; shared seed.
- :class:`ShuffleSampler`: a permutation per epoch, cut into batches; shared seed. No amplification may be claimed.
- :class:`BallsAndBinsSampler`: in every epoch each example is in one batch, drawn uniformly and independently of the
  others, so that batches differ in size; shared seed.
- :mod:`dpft.privacy.samplers.cyclic_samplers`: those of correlated noise, in which steps that share an example are
  far apart.

Seeds come from the operating system at every start, never from ``torch.manual_seed`` or ``numpy.random.seed``, never
from a checkpoint. Amplification by sampling requires that nobody knows which examples were drawn: treat a shared
seed as a secret. The generator (PCG64DXSM) is of good statistical quality but not cryptographic; its output is not
released.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dpft.errors import PrivacyConfigError
from dpft.privacy.samplers.cyclic_samplers import CyclicPoissonSampler, FixedOrderSampler
from dpft.privacy.samplers.logical_sampler import Indices, LogicalBatchSampler, draw_seed
from dpft.privacy.schedule import PrivacySchedule

__all__ = ["Indices", "LogicalBatchSampler", "draw_seed"]  # defined elsewhere, and imported from here

Lengths = Sequence[int] | npt.NDArray[np.integer[Any]]


class PoissonSampler(LogicalBatchSampler):
    """Includes each example independently with probability ``sample_rate``, at each step."""

    draws_globally = False

    def __init__(self, dataset_size: int, sample_rate: float, **ranks: int | None) -> None:
        super().__init__(dataset_size, **ranks)  # type: ignore[arg-type]  # rank and world_size are never None
        self.sample_rate = _checked_rate(sample_rate)

    def draw(self, step: int) -> Indices:
        count = self._rng.binomial(self.owned, self.sample_rate)
        local = self._rng.choice(self.owned, size=count, replace=False, shuffle=False)
        return np.sort(local.astype(np.int64) * self.world_size + self.rank)


class TruncatedPoissonSampler(LogicalBatchSampler):
    """Poisson over the whole dataset, cut to a uniform subset of ``max_batch_size`` if more are included."""

    def __init__(self, dataset_size: int, sample_rate: float, max_batch_size: int, **ranks: int | None) -> None:
        super().__init__(dataset_size, **ranks)  # type: ignore[arg-type]  # rank and world_size are never None
        self.sample_rate, self.max_batch_size = _checked_rate(sample_rate), max_batch_size

    def draw(self, step: int) -> Indices:
        count = min(self._rng.binomial(self.dataset_size, self.sample_rate), self.max_batch_size)
        return self._mine(self._rng.choice(self.dataset_size, size=count, replace=False, shuffle=False))


class FixedSizeSampler(LogicalBatchSampler):
    """A uniform subset of ``batch_size`` examples, without replacement, fresh at every step."""

    def __init__(self, dataset_size: int, batch_size: int, **ranks: int | None) -> None:
        super().__init__(dataset_size, **ranks)  # type: ignore[arg-type]  # rank and world_size are never None
        self.batch_size = _checked_batch(batch_size, dataset_size)

    def draw(self, step: int) -> Indices:
        return self._mine(self._rng.choice(self.dataset_size, size=self.batch_size, replace=False, shuffle=False))


class EpochSampler(LogicalBatchSampler):
    """Batches of successive epochs, each laid down as a whole when it begins.

    Args:
        first_step: number of the release at which this sampler begins, with a new epoch. After a restart that is the
            ledger's count: the epochs of each start are counted separately, so no seed need be kept.
    """

    def __init__(self, dataset_size: int, batch_size: int, *, first_step: int = 0, **ranks: int | None) -> None:
        super().__init__(dataset_size, **ranks)  # type: ignore[arg-type]  # rank and world_size are never None
        self.batch_size, self.first_step = _checked_batch(batch_size, dataset_size), first_step
        self.steps_per_epoch = -(-dataset_size // batch_size)
        self._epoch, self._laid = -1, np.empty(0, np.int64)

    @abc.abstractmethod
    def _lay(self, rng: np.random.Generator) -> Indices:
        """What decides the batches of one epoch; ``[N]``."""

    @abc.abstractmethod
    def _batch(self, laid: Indices, position: int) -> Indices:
        """The logical batch at a position of the epoch."""

    def draw(self, step: int) -> Indices:
        if step < self.first_step:
            raise PrivacyConfigError(
                f"step {step} lies before this sampler began, at step {self.first_step}: its examples would be used "
                "twice in an epoch; continue from the ledger's count."
            )
        epoch, position = divmod(step - self.first_step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._laid = epoch, self._lay(self._generator(1, epoch))
        return self._mine(self._batch(self._laid, position))


class ShuffleSampler(EpochSampler):
    """A fresh permutation per epoch, cut into batches of ``batch_size``; the last of an epoch may be short."""

    def _lay(self, rng: np.random.Generator) -> Indices:
        return rng.permutation(self.dataset_size)

    def _batch(self, laid: Indices, position: int) -> Indices:
        return laid[position * self.batch_size : (position + 1) * self.batch_size]


class BallsAndBinsSampler(EpochSampler):
    """Each example in one of the epoch's ``ceil(N / batch_size)`` batches, uniformly and independently."""

    def _lay(self, rng: np.random.Generator) -> Indices:
        return rng.integers(self.steps_per_epoch, size=self.dataset_size)

    def _batch(self, laid: Indices, position: int) -> Indices:
        return np.flatnonzero(laid == position)


def make_sampler(
    schedule: PrivacySchedule,
    dataset_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    shared_seed: int | None = None,
    first_step: int = 0,
    test_seed: int | None = None,
) -> LogicalBatchSampler:
    """The sampler that the accounting of a schedule assumes.

    Args:
        schedule: from ``config.resolve(dataset_size)``.
        dataset_size: number of examples.
        rank: of this process.
        world_size: number of processes that share the logical batch.
        shared_seed: from :func:`draw_seed` on rank 0; may be given for every sampler.
        first_step: the ledger's count at the start.
        test_seed: a fixed seed, for tests only.

    Raises:
        PrivacyConfigError: the schedule was resolved for another number of examples; or see
            :class:`LogicalBatchSampler`.
    """
    if schedule.dataset_size is not None and schedule.dataset_size != dataset_size:
        raise PrivacyConfigError(
            f"the schedule was resolved for {schedule.dataset_size} examples and the dataset has {dataset_size}; "
            "resolve the configuration again for this dataset."
        )
    ranks = {"rank": rank, "world_size": world_size, "shared_seed": shared_seed, "test_seed": test_seed}
    if schedule.sampler == "poisson":
        return PoissonSampler(dataset_size, schedule.sample_rate, **ranks)
    if schedule.sampler == "truncated_poisson":
        assert schedule.max_batch_size is not None
        return TruncatedPoissonSampler(dataset_size, schedule.sample_rate, schedule.max_batch_size, **ranks)
    if schedule.sampler == "fixed_size":
        return FixedSizeSampler(dataset_size, int(schedule.expected_batch_size), **ranks)
    if schedule.sampler == "shuffle":
        return ShuffleSampler(dataset_size, int(schedule.expected_batch_size), first_step=first_step, **ranks)
    if schedule.sampler == "balls_and_bins":
        return BallsAndBinsSampler(dataset_size, int(schedule.expected_batch_size), first_step=first_step, **ranks)
    if schedule.strategy is not None:
        if schedule.sampler == "cyclic_poisson":
            cycle = schedule.strategy.min_separation
            return CyclicPoissonSampler(dataset_size, schedule.sample_rate, cycle, **ranks)
        if schedule.sampler == "fixed_order":
            return FixedOrderSampler(dataset_size, int(schedule.expected_batch_size), **ranks)
    raise PrivacyConfigError(f"sampler={schedule.sampler!r} has no implementation; no other one is taken for it.")


def _checked_rate(rate: float) -> float:
    if not 0 < rate <= 1:
        raise PrivacyConfigError(f"sample_rate={rate!r}; expected a probability in (0, 1].")
    return rate


def _checked_batch(batch_size: int, dataset_size: int) -> int:
    if not 1 <= batch_size <= dataset_size:
        raise PrivacyConfigError(f"batch_size={batch_size!r}; expected 1 to {dataset_size}, the number of examples.")
    return batch_size


# ------------------------------------------------------------------------------------------- physical batches
@dataclass(frozen=True)
class PhysicalBatch:
    """The rows of one pass through the model: real examples, then padding of weight zero.

    Attributes:
        indices: of the examples, 0 to ``max_physical_batch_size`` of them.
        num_padding: number of rows to add, so that every physical batch has the same number of rows.
        is_last: whether the logical batch ends here: then noise is added and the parameters change.
        step: number of the logical batch, from 0.
    """

    indices: list[int]
    num_padding: int
    is_last: bool
    step: int

    @property
    def num_rows(self) -> int:
        """Rows with the padding: the same for every physical batch of a run."""
        return len(self.indices) + self.num_padding


def physical_batches(
    indices: Sequence[int] | Indices, max_physical_batch_size: int, num_physical: int | None = None, *, step: int = 0
) -> list[PhysicalBatch]:
    """Cuts a rank's part of a logical batch into physical batches of equal size.

    Args:
        indices: any number; if empty, one physical batch of padding results, because noise must be released anyway.
        max_physical_batch_size: rows of each, >= 1.
        num_physical: how many to make, agreed between ranks; None: as few as can hold the indices.
        step: number of the logical batch.

    Returns:
        At least one; only the last has ``is_last``.

    Raises:
        PrivacyConfigError: a size below 1, or ``num_physical`` cannot hold the indices.
    """
    rows = max_physical_batch_size
    if rows < 1:
        raise PrivacyConfigError(f"max_physical_batch_size={rows!r}; expected a whole number >= 1.")
    needed = max(1, -(-len(indices) // rows))
    count = needed if num_physical is None else num_physical
    if count < needed:
        raise PrivacyConfigError(
            f"num_physical={num_physical!r} physical batches of {rows} rows cannot hold {len(indices)} examples; "
            f"expected at least {needed} (the maximum over all ranks)."
        )
    batches = []
    for number in range(count):
        part = [int(i) for i in indices[number * rows : (number + 1) * rows]]
        batches.append(PhysicalBatch(part, rows - len(part), number == count - 1, step))
    return batches


def checked_lengths(lengths: Lengths, dataset_size: int) -> Indices:
    """``lengths`` as int64 ``[N]``.

    Args:
        lengths: one whole number >= 0 for each example.
        dataset_size: number of examples N.

    Raises:
        PrivacyConfigError: another number of them, negative ones, or not whole numbers.
    """
    try:
        found = np.asarray(lengths)
        shape, kind = list(found.shape), str(found.dtype)
    except ValueError:  # lists of different lengths in it
        found, shape, kind = np.empty(0), [], "lists"
    wanted = f"expected one whole number >= 0 for each of {dataset_size} examples, such as its number of tokens."
    if shape != [dataset_size] or found.dtype.kind not in "iu":
        raise PrivacyConfigError(f"lengths is {kind} of shape {shape}; {wanted}")
    found = found.astype(np.int64)
    if found.min() < 0:  # also where an unsigned number was too large
        raise PrivacyConfigError(f"lengths[{int(found.argmin())}] is {int(found.min())}; {wanted}")
    return found


def _alone(count: int) -> int:
    return count


class PhysicalBatchSampler:
    """Iterates over the physical batches of successive logical batches: a batch sampler for a DataLoader.

    Args:
        sampler: draws the logical batches.
        max_physical_batch_size: rows of every physical batch.
        num_steps: the number of logical batches of the whole training; iteration ends there.
        first_step: where iteration begins; a callable is evaluated at every ``iter()``. Pass ``lambda: ledger.count``,
            so that a second loop, or a resumed run, does not make more releases than were planned.
        agree: returns the maximum of a count over all ranks (a collective), so that all make equally many passes.
        lengths: of the N examples. A rank's part of a logical batch is sorted by them before it is cut, longest first,
            so that a physical batch has examples of similar lengths, and the first one needs the most memory. Equal
            lengths stay in the order of the indices. None: in the order of the indices.

    Which examples are in a logical batch, and how many physical ones it is cut into, does not depend on lengths: they
    only decide which examples pass through the model together. The release is the noisy sum over the logical batch,
    whatever the cut, so that its guarantee and its accounting are those without lengths.

    Raises:
        PrivacyConfigError: sizes out of range; see :func:`checked_lengths`.
    """

    def __init__(
        self,
        sampler: LogicalBatchSampler,
        max_physical_batch_size: int,
        *,
        num_steps: int,
        first_step: int | Callable[[], int] = 0,
        agree: Callable[[int], int] = _alone,
        lengths: Lengths | None = None,
    ) -> None:
        if max_physical_batch_size < 1:
            raise PrivacyConfigError(f"max_physical_batch_size={max_physical_batch_size!r}; expected at least 1.")
        self.sampler, self.max_physical_batch_size = sampler, max_physical_batch_size
        self.num_steps, self.first_step, self.agree = num_steps, first_step, agree
        self.lengths = None if lengths is None else checked_lengths(lengths, sampler.dataset_size)

    def __iter__(self) -> Iterator[PhysicalBatch]:
        first = self.first_step() if callable(self.first_step) else self.first_step
        for step in range(first, self.num_steps):
            indices = self.sampler.draw(step)
            if self.lengths is not None:
                indices = indices[np.argsort(-self.lengths[indices], kind="stable")]
            needed = max(1, -(-len(indices) // self.max_physical_batch_size))
            yield from physical_batches(indices, self.max_physical_batch_size, self.agree(needed), step=step)
