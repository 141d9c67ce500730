"""What the bytes at a simulated peak are: each storage is named after the code that made it."""

from __future__ import annotations

import contextlib
import sys
from bisect import bisect_right
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from dpft.long_context import tiles
from dpft.long_context.install import LongContext

__all__ = ["GRADIENTS", "HEAD", "HIDDEN", "INPUTS", "Parts"]

GRADIENTS, SUMS, HEAD = "gradients and norms", "clipped sums", "head chunk"
INPUTS, LAYER, HIDDEN = "checkpoint inputs on the device", "activations of one layer", "hidden states outside layers"
# Code that makes gradients and norms. The functions below only start a backward.
_PRIVATE = ("dpft.kernels.", "dpft.clipping.", "dpft.rules.base", "dpft.rules.tiles", "dpft.planning.rank")
_ONLY_STARTS = {"traverse", "run_plain", "backward", "_example_gradient"}
_NO_MODULE = 1 << 63  # nodes that accumulate gradients have the largest number there is


class Parts:
    """Names for storages at their birth, of a twin on which ``dpft.long_context`` is on.

    A backward's node is of the module that ran when it was made, by the numbers that autograd gives its nodes.
    """

    def __init__(self, twin: nn.Module, installed: LongContext) -> None:
        self._names: dict[int, str] = {}
        for layer in installed.layers:
            self._names[id(layer)] = LAYER
            for name, child in layer.named_children():
                for module in child.modules():
                    self._names[id(module)] = f"{name} of one layer"
        # by the id of a block's dpft.long_context.tiles.Tiles
        self._tiled = {id(b.owner.__dict__["_dpft_tiles"][b.method]): b.owner for b in installed.blocks}
        self._stack: list[str] = []
        self._numbers: list[int] = []
        self._makers: list[str] = []
        self._forced: list[str] = []

    def __call__(self) -> str:
        """The name of a storage that is born now."""
        if self._forced and self._forced[-1] == HEAD:
            return HEAD
        frame: Any = sys._getframe(1)
        while frame is not None:
            name = frame.f_globals.get("__name__") or ""
            if not name.startswith(("torch", __name__, "dpft.planning.step_meter")):
                break
            frame = frame.f_back
        function = "" if frame is None else frame.f_code.co_name
        if name == "dpft.planning.rank" and function == "_add_to":
            return SUMS
        if name.startswith(_PRIVATE) and function not in _ONLY_STARTS:
            return GRADIENTS
        if name == "dpft.planning.long_text" and function == "fetch":
            return INPUTS
        return self._forced[-1] if self._forced else self._module()

    def _module(self) -> str:
        node: Any = torch._C._current_autograd_node()
        if node is None or torch.is_grad_enabled():  # a checkpoint recomputes its forward within a backward
            return self._stack[-1] if self._stack else HIDDEN
        number = node._sequence_nr()
        at = bisect_right(self._numbers, number) - 1
        return self._makers[at] if at >= 0 and number < _NO_MODULE else HIDDEN

    def _enter(self, module: nn.Module, *_: Any) -> None:
        self._stack.append(self._names.get(id(module), self._stack[-1] if self._stack else HIDDEN))
        self._note()

    def _leave(self, *_: Any) -> None:
        if self._stack:
            self._stack.pop()
        self._note()

    def _note(self) -> None:
        self._numbers.append(torch._C._autograd._get_sequence_nr())
        self._makers.append(self._stack[-1] if self._stack else HIDDEN)

    @contextlib.contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """A context in which births have this name, unless they are gradients."""
        self._forced.append(name)
        try:
            yield
        finally:
            self._forced.pop()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """A context in which the twin's modules and tiles are followed."""
        parts, plain = self, tiles._Call._tile

        @contextlib.contextmanager
        def tile(call: Any, *args: Any) -> Iterator[None]:
            owner = parts._tiled.get(id(call._tiles))
            with parts.inside(f"one tile of {type(owner).__name__}"), plain(call, *args):
                yield

        handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]
        try:
            with mock.patch.object(tiles._Call, "_tile", tile):
                yield
        finally:
            for handle in handles:
                handle.remove()
