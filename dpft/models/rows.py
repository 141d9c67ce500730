"""One row of what a forward is given: of tensors, of what holds tensors, and without its padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dpft.errors import ClippingError

# Not inputs of the batch, whatever their length happens to be.
NOT_BATCHED = frozenset({"cache_position", "num_items_in_batch"})


def _may_be_an_example(entry: Any, one_each: bool) -> bool:
    """Whether an entry of a list may be one example's data, which the others' forwards must not see."""
    if isinstance(entry, Tensor) and entry.dim() > 0:
        return entry.shape[0] == 1
    return isinstance(entry, str | Mapping) or (one_each and isinstance(entry, Tensor | int | float))


def row_of(value: Any, i: int, batch: int, name: str = "") -> Any:
    """Example i's row of an argument; an argument shared by all examples unchanged.

    Raises:
        ClippingError: an argument that cannot be split by example.
    """
    if isinstance(value, Tensor) and value.dim() > 0 and name not in NOT_BATCHED:
        if value.shape[0] == batch:
            return value[i : i + 1]
        if value.shape[0] != 1:
            raise ClippingError(
                f"argument {name!r} has shape {list(value.shape)} in a batch of {batch}: it is not known which "
                "part belongs to which example. Make the batch its first dimension, or use physical batches of one."
            )
    elif isinstance(value, Mapping):
        return type(value)({k: row_of(v, i, batch, str(k)) for k, v in value.items()})  # type: ignore[call-arg]  # a mapping type is made from a dict
    elif isinstance(value, list | tuple):
        if batch > 1 and any(_may_be_an_example(v, len(value) == batch) for v in value):
            raise ClippingError(
                f"argument {name!r} is a {type(value).__name__} of {len(value)} in a batch of {batch}, which may hold "
                "an entry for each example: it cannot be cut into rows. Give tensors of one row per example, or use "
                "physical batches of one example."
            )
        rows = [row_of(v, i, batch, name) for v in value]
        return rows if isinstance(value, list) else tuple(rows)
    elif batch > 1 and not isinstance(value, Tensor | bool | int | float | str | type(None)):
        raise ClippingError(
            f"argument {name!r} is a {type(value).__name__}, which may hold several examples' data: it cannot be cut "
            "into rows. Use physical batches of one example."
        )
    return value


def real_columns(mask: Any) -> tuple[int, int] | None:
    """The first column of a row's ``attention_mask [1, T]`` that is not padding, and the one after the last.

    None where there is nothing to trim: no such mask, no padding at either end, or fewer than two columns left.
    """
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[0] != 1:
        return None
    columns = [number for number, real in enumerate(mask[0].tolist()) if real]  # one transfer from the device
    if len(columns) < 2:
        return None
    first, last = columns[0], columns[-1] + 1
    return None if (first, last) == (0, mask.shape[1]) else (first, last)


def trimmed(value: Any, length: int, columns: tuple[int, int]) -> Any:
    """A row's argument or output without the columns outside of ``columns``, wherever it has ``length`` of them.

    That is dimension 1 of a tensor ``[1, T, ...]``, and the last two of a mask ``[1, ?, T, T]``.
    """
    if not isinstance(value, Tensor) or value.dim() < 2:
        return value
    first, last = columns
    if value.dim() == 4 and value.shape[3] == length:
        value = value[..., first:last]
        return value[:, :, first:last] if value.shape[2] == length else value
    return value[:, first:last] if value.shape[1] == length else value
