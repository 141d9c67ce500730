"""What autograd saves for a backward, and for how long: hooks on saved tensors that change nothing.

What a hook packs lives exactly as long as autograd would have held the tensor itself. Two others use such hooks, and
are let be: torch's checkpoint, whose hooks are in front of these, so that what it recomputes is seen there; and
functions of ``torch.func`` (Opacus has some), which refuse to run where there are any.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, Protocol
from unittest import mock

import torch
from torch import Tensor

from tools.memory.events import PLAIN, Role

_CHECKPOINT = "torch.utils.checkpoint"
# Between Python code and what it calls into; not what is looked for.
_BETWEEN = frozenset(
    {__name__, "torch._ops", "torch.utils._python_dispatch", "torch.autograd.function", "torch._tensor"}
)
Held = tuple[int, Role]


class Book(Protocol):
    """Where it is written down."""

    def hold_saved(self, t: Tensor, role: Role) -> Held | None:
        """Autograd takes a tensor in; what :meth:`drop_saved` is to be given when it lets go of it."""
        ...

    def drop_saved(self, held: Held) -> None:
        """It has."""
        ...

    def quiet(self) -> contextlib.AbstractContextManager[None]:
        """What is done inside is the profiler's own."""
        ...


class _Saved:
    """What autograd holds in the place of a tensor."""

    __slots__ = ("_book", "_held", "_version", "tensor")

    def __init__(self, tensor: Tensor, book: Book, held: Held | None) -> None:
        self.tensor, self._book, self._held = tensor, book, held
        self._version = _version(tensor)

    def unchanged(self) -> Tensor:
        """The tensor; autograd does not look at the version of one that a hook gives back."""
        if _version(self.tensor) != self._version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                f"tensor of shape {list(self.tensor.shape)} is at version {_version(self.tensor)}; expected version "
                f"{self._version}"
            )
        return self.tensor

    def __del__(self) -> None:
        if self._held is not None:
            self._book.drop_saved(self._held)


class _Hooks:
    """The hooks, and what is done to torch's own ways of setting hooks while they are in place."""

    def __init__(self, book: Book) -> None:
        self.book = book
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)
        self.others = 0  # hooks that are in front of ours
        self._enter = torch.autograd.graph.saved_tensors_hooks.__enter__
        self._exit = torch.autograd.graph.saved_tensors_hooks.__exit__
        self._disable = torch.autograd.graph.disable_saved_tensors_hooks
        self._random_state = torch.get_rng_state

    def pack(self, t: Tensor) -> _Saved:
        held = self.book.hold_saved(t, Role.CHECKPOINT if _called_by_checkpoint() else Role.SAVED)
        with self.book.quiet():
            # Not the tensor itself: an output that its own node saves would hold that node, and so itself.
            kept = t if t.is_leaf or type(t) not in PLAIN else t.detach()
        return _Saved(kept, self.book, held)

    @staticmethod
    def unpack(saved: _Saved) -> Tensor:
        return saved.unchanged()

    def random_state(self) -> Tensor:
        """In the place of ``torch.get_rng_state``, whose result a checkpoint keeps for its recomputation."""
        state = self._random_state()
        if _called_by_checkpoint():
            self.book.hold_saved(state, Role.CHECKPOINT)  # until it dies
        return state

    def enter(self, hooks: Any) -> None:
        """In the place of ``saved_tensors_hooks.__enter__``.

        Hooks that torch's checkpoint sets within a backward take in what it recomputes.
        """
        if type(hooks).__module__ == _CHECKPOINT and torch._C._current_autograd_node() is not None:
            inner: Callable[[Tensor], Any] = hooks.pack_hook

            def pack(t: Tensor) -> Any:
                self.book.hold_saved(t, Role.RECOMPUTED)  # until it dies: nobody is told when a checkpoint drops it
                return inner(t)

            hooks.pack_hook = pack
        self._enter(hooks)
        self.others += 1

    def exit(self, hooks: Any, *error: Any) -> None:
        """In the place of ``saved_tensors_hooks.__exit__``."""
        self.others -= 1
        self._exit(hooks, *error)

    @contextlib.contextmanager
    def disabled(self, message: str) -> Iterator[None]:
        """In the place of ``disable_saved_tensors_hooks``: ours alone are no reason to refuse."""
        if self.others:
            with self._disable(message):
                yield
            return
        self._exit(self.hooks)
        try:
            with self._disable(message):
                yield
        finally:
            self._enter(self.hooks)


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version  # which inference tensors do not count


@contextlib.contextmanager
def watch_saved_tensors(book: Book) -> Iterator[None]:
    """Inside, what autograd saves is written down."""
    watch, graph = _Hooks(book), torch.autograd.graph
    with (
        watch.hooks,
        mock.patch.object(graph.saved_tensors_hooks, "__enter__", lambda hooks: watch.enter(hooks)),
        mock.patch.object(graph.saved_tensors_hooks, "__exit__", lambda hooks, *error: watch.exit(hooks, *error)),
        mock.patch.object(graph, "disable_saved_tensors_hooks", watch.disabled),
        mock.patch.object(torch, "get_rng_state", watch.random_state),
    ):
        yield


def _called_by_checkpoint() -> bool:
    """Whether the nearest Python code is torch's checkpoint."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") in _BETWEEN:
        frame = frame.f_back
    return frame is not None and frame.f_globals.get("__name__") == _CHECKPOINT
