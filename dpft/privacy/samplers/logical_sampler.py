"""What every sampler of logical batches has in common: ranks, seeds and their generators."""

from __future__ import annotations

import abc
import secrets

import numpy as np
import numpy.typing as npt

from dpft.errors import PrivacyConfigError

Indices = npt.NDArray[np.int64]


def draw_seed() -> int:
    """127 bits from the operating system: rank 0 draws a seed and sends it to all ranks, once per start."""
    return secrets.randbits(127)


class LogicalBatchSampler(abc.ABC):
    """Draws this rank's part of each logical batch.

    Args:
        dataset_size: number of examples N, >= 1.
        rank: of this process.
        world_size: number of processes that share the logical batch.
        shared_seed: from :func:`draw_seed`, the same on all ranks; samplers that draw globally require it on several.
        test_seed: a fixed seed, for tests only: the run is then not private.

    Raises:
        PrivacyConfigError: numbers out of range, or a shared seed is missing.
    """

    draws_globally = True

    def __init__(
        self,
        dataset_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        shared_seed: int | None = None,
        test_seed: int | None = None,
    ) -> None:
        if dataset_size < 1:
            raise PrivacyConfigError(f"dataset_size={dataset_size!r}; expected at least one example.")
        if not 0 <= rank < world_size:
            raise PrivacyConfigError(f"rank={rank!r} of world_size={world_size!r}; expected 0 <= rank < world_size.")
        if self.draws_globally and world_size > 1 and shared_seed is None and test_seed is None:
            raise PrivacyConfigError(
                f"{type(self).__name__} on {world_size} ranks has no shared seed, so every rank would draw another "
                "logical batch; call dpft.privacy.draw_seed() on rank 0, send it to all, and pass shared_seed=."
            )
        self.dataset_size, self.rank, self.world_size = dataset_size, rank, world_size
        self.seed_is_known = test_seed is not None
        seed = test_seed if test_seed is not None else shared_seed
        self._entropy = draw_seed() if seed is None else seed
        self._rng = self._generator(0 if self.draws_globally else rank + 1)

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64DXSM(np.random.SeedSequence(self._entropy, spawn_key=key)))

    @property
    def owned(self) -> int:
        """How many examples this rank owns."""
        return len(range(self.rank, self.dataset_size, self.world_size))

    def _mine(self, logical: Indices) -> Indices:
        return np.sort(logical[logical % self.world_size == self.rank])

    @abc.abstractmethod
    def draw(self, step: int) -> Indices:
        """This rank's part of the logical batch of a step.

        Every call makes a fresh draw, also for a step that was drawn before, except that samplers with epochs fix
        the batch of each step. All ranks must make the same calls.

        Args:
            step: number of the release, from 0.

        Returns:
            Sorted, distinct indices, int64 [k]; k may be 0.
        """

    def __reduce__(self) -> str:
        # A copy would draw the same "random" batches a second time; repeated draws are not independent.
        raise TypeError(f"{type(self).__name__} cannot be copied or pickled; make a new one, with a fresh seed.")
