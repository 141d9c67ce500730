"""The shapes of what a model's forward is called with: rows, tokens of a row, and the example of each row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dpft.errors import ClippingError
from dpft.rules.groups import Groups, even_groups, groups_of


def take_groups(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Groups | None:
    """The rows of each example, where the call says that one has several.

    Raises:
        ClippingError: ids or a number that do not fit the rows, or a reduction of the rows' losses that there is not.
    """
    ids, each = kwargs.pop("example_ids", None), kwargs.pop("rows_per_example", None)
    reduction = kwargs.pop("row_reduction", "sum")
    if reduction not in ("sum", "mean"):
        raise ClippingError(
            f"row_reduction is {reduction!r}; expected 'sum' or 'mean': what the loss of an example is of its rows'"
        )
    groups = _groups(args, kwargs, ids, each)
    return groups if groups is None else replace(groups, mean=reduction == "mean")


def _groups(args: tuple[Any, ...], kwargs: dict[str, Any], ids: Any, each: Any) -> Groups | None:
    shape = batch_shape(args, kwargs)
    if shape is None or (ids is None and each is None):
        return None
    if ids is not None:
        return groups_of(ids, shape[0])
    if not isinstance(each, int) or each < 1 or shape[0] % each:
        raise ClippingError(
            f"rows_per_example is {each!r} in a batch of {shape[0]} rows; expected a whole number that divides them"
        )
    return even_groups(shape[0] // each, each)


def batch_shape(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Size | None:
    """Shape of the first tensor input, whose dimension 0 is the batch; None if there is none."""
    preferred = [kwargs.get(name) for name in ("input_ids", "inputs_embeds", "labels")]
    for value in (*preferred, *args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim() > 0:
            return value.shape
    return None


def row_tokens_of(args: tuple[Any, ...], kwargs: dict[str, Any], shape: torch.Size) -> int:
    """T, if the input is one of tokens ``[B, T, ...]``; else 0: nobody knows how many an image or a sound becomes."""
    if not any(isinstance(kwargs.get(name), Tensor) for name in ("input_ids", "inputs_embeds")):
        first = next((value for value in args if isinstance(value, Tensor)), None)
        if first is None or first.shape != shape:
            return 0
    choices = len(shape) == 3 and isinstance(kwargs.get("input_ids"), Tensor)  # [B, choices, T]
    return shape[-1] if choices else shape[1] if len(shape) in (2, 3) else 0
