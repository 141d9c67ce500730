"""The lengths of a Trainer's examples, by which a private training sorts a logical batch before it is cut."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dpft.errors import PrivacyConfigError


def lengths_of(trainer: Any) -> Sequence[int]:
    """Lengths for ``train_sampling_strategy="group_by_length"``, found as Trainer finds them.

    Args:
        trainer: with a training dataset.

    Returns:
        The column ``length_column_name`` of a ``datasets.Dataset``; without it the numbers of tokens.

    Raises:
        PrivacyConfigError: the examples have neither.
    """
    import pyarrow.compute as pc  # type: ignore[import-untyped]  # it has no types
    from datasets import Dataset

    dataset, column = trainer.train_dataset, trainer.args.length_column_name
    names = getattr(trainer.processing_class, "model_input_names", None) or ["input_ids"]
    arrow = isinstance(dataset, Dataset)
    if arrow and column in dataset.column_names:
        return list(dataset[column])
    first = dataset[0]
    if not isinstance(first, Mapping) or names[0] not in first:
        found = sorted(first) if isinstance(first, Mapping) else type(first).__name__
        raise PrivacyConfigError(
            f"train_sampling_strategy='group_by_length' needs {names[0]!r} in each example, or a column {column!r} in "
            f"a datasets.Dataset; got {found}. Add it, name it by length_column_name, or pass "
            "privacy_options={'lengths': [...]}."
        )
    if not arrow:
        return [len(dataset[i][names[0]]) for i in range(len(dataset))]
    # the offsets of the lists, without reading what is in them
    parts: Iterable[Any] = dataset.select_columns(names[0]).with_format("arrow").iter(1000)
    return [n for part in parts for n in pc.list_value_length(part[names[0]]).to_pylist()]
