"""The inputs of checkpoints wait in host memory for their backward.

A non-reentrant checkpoint saves its tensor arguments as any node does, so hooks on saved tensors around its call,
below its own, act on exactly these. The copies run on a side stream, at most two at a time; the input of the layer
before is on its way back while a layer is in its backward.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dpft.errors import ClippingError

# Smaller inputs are not worth a transfer.
LEAST_BYTES = 1 << 20
_IN_TRANSIT = 2

HOST: dict[int, int] = {}
"""Bytes of the storages of :class:`HostCopies` that are alive, by key: a count of device memory leaves them out."""


class Parked(Protocol):
    """One tensor in host memory."""

    def fetch(self) -> None:
        """Begin to bring it back, unless it is on its way."""
        ...

    def get(self) -> Tensor:
        """The tensor on its device. May be called again: it stays in host memory."""
        ...


class Offloader:
    """Moves tensors of a GPU to pinned host memory; those of a CPU are there already, and stay.

    Args:
        park: makes a :class:`Parked` of a tensor; None: :class:`PinnedCopy` for a GPU, nothing for a CPU.
        least_bytes: of a tensor that is moved.
    """

    def __init__(self, park: Callable[[Tensor], Parked] | None = None, least_bytes: int = LEAST_BYTES) -> None:
        self._park, self._least = park, least_bytes
        self._last: Callable[[], _Place | None] = _nothing

    def __deepcopy__(self, memo: dict[int, Any]) -> Offloader:
        return Offloader(self._park, self._least)

    def restart(self) -> None:
        """A forward begins: what is parked next has nothing before it."""
        self._last = _nothing

    def pack(self, t: Tensor) -> Tensor | _Place:
        """Hook of a tensor that is saved."""
        park = self._park or (PinnedCopy if t.device.type == "cuda" else None)
        if park is None or not t.is_floating_point() or t.numel() * t.element_size() < self._least:
            return t
        place = _Place(park(t.detach()), self._last)
        self._last = weakref.ref(place)
        return place

    @staticmethod
    def unpack(packed: Tensor | _Place) -> Tensor:
        """Hook of a tensor that is needed; called once in each traversal of the graph."""
        if isinstance(packed, Tensor):
            return packed
        found = packed.parked.get()
        before = packed.before()
        if before is not None:
            before.parked.fetch()
        return found


class _Place:
    """A parked tensor, and the one that was parked before it, which the backward needs next."""

    def __init__(self, parked: Parked, before: Callable[[], _Place | None]) -> None:
        self.parked, self.before = parked, before


def _nothing() -> None:
    return None


class OffloadedCheckpoint:
    """transformers' checkpoint function of one layer, with its inputs offloaded.

    Args:
        function: the checkpoint function.
        offloader: of all layers of the model.
        first: whether a forward begins with this layer.
    """

    def __init__(self, function: Callable[..., Any], offloader: Offloader, first: bool) -> None:
        self.function, self._offloader, self._first = function, offloader, first
        self.keywords = getattr(function, "keywords", {})  # read by others: whether the random state is preserved

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.function(run, *args, **kwargs)
        if self._first:
            self._offloader.restart()
        with torch.autograd.graph.saved_tensors_hooks(self._offloader.pack, Offloader.unpack):
            return self.function(run, *args, **kwargs)


class HostCopies:
    """A copy in other memory of the same CPU, which :data:`HOST` knows: what a GPU's offload does, for tests."""

    def __init__(self, t: Tensor) -> None:
        # numpy's memory: no operation of torch makes it, so no count has seen it before it is known here.
        raw = torch.from_numpy(np.empty(t.numel() * t.element_size(), dtype=np.uint8))
        key = raw.untyped_storage()._cdata
        HOST[key] = raw.untyped_storage().nbytes()
        weakref.finalize(raw.untyped_storage(), HOST.pop, key)
        self._host = raw.view(t.dtype).view(t.shape)
        self._host.copy_(t)
        self._incoming: Tensor | None = None

    def fetch(self) -> None:
        if self._incoming is None:
            self._incoming = torch.empty_like(self._host).copy_(self._host)

    def get(self) -> Tensor:
        self.fetch()
        found, self._incoming = self._incoming, None
        assert found is not None
        return found


class _Side:
    """The side stream of one device, and the copies to the host that have not ended."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.outgoing: list[tuple[Tensor, int, torch.cuda.Event]] = []

    def settle(self, most: int) -> None:
        """Wait until at most so many copies are in transit, and let go of the tensors of those that have ended."""
        while self.outgoing and (len(self.outgoing) > most or self.outgoing[0][2].query()):
            source, version, event = self.outgoing.pop(0)
            event.synchronize()
            if source._version != version:
                raise ClippingError(
                    "the input of a checkpointed layer was changed in place while it was copied to host memory, so "
                    "its recomputation would see something else. Use operations that do not change their input, or "
                    "dpft.long_context(model, offload_checkpoints=False)."
                )


_SIDES: dict[torch.device, _Side] = {}


def _side(device: torch.device) -> _Side:
    if device not in _SIDES:  # a tensor's, which has an index
        _SIDES[device] = _Side(device)
    return _SIDES[device]


class PinnedCopy:
    """A tensor of a GPU in pinned host memory."""

    def __init__(self, t: Tensor) -> None:
        self._device = t.device
        side = _side(t.device)
        side.settle(_IN_TRANSIT - 1)
        self._host = torch.empty(t.shape, dtype=t.dtype, pin_memory=True)
        side.stream.wait_stream(torch.cuda.current_stream(t.device))  # what computes t
        with torch.cuda.stream(side.stream):
            self._host.copy_(t, non_blocking=True)
            event = torch.cuda.Event()
            event.record(side.stream)
        # Held until the copy has ended: its memory is not given to another tensor before.
        side.outgoing.append((t, t._version, event))
        self._incoming: tuple[Tensor, torch.cuda.Event] | None = None

    def fetch(self) -> None:
        if self._incoming is not None:
            return
        side = _side(self._device)
        side.settle(_IN_TRANSIT)
        with torch.cuda.device(self._device), torch.cuda.stream(side.stream):  # after its copy to the host
            t = torch.empty(self._host.shape, dtype=self._host.dtype, device=self._device)
            t.copy_(self._host, non_blocking=True)
            event = torch.cuda.Event()
            event.record(side.stream)
        self._incoming = t, event

    def get(self) -> Tensor:
        self.fetch()
        assert self._incoming is not None
        (t, event), self._incoming = self._incoming, None
        now = torch.cuda.current_stream(self._device)
        now.wait_event(event)
        t.record_stream(now)  # it was allocated on the side stream, and is used on this one
        return t
