"""Every storage of a training step, from its birth to its death, and who holds it in between: the events of a profile.

A dispatch mode sees each storage when an operation returns it, and a weak reference when nothing holds it any more, so
that a storage counts once, whatever views there are of it. Who holds it is observed, never computed:

- parameters, buffers, the batch, ``.grad``, the optimiser's states and what the private step keeps, by asking their
  owners for their tensors, at every mark and whenever a phase reaches a new height;
- what autograd saves, by hooks on saved tensors, whose objects live exactly as long as autograd holds them;
- what a checkpoint recomputes, by the hooks on saved tensors that it has in place while it does so.

Nothing is decided here. The events are replayed afterwards (:mod:`tools.memory.replay`), when it is known what
became of a storage: one that ends as a gradient, without a copy, was one from its birth.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
import threading
import time
import weakref
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from tools.memory.allocator import Allocator
from tools.memory.events import PLAIN, Event, Kind, Operation, Owners, Role, Storage
from tools.memory.saved_tensors import watch_saved_tensors

# Code of a private step, by the name of the module. The functions below only start others: what autograd's own nodes
# make in a backward is the model's, and what the inner optimiser makes is its own.
PRIVATE_CODE = ("dpft.kernels.", "dpft.clipping.", "dpft.rules.base", "dpft.noise", "dpft.optimizer", "opacus.")
_ONLY_STARTS = frozenset(
    {
        ("dpft.clipping.strategies", "traverse"),
        ("dpft.clipping.strategies", "run_plain"),
        ("dpft.clipping.one_by_one", "_example_gradient"),
        ("dpft.clipping.boundary", "backward"),
        ("dpft.optimizer", "step"),
        ("opacus.optimizers.optimizer", "step"),
        ("opacus.utils.fast_gradient_clipping_utils", "backward"),
        ("opacus.utils.fast_gradient_clipping_utils", "__call__"),
        ("opacus.grad_sample.grad_sample_module", "forward"),
    }
)
_NO_MODULE = 1 << 63  # nodes that accumulate gradients have the largest number there is
# Births after which owners are asked again though the phase has reached no new height.
_ASK_EVERY = 16


@dataclass
class _Modules:
    """Where a forward is, and which module made the nodes of autograd with which numbers.

    The numbers are each thread's own. A GPU's backward has a thread of its own, and what a checkpoint recomputes there
    is not noted: the nodes that run are those of the forward, but for a reentrant checkpoint's, whose module may then
    be a wrong one.
    """

    names: dict[int, str]
    thread: int = field(default_factory=threading.get_ident)
    stack: list[str] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    makers: list[str] = field(default_factory=list)

    def enter(self, module: nn.Module, *_: Any) -> None:
        self.stack.append(self.names.get(id(module), type(module).__name__))
        self._note()

    def leave(self, *_: Any) -> None:
        if self.stack:
            self.stack.pop()
        self._note()

    def _note(self) -> None:
        if threading.get_ident() != self.thread:
            return
        self.numbers.append(torch._C._autograd._get_sequence_nr())
        self.makers.append(self.stack[-1] if self.stack else "")

    def now(self) -> str:
        """The module that runs, forward or backward; empty where there is none."""
        node: Any = torch._C._current_autograd_node()
        if node is None or torch.is_grad_enabled():  # a checkpoint recomputes its forward within a backward
            return self.stack[-1] if self.stack else ""
        number = node._sequence_nr()
        at = bisect_right(self.numbers, number) - 1
        return self.makers[at] if at >= 0 and number < _NO_MODULE else ""


class Tracker(TorchDispatchMode):
    """Inside, writes down events.

    Attributes:
        events: in order.
        storages: by index.
        marks: names, by index.
        live: bytes now.
        owners: asked from now on.
        operations: in order.
        inside: bytes that an operation takes inside itself, by the operator and its arguments: where nothing is
            computed, and it is not to be seen.
        failed: where the last error was raised, which a library may have caught; None while there is none.

    Args:
        device: type of the device whose storages are followed.
        owners: of the model, the optimiser and the private step.
        names: of the modules, by ``id``.
        allocator: is told of each operation.
        take: called at each mark.
    """

    def __init__(
        self,
        device: str,
        owners: Owners,
        names: dict[int, str],
        allocator: Allocator,
        take: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.storages: list[Storage] = []
        self.marks: list[str] = []
        self.live = 0
        self._height = self._births = self._top = 0
        self._once: dict[Hashable, tuple[int, Callable[[], Tensor]]] = {}
        self._device, self.owners = device, owners
        self._take, self._allocator = take, allocator
        self.failed: Operation | None = None
        self.inside: Callable[[Any, Any], int] | None = None
        self.operations: list[Operation] = []
        self._index: dict[int, int] = {}
        self._watched: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._owned: dict[str, set[tuple[int, Role]]] = {"steady": set(), "changing": set()}
        self._modules = _Modules(names)
        self._exits = contextlib.ExitStack()
        self._quiet = False

    def __enter__(self) -> Tracker:
        for handle in (
            register_module_forward_pre_hook(self._modules.enter),
            register_module_forward_hook(self._modules.leave, always_call=True),
        ):
            self._exits.callback(handle.remove)
        self._exits.enter_context(watch_saved_tensors(self))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._exits.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._quiet:
            return func(*args, **(kwargs or {}))
        try:
            with self._allocator.operation():
                out = func(*args, **(kwargs or {}))
        except Exception:
            self.failed = Operation(len(self.events), self._modules.now(), _name(func))
            self.operations.append(self.failed)  # the allocator counts it too
            raise
        given = itertools.chain(args, kwargs.values()) if kwargs else args
        for t in itertools.chain(_tensors((out,)), _tensors(given)):
            storage = t.untyped_storage()
            if storage._cdata not in self._index:
                self._born(t, storage, func)
        if self.inside is not None and (size := self.inside(func, args)):
            self._pass(size, _name(func), _in_private_code(sys._getframe(1)))
        self.operations.append(Operation(len(self.events), self._modules.now(), _name(func)))
        return out

    # -----------------------------------------------------------------------------------------------------------------
    # What happens to storages

    def _note(self, kind: Kind, storage: int, role: Role | None = None) -> None:
        self.events.append(Event(time.perf_counter_ns(), kind, storage, role))

    def _born(self, t: Tensor, storage: torch.UntypedStorage, func: Any) -> int | None:
        if storage.device.type != self._device:
            return None
        if self._device == "cpu" and not storage.resizable():
            return None  # memory of NumPy's or of a file, which torch did not allocate
        index, key = len(self.storages), storage._cdata
        dtype = str(t.dtype).removeprefix("torch.")
        private = func is not None and _in_private_code(sys._getframe(2))
        module = "" if func is None else self._modules.now()
        self.storages.append(Storage(storage.nbytes(), tuple(t.shape), dtype, _name(func), module, private))
        self._index[key] = index
        self._watched[index] = weakref.ref(storage, lambda _: self._died(index, key))
        self.live += self.storages[index].size
        self._note(Kind.BIRTH, index)
        if func is not None:
            self._reached()
        return index

    def _reached(self) -> None:
        self._top = max(self._top, self.live)
        self._births += 1
        if self.live >= self._height or self._births % _ASK_EVERY == 0:
            self._height = max(self._height, self.live)
            self._ask("changing")

    def _died(self, index: int, key: int) -> None:
        del self._index[key], self._watched[index]
        self.live -= self.storages[index].size
        self._note(Kind.DEATH, index)

    def _find(self, t: Tensor) -> int | None:
        if type(t) not in PLAIN:
            return None  # a tensor subclass: its storage, if it has one, is that of the tensors that it is made of
        storage = t.untyped_storage()
        index = self._index.get(storage._cdata)
        return self._born(t, storage, None) if index is None else index

    # -----------------------------------------------------------------------------------------------------------------
    # Who holds them

    def hold_saved(self, t: Tensor, role: Role) -> tuple[int, Role] | None:
        """Autograd takes a tensor in; what :meth:`drop_saved` is to be given when it lets go of it."""
        if (index := self._find(t)) is None:
            return None
        if role == Role.SAVED and self.storages[index].private:
            role = Role.KEPT
        self._note(Kind.HOLD, index, role)
        return index, role

    def drop_saved(self, held: tuple[int, Role]) -> None:
        """It has."""
        self._note(Kind.DROP, *held)

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """What is done inside is the profiler's own."""
        self._quiet = True
        try:
            yield
        finally:
            self._quiet = False

    def _ask(self, which: str) -> None:
        """Compare what the owners hold now with what they held when they were last asked."""
        found = set()
        with self.quiet():
            for role, t in getattr(self.owners, which)():
                index = self._find(t)
                if index is not None:
                    found.add((index, role))
        before = self._owned[which]
        for index, role in before - found:
            self._note(Kind.DROP, index, role)
        for index, role in found - before:
            self._note(Kind.HOLD, index, role)
            if role in (Role.GRADIENT, Role.OPTIMIZER):
                self.storages[index].becomes = role
        self._owned[which] = found

    def is_gradient(self, parameter: Tensor) -> None:
        """A hook for when a parameter's gradient was accumulated."""
        if parameter.grad is not None and (index := self._find(parameter.grad)) is not None:
            self.storages[index].becomes = Role.GRADIENT

    def once(self, key: Hashable, run: Callable[[], Tensor]) -> Tensor:
        """``run()`` the first time; for the same ``key`` again the height that it reached, and a result of its shape.

        For a function that holds nothing but its result when it returns, on tensors without data.
        """
        if key not in self._once:
            before, top = self.live, self._top
            self._top = before
            result = run()
            self._once[key] = (
                self._top - before,
                functools.partial(torch.empty, result.shape, dtype=result.dtype, device=result.device),
            )
            self._top = max(top, self._top)
            return result
        extra, make = self._once[key]
        result = make()
        self._pass(extra - result.untyped_storage().nbytes(), "(norm)", private=True)
        return result

    def _pass(self, size: int, operator: str, private: bool) -> None:
        """Storage that is there for a moment, and of which nothing is seen but its size."""
        passing = len(self.storages)
        self.storages.append(Storage(size, (), "", operator, self._modules.now(), private))
        self.live += size
        self._note(Kind.BIRTH, passing)
        self._reached()
        self.live -= size
        self._note(Kind.DEATH, passing)

    def mark(self, name: str) -> None:
        """Write down an instant at which a phase ends and the next one begins."""
        self._ask("steady")
        self._ask("changing")
        self._note(Kind.MARK, len(self.marks))
        self.marks.append(name)
        self._height = self.live
        self._take()


@functools.cache
def _name(func: Any) -> str:
    return "" if func is None else str(func).removeprefix("aten.")


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among an operator's arguments or results, in lists and tuples too."""
    for value in values:
        if isinstance(value, Tensor):
            if type(value) in PLAIN:
                yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _in_private_code(frame: Any) -> bool:
    """Whether the nearest Python code that is not torch's belongs to a private step."""
    while frame is not None:
        name = frame.f_globals.get("__name__") or ""
        if name != __name__ and not name.startswith("torch"):
            return name.startswith(PRIVATE_CODE) and (name, frame.f_code.co_name) not in _ONLY_STARTS
        frame = frame.f_back
    return False
