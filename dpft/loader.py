"""The data loader: turns a sampler's physical batches into tensors on the device, padding rows included."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from dpft.errors import PrivacyConfigError
from dpft.privacy.samplers.sampler import PhysicalBatch, PhysicalBatchSampler
from dpft.workers import worker_context

Collate = Callable[[list[Any]], Mapping[str, Any]]


class _Fetch(Dataset[Any]):
    """Maps a :class:`PhysicalBatch` to a collated batch; runs in the DataLoader's workers."""

    def __init__(self, dataset: Any, collate: Collate, static_shapes: bool) -> None:
        self.dataset, self.collate, self.static_shapes = dataset, collate, static_shapes

    def __getitem__(self, physical: PhysicalBatch) -> tuple[dict[str, Any], bool, int]:
        examples = self._examples(physical.indices)
        # An empty physical batch still passes through the model, as at least one row of weight zero.
        padding = physical.num_padding if self.static_shapes else int(not examples)
        if padding:
            template = examples[0] if examples else self._examples([0])[0]
            examples = examples + [template] * padding
        collated: Any = self.collate(examples)
        if not isinstance(collated, Mapping) or "example_weight" in collated:
            raise PrivacyConfigError(
                f"collate_fn returned a {type(collated).__name__}"
                + (" with example_weight" if isinstance(collated, Mapping) else "")
                + "; expected a dictionary of tensors by name, to which the loader adds example_weight. Pass a "
                "collate_fn that turns a list of items into one."
            )
        batch = dict(collated)
        ids = self._example_of_each_row(batch, len(examples))
        for name, value in batch.items():
            shape = list(value.shape) if isinstance(value, Tensor) else None
            if isinstance(value, list | tuple):
                shape = [len(value)]
            if shape and shape[0] != len(ids):
                raise PrivacyConfigError(
                    f"collate_fn returned {name!r} of shape {shape} for {len(examples)} examples of {len(ids)} rows; "
                    "expected one row per example, or example_ids [rows] beside them. Packing several examples into a "
                    "row changes the privacy unit and is not supported."
                )
        weight = torch.ones(len(examples))
        if padding:
            weight[len(examples) - padding :] = 0.0
            if isinstance(batch.get("labels"), Tensor):
                batch["labels"] = batch["labels"].clone()
                batch["labels"][ids >= len(examples) - padding] = -100
        batch["example_weight"] = weight
        return batch, physical.is_last, physical.step

    @staticmethod
    def _example_of_each_row(batch: Mapping[str, Any], examples: int) -> Tensor:
        """``[rows]``: the collated ``example_ids``, those of ``rows_per_example``, or one row for each example."""
        ids, each = batch.get("example_ids"), batch.get("rows_per_example")
        if ids is None:
            ids = torch.arange(examples).repeat_interleave(1 if each is None else int(each))
        if not isinstance(ids, Tensor) or ids.dim() != 1 or set(ids.tolist()) != set(range(examples)):
            raise PrivacyConfigError(
                f"collate_fn returned example_ids {ids!r}; expected [rows] whole numbers, each of 0 to {examples - 1} "
                "at least once: the item that each row belongs to"
            )
        return ids

    def _examples(self, indices: Sequence[int]) -> list[Any]:
        if not indices:
            return []
        many = getattr(self.dataset, "__getitems__", None)
        return list(many(list(indices))) if many is not None else [self.dataset[i] for i in indices]


class PrivateDataLoader:
    """Iterates over physical batches, as dictionaries of tensors with ``example_weight [B]``; made by
    ``dpft.prepare``.

    Ends after the planned number of logical batches, counted over all iterations and resumes. Do not prepare it again:
    Accelerate would repeat examples to fill ranks.

    Attributes:
        is_last: whether the most recently yielded batch ends its logical batch.
        step: number, from 0, of the logical batch that it belongs to.
        num_steps: logical batches of the whole training.
        privacy: the run's :class:`dpft.PrivacyRun`: schedule, ledger, epsilon.
    """

    def __init__(
        self,
        dataset: Any,
        batches: PhysicalBatchSampler,
        collate_fn: Collate | None,
        *,
        device: torch.device | str = "cpu",
        num_workers: int = 0,
        static_shapes: bool = False,
        on_start: Callable[[], None] | None = None,
        on_batch: Callable[[int, bool, int, int], None] | None = None,
        privacy: Any = None,
    ) -> None:
        self._loader = DataLoader(
            _Fetch(dataset, collate_fn or default_collate, static_shapes),
            sampler=batches,
            batch_size=None,
            num_workers=num_workers,
            multiprocessing_context=worker_context() if num_workers else None,
            pin_memory=torch.device(device).type == "cuda",
        )
        self.device, self.num_steps, self.privacy = torch.device(device), batches.num_steps, privacy
        self.is_last, self.step = False, 0
        self._iteration = 0
        self._on_start, self._on_batch = on_start, on_batch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._iteration += 1
        mine = self._iteration
        if self._on_start is not None:
            self._on_start()
        for batch, is_last, step in self._loader:
            if mine != self._iteration:
                raise PrivacyConfigError(
                    "a second iteration over the loader was started: batches of two draws would go into one "
                    "release. Use one iterator at a time."
                )
            self.is_last, self.step = is_last, step
            if self._on_batch is not None:
                weights = batch["example_weight"]
                self._on_batch(step, is_last, len(weights), int((weights == 0).sum()))
            yield {
                # example_ids stay: their values decide shapes, and reading them from a device would wait for it
                name: value.to(self.device, non_blocking=True)
                if isinstance(value, Tensor) and name != "example_ids"
                else value
                for name, value in batch.items()
            }


def check_dataset(dataset: Any) -> None:
    """Refuse what batches cannot be drawn from at random.

    Raises:
        PrivacyConfigError: a DataLoader, a stream, a dictionary of splits, or nothing; says what to pass.
    """
    if isinstance(dataset, torch.utils.data.DataLoader):
        raise PrivacyConfigError(
            "dataset is a DataLoader; expected the dataset itself. Its batches would not be Poisson samples, and the "
            "accountant has no theorem for them."
        )
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise PrivacyConfigError(
            f"dataset is a {type(dataset).__name__} without len() or indexing. Poisson sampling needs random "
            "access: load a streaming dataset into a map-style one (datasets.Dataset is memory-mapped and may "
            "exceed memory)."
        )
    if isinstance(dataset, torch.utils.data.IterableDataset | Mapping):
        raise PrivacyConfigError(
            f"dataset is a {type(dataset).__name__}; expected a sequence of examples with len() and indexing by "
            "number. Of a DatasetDict pass one split; load a streaming dataset into a map-style one."
        )
    if len(dataset) == 0:
        raise PrivacyConfigError("the dataset is empty")
