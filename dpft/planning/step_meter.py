"""Counts a step's memory and FLOPs, operation by operation, in a dispatch mode on any device, meta included.

Memory is counted by storage: allocated when an operation returns a storage not seen before, freed when nothing refers
to it any more (``weakref.finalize``). A storage counts once, however many views it has. On a CPU this agrees with the
allocator's own events to 0.03 %. FLOPs are counted with the formulas of ``torch.utils.flop_counter``.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Operation", "StepMeter"]

T = TypeVar("T")

# They neither read nor write memory: they return an uninitialised storage, or none.
_FREE = frozenset({"detach", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "alias"})


@dataclass(frozen=True)
class Operation:
    """One kind of operation: all calls with the same cost.

    Attributes:
        name: of the ATen operator, without its overload (``"mm"``).
        dtype: of its first floating-point input, else of its first tensor.
        flops: of one call, a multiply-add counted as two, as by ``FlopCounterMode``; 0 where that has no formula.
        moved: bytes that one call reads and writes, each tensor once; a broadcast tensor at its storage's size.
        causal: whether it is causal attention, which skips half of :attr:`flops`.
    """

    name: str
    dtype: torch.dtype
    flops: int
    moved: int
    causal: bool = False

    @property
    def attention(self) -> bool:
        """Whether it is one of the fused attention kernels."""
        return "attention" in self.name


# Operations, bytes of the peak beyond what was live, and a function that makes a result of that shape.
Cost = tuple["Counter[Operation]", int, Callable[[], Any]]


@dataclass(frozen=True)
class _Kind:
    """Properties of an operator that do not depend on its arguments."""

    name: str
    formula: Any
    view: bool
    causal_at: int | None


class StepMeter(TorchDispatchMode):
    """A mode that counts live bytes, their peak, and every operation.

    Attributes:
        live: bytes of the live storages that were allocated inside.
        peak: the largest :attr:`live` since the start or the last :meth:`reset`.
        phases: the same by phase of a step (:meth:`enter`).
        operations: how often each operation ran since the start or the last :meth:`reset`.
        phase_operations: the same by phase, where bytes have names.
        phase_parts: by phase, the bytes of its peak by the names of ``name``.

    Args:
        known: tensors that existed before and are not counted: parameters, buffers, the batch.
        costs: what :meth:`once` found, shared by meters of the same kind of device.
        name: the name of a storage that is born now, by which bytes are told apart; None: they are not.
    """

    def __init__(
        self,
        known: Iterable[Tensor],
        costs: dict[Hashable, Cost] | None = None,
        name: Callable[[], str] | None = None,
    ) -> None:
        # Not at the top: it imports Triton, which takes half a second, and only a plan needs it.
        from torch.utils.flop_counter import flop_registry

        super().__init__()
        self._formulas = flop_registry
        self.live = self.peak = 0
        self.operations: Counter[Operation] = Counter()
        self.phases: dict[Hashable, int] = {}
        self.phase_operations: dict[Hashable, Counter[Operation]] = {}
        self.phase_parts: dict[Hashable, Counter[str]] = {}
        self._name, self._parts = name, Counter[str]()
        self._phase: Hashable = ("forward", 0, "first")
        self._before: Counter[Operation] = Counter()
        self._held = list(known)  # a reference, so that their keys are not reused
        self._known = {t.untyped_storage()._cdata for t in self._held}
        self._kinds: dict[Any, _Kind] = {}
        self._costs = {} if costs is None else costs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        kind = self._kinds.get(func)
        if kind is None:
            kind = self._kinds[func] = _kind_of(func, self._formulas)
        outputs = list(_tensors((out,)))
        for t in outputs:
            self._born(t.untyped_storage())
        if not kind.view:
            self._note(kind, args, kwargs, out, outputs)
        return out

    def _note(self, kind: _Kind, args: Any, kwargs: Any, out: Any, outputs: list[Tensor]) -> None:
        inputs = list(_tensors((*args, *kwargs.values())))
        dtype = next((t.dtype for t in inputs if t.dtype.is_floating_point), None)
        if dtype is None:
            dtype = (inputs or outputs)[0].dtype if inputs or outputs else torch.int64
        # A dtype of the result (bmm's out_dtype) is none of the formulas' arguments.
        counted: Any = [a for a in args if not isinstance(a, torch.dtype)]
        if "attention" in kind.name:
            counted = _with_equal_heads(kind.name, args)
        flops = 0 if kind.formula is None else int(kind.formula(*counted, **kwargs, out_val=out))
        moved = 0 if kind.name in _FREE else sum(map(_bytes_touched, (*inputs, *outputs)))
        at = kind.causal_at
        causal = at is not None and bool(kwargs.get("is_causal", args[at] if at < len(args) else False))
        self.operations[Operation(kind.name, dtype, flops, moved, causal)] += 1

    def _born(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        name = "" if self._name is None else self._name()
        self._parts[name] += size
        self._note_phase(self.live)
        weakref.finalize(storage, self._died, key, size, name)

    def _died(self, key: int, size: int, name: str) -> None:
        self._known.discard(key)
        self.live -= size
        self._parts[name] -= size

    def reset(self) -> None:
        """Restart the peaks, from the live bytes, and the operations, from none."""
        self.peak = self.live
        self.operations = Counter()
        self.phases, self.phase_operations, self.phase_parts = {}, {}, {}
        self._before = Counter()
        self._phase = ("forward", 0, "first")
        self._note_phase(self.live)

    def enter(self, phase: Hashable) -> None:
        """A phase of the step begins; it may come again."""
        if self._name is not None:
            ran = Counter({op: n - self._before[op] for op, n in self.operations.items() if n > self._before[op]})
            self.phase_operations.setdefault(self._phase, Counter()).update(ran)
            self._before = self.operations.copy()
        self._phase = phase
        self._note_phase(self.live)

    def _note_phase(self, live: int, passing: str = "") -> None:
        """``passing``: the name of what is live besides :attr:`live`, for a moment."""
        if live <= self.phases.get(self._phase, -1):
            return
        self.phases[self._phase] = live
        if self._name is not None:
            self.phase_parts[self._phase] = found = self._parts.copy()
            found[passing] += live - self.live

    def once(self, key: Hashable, run: Callable[[], T], passing: str = "") -> T:
        """``run()`` the first time; for the same ``key`` again, count its cost and return a result of that shape.

        ``passing`` names what it has for a moment.

        ``run`` returns a tensor or a dataclass of tensors. For a function on meta tensors that keeps no memory besides
        its result: a model computes the same norms in every block, and each consists of thousands of small operations.
        """
        outside, self.operations = self.operations, Counter()
        live, peak = self.live, self.peak
        if key in self._costs:
            operations, extra, make = self._costs[key]
            result = make()
        else:
            self.peak = live
            result = run()
            operations, extra = self.operations, self.peak - live
            self._costs[key] = operations, extra, _maker(result)
        self.peak = max(peak, live + extra)
        self._note_phase(live + extra, passing)
        self.operations = outside
        self.operations.update(operations)
        return result

    def flops(self, attention: bool = True) -> int:
        """FLOPs so far, with or without the fused attention kernels (``FlopCounterMode`` misses them on a CPU)."""
        counted = ((op, count) for op, count in self.operations.items() if attention or not op.attention)
        return sum(op.flops * count for op, count in counted)


def _maker(result: Any) -> Callable[[], Any]:
    """A function that makes tensors like those of ``result``, a tensor or a dataclass of tensors and others."""
    if isinstance(result, Tensor):
        return functools.partial(torch.empty, result.shape, dtype=result.dtype, device=result.device)
    makers = {f.name: _maker(v) for f in fields(result) if isinstance(v := getattr(result, f.name), Tensor)}
    kind, rest = type(result), {f.name: getattr(result, f.name) for f in fields(result) if f.name not in makers}
    return lambda: kind(**rest, **{name: make() for name, make in makers.items()})


def _kind_of(func: Any, formulas: Mapping[Any, Any]) -> _Kind:
    names = [argument.name for argument in func._schema.arguments]
    name = func._schema.name.split("::")[1]
    attention = "attention" in name
    return _Kind(
        name=name,
        formula=formulas.get(func._overloadpacket),
        view=any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns),
        causal_at=names.index("is_causal") if attention and "is_causal" in names else None,
    )


def _with_equal_heads(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """An attention's arguments with as many heads of keys and values as of queries, as views.

    Grouped ones are used that often, and the formulas of torch 2.11 refuse them.
    """
    first = 1 if "backward" in name else 0  # a backward's begin with the output's gradient
    shapes = [t.dim() if isinstance(t, Tensor) else 0 for t in args[first : first + 3]]
    if shapes != [4, 4, 4] or args[first].shape[1] == args[first + 1].shape[1]:
        return args
    heads = args[first].shape[1]
    equal = [t[:, :1].expand(-1, heads, -1, -1) for t in args[first + 1 : first + 3]]
    return (*args[: first + 1], *equal, *args[first + 3 :])


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among an operator's arguments or results, also inside lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _bytes_touched(t: Tensor) -> int:
    size = t.numel() * t.element_size()
    return min(size, t.untyped_storage().nbytes())
