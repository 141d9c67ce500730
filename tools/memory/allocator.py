"""What torch's allocator counts, independently of the tracker: at every mark, and the height of every phase.

A GPU's allocator is asked after every operation. A CPU's cannot be asked; ``torch.profiler`` writes down its every
event, among which each operation and each mark leave a line. So it is known at which operation a phase was highest,
and how much of that was gone when the operation ended: memory that the operation took inside itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

_MARK, _OPERATION = "dpft.mark:", "dpft.operation"


@dataclass
class Height:
    """The highest instant of a phase.

    Attributes:
        total: bytes that were allocated then.
        operation: the number of the operation that ran then, or else of the last one; -1 before the first.
        end: bytes that were allocated when it had ended.
    """

    total: int
    operation: int
    end: int


@dataclass
class Reading:
    """At one mark.

    Attributes:
        allocated: bytes; None where nothing counts them.
        reserved: bytes that a GPU's allocator holds of the device; else None.
        height: of the phase that begins at the mark.
    """

    allocated: int | None = None
    reserved: int | None = None
    height: Height | None = None


class Allocator:
    """Counts nothing: for tensors without data."""

    def __init__(self) -> None:
        self.readings: list[Reading] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """While it lasts, it counts."""
        yield

    @contextlib.contextmanager
    def operation(self) -> Iterator[None]:
        """One operation runs."""
        yield

    def mark(self) -> None:
        """A phase ends, and the next one begins."""
        self.readings.append(Reading())

    def finish(self, base: int) -> None:
        """Fill in what is known only afterwards; ``base`` bytes were there at the first mark."""


class CpuAllocator(Allocator):
    """By the events that ``torch.profiler`` has of it."""

    def __init__(self) -> None:
        super().__init__()
        self._profile: Any = None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with torch.autograd.profiler.profile(use_kineto=True, profile_memory=True) as self._profile:
            yield

    @contextlib.contextmanager
    def operation(self) -> Iterator[None]:
        with torch._C._profiler._RecordFunctionFast(_OPERATION):
            yield

    def mark(self) -> None:
        with torch._C._profiler._RecordFunctionFast(f"{_MARK}{len(self.readings)}"):
            super().mark()

    def finish(self, base: int) -> None:
        lines: list[tuple[int, int, int]] = []  # nanoseconds, kind in the order of their effect at one time, bytes
        for event in self._profile.kineto_results.events():
            name = event.name()
            if name == "[memory]":
                lines.append((event.start_ns(), 2, event.nbytes()))
            elif name == _OPERATION:
                lines += [(event.start_ns(), 1, 0), (event.end_ns(), 3, 0)]
            elif name.startswith(_MARK):
                lines.append((event.start_ns(), 0, 0))
        live, operation, at = base, -1, -1
        for _, kind, size in sorted(lines):
            reading = self.readings[at] if at >= 0 else None
            height = None if reading is None else reading.height
            if kind == 0:
                at += 1
                self.readings[at].allocated, self.readings[at].height = live, Height(live, operation, live)
            elif kind == 1:
                operation += 1
            elif kind == 3:
                if height is not None and height.operation == operation:
                    height.end = min(live, height.total)
            elif height is not None and reading is not None:
                live += size
                if live > height.total:
                    reading.height = Height(live, operation, live)


class CudaAllocator(Allocator):
    """As it says when it is asked after every operation."""

    def __init__(self) -> None:
        super().__init__()
        self._operation = -1

    @contextlib.contextmanager
    def operation(self) -> Iterator[None]:
        self._operation += 1
        try:
            yield
        finally:
            self._read()

    def _read(self) -> None:
        counted = torch.cuda.memory_stats_as_nested_dict()["allocated_bytes"]["all"]
        torch.cuda.reset_peak_memory_stats()
        if not self.readings:
            return
        height = self.readings[-1].height
        if height is None or counted["peak"] > height.total:
            self.readings[-1].height = Height(counted["peak"], self._operation, counted["current"])

    def mark(self) -> None:
        torch.cuda.synchronize()
        self._read()
        now = torch.cuda.memory_allocated()
        self.readings.append(Reading(now, torch.cuda.memory_reserved(), Height(now, self._operation, now)))

    def finish(self, base: int) -> None:
        self._read()


def allocator_of(device: str, simulate: bool) -> Allocator:
    """The one of a device."""
    if simulate:
        return Allocator()
    return CudaAllocator() if device == "cuda" else CpuAllocator()
