"""Isolation by value: one row, run alone and without its padding, must give what it gave in its batch.

It sees every way in which a forward lets one example depend on another: also inside frozen layers, and through values
that are detached, which the check by gradients (:class:`dpft.clipping.probe.ProbePass`) cannot see; and a dependence
on how far the row is padded, which is a dependence on the longest text beside it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dpft.clipping.probe import drew_since, random_states
from dpft.clipping.state import ClipState
from dpft.errors import ClippingError
from dpft.models.losses import loss_of
from dpft.models.rows import real_columns, row_of, trimmed
from dpft.models.targets import are_positions, targets_of

# Largest difference that is rounding: of a loss, relative to 1 + its value; of an output, to its largest entry.
# docs/design.md has what was measured.
LOSS_TOLERANCE = {torch.float64: 2e-5, torch.float32: 2e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-8}
OUTPUT_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2.0**-7, torch.bfloat16: 2.0**-4}
TF32 = torch.float16  # it has as many bits

MESSAGE = (
    "one row of a batch, run alone and without its padding, gives another loss or output than in the batch, by "
    "more than rounding: an example's gradient depends on the examples beside it, and noise for one example does "
    "not cover that. Usual causes: padding on the left without position_ids, or with a label on the first token "
    "after it (pad on the right; or pass position_ids that count from each row's first token, and give that token "
    "the label -100); labels on padding (use -100); a layer that uses other rows (batch statistics, routing with "
    "a capacity, packed or sorted rows). If the model is known to treat rows apart, isolation='off' skips this "
    "check, and the privacy report says so."
)


def is_due(state: ClipState, largest: int) -> bool:
    """Whether the next forward, of batches of at most ``largest`` rows, is to be checked by value."""
    if state.isolation == "off" or state.clipping == "none" or largest < 2:
        return False
    return state.isolation == "every_step" or state.backwards + 1 >= 2 * state.isolated_at


class RowCheck:
    """The check of one forward: enter it around the forward, then :meth:`compare` its output.

    Args:
        state: of the wrapped model.
        model: the wrapped model.
        run: its forward; None where no check is due.
        args: of the forward.
        kwargs: of the forward.
        batch: B.
    """

    def __init__(
        self,
        state: ClipState,
        model: nn.Module,
        run: Callable[..., Any] | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        batch: int,
    ) -> None:
        self._state, self._model, self._run, self._args, self._kwargs = state, model, run, args, kwargs
        self._batch = batch
        self._device = next(iter(state.parameters.values())).device

    @classmethod
    def of_next(
        cls,
        state: ClipState,
        model: nn.Module,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        batch: int,
    ) -> RowCheck:
        """A check that does nothing, or, where one is due, one with its costs: a forward of one row.

        Due are the forwards of backward 1, 2, 4, 8, ... of batches of more than one row; where ranks share a model,
        on all of them or on none. Where the forward draws random numbers, every second one after the first is left
        out (:meth:`compare`). Rows that are run one by one have a check of their own (:meth:`of_row`).
        """
        largest = state.largest_batch(batch)
        if state.strategy == "per_example" or not is_due(state, largest):
            return cls(state, model, None, args, kwargs, batch)
        number = state.backwards + 1
        state.isolated_at = number
        state.isolations += 1
        return cls(state, model, run, args, kwargs, batch)

    @classmethod
    def of_row(
        cls, state: ClipState, model: nn.Module, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> RowCheck:
        """A check of a row that is run one by one anyway: that its padding does not matter, and of the buffers.

        How far it is padded depends on the longest row beside it.
        """
        state.isolated_at = state.backwards + 1
        state.isolations += 1
        return cls(state, model, run, args, kwargs, 1)

    def __enter__(self) -> RowCheck:
        self._before = random_states(self._device) if self._run is not None else []
        self._buffers = _released_buffers(self._model) if self._run is not None else {}
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def compare(self, out: Any) -> None:
        """Refuse the batch if a random row alone gives something else than in ``out``.

        Where the forward drew random numbers (dropout), both are computed again in eval mode, the whole batch, too; at
        every second check after the first alone (backward 1, 2, 8, 32, ...), for what it costs.

        Raises:
            ClippingError: at once, or before the release, as :class:`~dpft.clipping.deferred_checks.DeferredChecks`.
        """
        if self._run is None:
            return
        self._refuse_changed_buffers()
        random_forward = drew_since(self._before, self._device)
        rare = self._state.isolations == 1 or self._state.isolations % 2 == 0
        if random_forward and self._state.isolation != "every_step" and not rare:
            return
        index = random.SystemRandom().randrange(self._batch)
        try:
            row = {name: row_of(value, index, self._batch, name) for name, value in self._kwargs.items()}
            args = tuple(row_of(value, index, self._batch) for value in self._args)
        except ClippingError:
            return  # it is not known which part is whose: what this check cannot see, docs/design.md says
        columns, length = self._padding(row)
        if columns is not None:
            row = {
                name: value if name.startswith("pixel_") else trimmed(value, length, columns)
                for name, value in row.items()
            }
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices=devices), self._state.unrecorded():
            if random_forward:
                with _eval_mode(self._model):
                    out, alone = self._run(*self._args, **self._kwargs), self._run(*args, **row)
            else:
                alone = self._run(*args, **row)
        wrong = self._differs(out, alone, index, columns, length)
        if wrong is not None:
            self._state.deferred_checks.refuse_if(wrong, MESSAGE)

    def _refuse_changed_buffers(self) -> None:
        """A buffer that a training forward changes is saved with the model, and no noise was added to it.

        Raises:
            ClippingError: names them.
        """
        now = _released_buffers(self._model)
        changed = sorted(name for name, mark in now.items() if self._buffers.get(name, mark) != mark)
        if changed:
            raise ClippingError(
                f"the training forward changed the buffers {changed[:5]} ({len(changed)} in all), which are saved "
                "with the model: what they keep of the private batches (running statistics, codebooks, observers) "
                "would be released without noise. Freeze them (module.eval(), momentum 0), make them non-persistent, "
                "or replace the module. The model has seen private data: load it anew."
            )

    def _padding(self, row: dict[str, Any]) -> tuple[tuple[int, int] | None, int]:
        """Columns of the row that are not padding; None where it is not known which argument they belong to."""
        mask = row.get("attention_mask")
        if getattr(getattr(self._model, "config", None), "is_encoder_decoder", False):
            return None, 0
        columns, targets = real_columns(mask), targets_of(row)
        length = mask.shape[1] if isinstance(mask, Tensor) and mask.dim() == 2 else 0
        if columns is not None and are_positions(targets):
            columns = None if columns[1] == length else (0, columns[1])  # they count from the left
        for value in targets.values():
            if isinstance(value, Tensor) and value.is_floating_point() and value.shape[1:2] == (length,):
                return None, 0  # one number for each class, or for each token
        return columns, length

    def _differs(
        self, out: Any, alone: Any, index: int, columns: tuple[int, int] | None, length: int
    ) -> Tensor | None:
        """``[]`` bool on the device; None where there is nothing to compare."""
        dtype = self._precision()
        here, there = loss_of(out), loss_of(alone)
        if targets_of(self._kwargs) and not (here is None and "labels" not in self._kwargs):
            if not (isinstance(here, Tensor) and isinstance(there, Tensor)) or here.dim() != 1 or there.numel() != 1:
                return None  # refused elsewhere: not per-example losses
            return _apart(here[index].detach().reshape(1), there.reshape(1), LOSS_TOLERANCE[dtype], floor=1.0)
        wrong = None
        for here, there in zip(_tensors(out), _tensors(alone), strict=False):
            if here.dim() == 0 or here.shape[0] != self._batch or not here.is_floating_point():
                continue
            mine = here[index : index + 1].detach()
            mine = mine if columns is None else trimmed(mine, length, columns)
            if mine.shape != there.shape:
                continue
            found = _apart(mine, there, OUTPUT_TOLERANCE[dtype], floor=0.0)
            wrong = found if wrong is None else wrong | found
        return wrong

    def _precision(self) -> torch.dtype:
        """The least precise dtype that the forward computes in."""
        dtypes = {p.dtype for p in self._model.parameters() if p.is_floating_point()}
        if torch.is_autocast_enabled(self._device.type):
            dtypes.add(torch.get_autocast_dtype(self._device.type))
        if self._device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32:
            dtypes.add(TF32)
        return max(dtypes & LOSS_TOLERANCE.keys(), key=lambda dtype: LOSS_TOLERANCE[dtype], default=torch.bfloat16)


def _apart(here: Tensor, there: Tensor, tolerance: float, floor: float) -> Tensor:
    """``[]`` bool: whether two tensors differ by more than ``tolerance`` of ``floor`` plus their largest entry."""
    if not here.numel():
        return torch.zeros((), dtype=torch.bool, device=here.device)
    a, b = here.float(), there.float().to(here.device)
    finite = torch.isfinite(a) & torch.isfinite(b)
    size = torch.where(finite, b.abs(), 0.0).amax() + floor
    far = torch.where(finite, (a - b).abs(), 0.0).amax() > tolerance * size
    return far | (torch.isfinite(a) != torch.isfinite(b)).any()


def _released_buffers(model: nn.Module) -> dict[str, tuple[int, int, int]]:
    """For each buffer of the ``state_dict``: which tensor it is, how often it was written to, and where it lies."""
    found = {}
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                pointer = 0 if buffer.device.type == "meta" else buffer.data_ptr()
                found[f"{path}.{name}".lstrip(".")] = (id(buffer), buffer._version, pointer)
    return found


def _tensors(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    if isinstance(out, Mapping):
        return [t for value in out.values() for t in _tensors(value)]
    if isinstance(out, list | tuple):
        return [t for value in out for t in _tensors(value)]
    return []


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Without dropout; each module is given back the mode that it had."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
