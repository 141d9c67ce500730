"""Which arguments of a forward are targets of a loss, and which of their elements belong to which example."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpft.clipping.deferred_checks import DeferredChecks
from dpft.errors import ClippingError

_TARGET = re.compile(
    r"labels?$|^(start|end)_positions?$|^(future|target)_values$|^targets?$|^is_impossible$|^cls_index$"
)
_POSITION = re.compile(r"^(start|end)_positions?$|^cls_index$")
_CHOICES = re.compile(r"ForMultipleChoice$")

# Operations that keep every element, or change each by itself, in the order of the rows. Results of another number of
# elements (a mask that is broadcast) are not followed.
_NAMES = [
    *("view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "ravel", "contiguous", "clone", "detach"),
    *("squeeze", "squeeze_", "unsqueeze", "unsqueeze_", "to", "type", "type_as", "cpu", "cuda"),
    *("long", "int", "float", "double", "half", "bfloat16"),
    *("clamp", "clamp_", "clamp_min", "clamp_max", "clip", "masked_fill", "masked_fill_"),
]
_KEEP_ORDER = frozenset(f for name in _NAMES for x in (Tensor, torch) if callable(f := getattr(x, name, None)))
_INDEX = Tensor.__getitem__
_GATHER = frozenset({Tensor.gather, torch.gather})
_WHERE = frozenset({Tensor.where, torch.where})


def targets_of(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a forward from which a model of transformers computes a loss, and that are not None."""
    return {name: value for name, value in kwargs.items() if value is not None and _TARGET.search(name)}


def are_positions(targets: Mapping[str, Any]) -> bool:
    """Whether one of them counts columns from the left, as the answer of a question does."""
    return any(_POSITION.search(name) for name in targets)


def several_rows(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """C, where a model takes ``[B, C, T]`` and flattens it to ``[B * C, T]``: multiple choice. Else None.

    Raises:
        ClippingError: a model that does so, and of which it is not known which losses it then computes.
    """
    inputs = [*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
    found = [value for value in inputs if isinstance(value, Tensor) and value.dim() > 2 + value.is_floating_point()]
    if not found:
        return None
    for module in model.modules():
        name = type(module).__name__
        if "DoubleHeads" in name:
            raise ClippingError(
                f"{name} takes several rows per example ([B, choices, T]) and has a loss of each row besides one of "
                "the choices, which is not supported. Wrap with strategy='per_example'."
            )
        if _CHOICES.search(name):
            return int(found[0].shape[1])
    return None


class TargetRows:
    """Tensors known to be a batch's targets, whole examples one after another, all of the same size.

    A target may be viewed, converted, shifted or masked on its way to a loss; whatever reorders or selects rows
    (indexing with a mask, a permutation) makes a tensor of which nothing is known.

    Args:
        targets: of the forward.
        batch: B.
        checks: for what is known only on the device.
    """

    def __init__(self, targets: Mapping[str, Any], batch: int, checks: DeferredChecks) -> None:
        self._batch, self._checks = batch, checks
        self._known: dict[int, tuple[Tensor, str]] = {}  # the tensors are kept, so that no other gets the same id
        for name, value in targets.items():
            if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch:
                self._known[id(value)] = value, name

    def __contains__(self, value: Any) -> bool:
        return id(value) in self._known

    def concerns(self, args: tuple[Any, ...]) -> bool:
        """Whether a target is among the first arguments of an operation; this is asked for every one of a forward."""
        return id(args[0]) in self._known or (len(args) > 1 and id(args[1]) in self._known)

    def is_position(self, target: Any) -> bool:
        """Whether a target numbers a column, from the left."""
        return target in self and _POSITION.search(self._known[id(target)][1]) is not None

    def follow(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        """Note what ``func`` made of a target that is among ``args``."""
        source = args[1] if func is torch.where and len(args) == 3 and args[1] in self else args[0]
        if source not in self or not isinstance(out, Tensor):
            return
        if func in _KEEP_ORDER or func in _WHERE:
            kept = out.numel() == source.numel()
        elif func == _INDEX:
            kept = self._in_front(source) and _keeps_rows(args[1], source.dim())
        elif func is F.pad:
            kept = self._in_front(source) and len(args[1]) < 2 * source.dim() and kwargs.get("mode") == "constant"
        elif func in _GATHER:
            kept = self._takes_each(source, args[1:], kwargs)
        else:
            kept = False
        if kept:
            self._known[id(out)] = out, self._known[id(source)][1]
        elif out is source:  # changed in place, by something that may move rows
            del self._known[id(out)]

    def _in_front(self, source: Tensor) -> bool:
        """Whether dimension 0 is the example, and there are others."""
        return source.dim() > 1 and source.shape[0] == self._batch

    def _takes_each(self, source: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether a gather of ``source [B]`` takes every element, in order; checked on the device."""
        if len(args) != 2 or kwargs or args[0] not in (0, -1) or not isinstance(args[1], Tensor):
            return False
        index = args[1]
        if not source.shape == index.shape == (self._batch,):
            return False
        moved = (index != torch.arange(self._batch, device=index.device)).any()
        self._checks.refuse_if(
            moved,
            "the model's forward reorders its labels, so it is not known whose loss is whose. Wrap with "
            "strategy='per_example', or use physical batches of one example.",
        )
        return True


def _keeps_rows(index: Any, dims: int) -> bool:
    """Whether an index takes, of every row, the same elements: dimension 0 whole, the others by slices or numbers."""
    parts = index if isinstance(index, tuple) else (index,)
    if not parts or any(isinstance(part, bool) or not isinstance(part, _PART) for part in parts):
        return False
    taken = sum(isinstance(part, int | slice) for part in parts)
    return parts[0] == slice(None) if parts[0] is not ... else taken < dims


_PART = (int, slice, type(None), type(...))
