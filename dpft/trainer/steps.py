"""One step of Trainer is one logical batch: what its loop iterates over in the place of a DataLoader."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from dpft.loader import PrivateDataLoader


class LogicalBatch:
    """The physical batches of one logical batch, drawn as they are asked for, once."""

    def __init__(self, physical: Iterator[dict[str, Any]], loader: PrivateDataLoader) -> None:
        self._physical, self._loader = physical, loader

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self._physical:
            yield batch
            if self._loader.is_last:
                return


class Steps:
    """The logical batches of a training, ``len`` of them per epoch; Trainer asks for one iterator per epoch.

    Args:
        dataset: the training examples, whose number Trainer logs.
        per_epoch: logical batches of one epoch, in expectation.
        done: steps of the training so far; a resume may begin within an epoch, which then ends where it would have.
        loader: of ``dpft.prepare``; set when the model is prepared, as Trainer asks for the length earlier.
    """

    def __init__(
        self, dataset: Any, per_epoch: int, done: Callable[[], int], loader: Callable[[], PrivateDataLoader]
    ) -> None:
        self.dataset, self._per_epoch, self._done, self._loader = dataset, per_epoch, done, loader
        self._physical: Iterator[dict[str, Any]] | None = None

    def __len__(self) -> int:
        return self._per_epoch

    def __iter__(self) -> Iterator[LogicalBatch]:
        loader = self._loader()
        if self._physical is None:
            self._physical = iter(loader)
        for _ in range(self._per_epoch - self._done() % self._per_epoch):
            if loader.privacy.steps >= loader.privacy.last_step:
                loader.privacy.check_start()  # a new training on a full ledger must not end as if it had trained
                return
            yield LogicalBatch(self._physical, loader)
