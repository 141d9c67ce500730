"""What is measured beside the tracker, and a finished measurement as the fields of a stored result.

The tracker says what every byte is for; the allocator says how many there are. What the second has above the first is
unattributed: memory that an operation takes inside itself, and what no operation returned.
"""

from __future__ import annotations

import functools
import statistics
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from tools.common.meter import MIB
from tools.memory.allocator import Allocator, Height
from tools.memory.components import TEMPORARY, TRACKED
from tools.memory.events import Operation
from tools.memory.replay import Instant, Phase, Shares, Timeline, largest, replay, series
from tools.memory.tracker import Tracker

LARGEST, POINTS = 20, 1500
# The phase that a mark begins.
PHASES = {"0_model_loaded": "wrap", "1_wrapped_with_dp": "optimizer", "2_optimizer_created": "warmup"}
PARTS = {"before_forward": "forward", "after_forward": "backward", "after_backward": "step"}


def phase_of(mark: str) -> str | None:
    """The name of the phase after a mark; None where nothing of interest comes after it."""
    if mark in PHASES:
        return PHASES[mark]
    iteration, _, point = mark.partition("_")
    return f"{iteration}_{PARTS[point]}" if point in PARTS else None


class Readings:
    """What is read at each mark apart from the tracker: the clock, the process, and the allocator."""

    def __init__(self, allocator: Allocator, simulate: bool) -> None:
        self.allocator, self._simulate = allocator, simulate
        self.timestamps: list[float] = []
        self.resident: list[int | None] = []
        self._process = psutil.Process()

    def take(self) -> None:
        """Read everything."""
        self.timestamps.append(time.time())
        self.resident.append(None if self._simulate else self._process.memory_info().rss)
        self.allocator.mark()


@dataclass(frozen=True)
class Peak:
    """The highest instant of a phase: the tracker's bytes by component, and the allocator's total.

    Attributes:
        name: of the phase.
        instant: of the tracker, after the operation at which it was.
        total: bytes that were allocated.
        inside: of these, what the operation took inside itself and gave back.
        module, operator: of the operation; None where there was none, or it is not known.
    """

    name: str
    instant: Instant
    total: int
    inside: int
    module: str | None
    operator: str | None

    def components(self) -> dict[str, float]:
        """MiB by component, and what is unattributed."""
        found = _components(self.instant, self.total - self.inside)
        found[f"{TEMPORARY}_mb"] += self.inside / MIB
        return found


def _mib(size: float | None) -> float | None:
    return None if size is None else size / MIB


def _components(instant: Instant, total: int | None) -> dict[str, float]:
    """MiB by component, with what the allocator has above the tracker."""
    found = {f"{name}_mb": size / MIB for name, size in instant.components.items()}
    return {**found, "unattributed_mb": 0.0 if total is None else (total - instant.total) / MIB}


def _insert(points: list[list[float]], span: list[list[float]]) -> None:
    """Put the points of two neighbouring events where their time is."""
    before = [point for point in points if point[0] <= span[0][0]]
    points[:] = [*before, *span, *points[len(before) :]]


class Profile:
    """The finished measurement of one process, as the fields of a result."""

    def __init__(self, tracker: Tracker, readings: Readings, shares: Shares | None = None) -> None:
        """``shares``: of the rank of an engine that it is simulated for."""
        self.tracker, self.readings, self.shares = tracker, readings, shares
        first = replay(tracker, shares)
        readings.allocator.finish(first.marks[0].total if first.marks else 0)
        self._marks = readings.allocator.readings
        self._at = [self._event_of(phase, mark.height) for phase, mark in zip(first.phases, self._marks, strict=True)]
        self.timeline: Timeline = replay(tracker, shares, wanted=frozenset(self._at))

    def _event_of(self, phase: Phase, height: Height | None) -> int:
        """The event after which a phase was highest: by the allocator, or where it does not count by the tracker."""
        if height is None:
            return phase.peak.event
        after = self.tracker.operations[height.operation].events - 1 if height.operation >= 0 else 0
        return max(phase.first, after)

    def _operation_of(self, phase: Phase, height: Height | None) -> Operation | None:
        """The operation at which a phase was highest; None where it had had none yet."""
        operations = self.tracker.operations
        if height is not None:
            number = height.operation
        else:  # the first that ended after the event
            number = bisect_left(operations, phase.peak.event + 1, key=lambda operation: operation.events)
        found = operations[number] if 0 <= number < len(operations) else None
        return found if found is not None and found.events > phase.first else None

    def snapshots(self) -> list[dict[str, Any]]:
        """What there was at each mark."""
        found = []
        for i, (name, instant) in enumerate(zip(self.tracker.marks, self.timeline.marks, strict=True)):
            read = self._marks[i]
            total = instant.total if read.allocated is None else read.allocated
            found.append(
                {
                    "name": name,
                    "allocated_mb": total / MIB,
                    "reserved_mb": _mib(read.reserved),
                    "resident_mb": _mib(self.readings.resident[i]),
                    "timestamp": self.readings.timestamps[i],
                    "components": _components(instant, read.allocated),
                }
            )
        return found

    @functools.cached_property
    def _named(self) -> list[int]:
        """The events after which the phases of :attr:`peaks` were highest."""
        phases = zip(self.timeline.phases, self._at, strict=True)
        return [at for phase, at in phases if phase_of(phase.name) is not None]

    @functools.cached_property
    def peaks(self) -> list[Peak]:
        """Of the phases that have a name."""
        found = []
        for phase, mark, event in zip(self.timeline.phases, self._marks, self._at, strict=True):
            if (name := phase_of(phase.name)) is None:
                continue
            instant, height = self.timeline.wanted[event], mark.height
            operation = self._operation_of(phase, height)
            module, operator = (operation.module or None, operation.operator) if operation else (None, None)
            total = instant.total if height is None else height.total
            found.append(Peak(name, instant, total, 0 if height is None else total - height.end, module, operator))
        return found

    def phase_fields(self) -> list[dict[str, Any]]:
        """The highest instant of each phase."""
        return [
            {
                "name": peak.name,
                "peak_mb": peak.total / MIB,
                "module": peak.module,
                "operator": peak.operator,
                "components": peak.components(),
            }
            for peak in self.peaks
        ]

    def peak(self) -> Peak:
        """The highest of the measured iterations."""
        return max((p for p in self.peaks if p.name.startswith("iter")), key=lambda p: p.total)

    def tracked_peak(self) -> float:
        """MiB of the highest instant of the measured iterations by the tracker alone."""
        phases = ((phase_of(phase.name) or "", phase.peak.total) for phase in self.timeline.phases)
        return max(total for name, total in phases if name.startswith("iter")) / MIB

    def breakdown(self) -> dict[str, float]:
        """At that instant."""
        peak = self.peak()
        total = peak.total / MIB
        return {**peak.components(), "total_allocated_mb": total, "peak_allocated_mb": total}

    def largest(self) -> list[dict[str, Any]]:
        """What is largest at that instant, alike storages together."""
        peak = self.peak()
        found = largest(self.timeline, peak.instant, LARGEST)
        fields = [{**one, "shape": list(one["shape"])} for one in found]
        if peak.inside:
            inside = {"component": TEMPORARY, "shape": None, "dtype": None, "count": 1, "mb": peak.inside / MIB}
            fields.append({**inside, "operator": f"inside {peak.operator}", "module": peak.module, "private": False})
        return sorted(fields, key=lambda one: -one["mb"])[:LARGEST]

    def timeline_fields(self, iteration: int) -> dict[str, Any] | None:
        """The tracker's components through one iteration."""
        prefix = f"iter{iteration}_"
        inside = [phase for phase in self.timeline.phases if phase.name.startswith(prefix)]
        if not inside:
            return None
        first, last = inside[0].first, inside[-1].first
        start = self.tracker.events[first].at
        points = [
            [(at - start) / 1e6, *(components[name] / MIB for name in TRACKED)]
            for at, components in series(self.timeline, first, last, POINTS)
        ]
        words = ("forward", "backward", "step", "end")
        marks = [[(self.tracker.events[p.first].at - start) / 1e6, w] for p, w in zip(inside, words, strict=False)]
        for peak, event in zip(self.peaks, self._named, strict=True):
            if peak.inside and peak.name.startswith(prefix):
                _insert(points, self._inside_an_operation(peak, event, start))
        return {"unit": "ms", "columns": [f"{name}_mb" for name in TRACKED], "points": points, "marks": marks}

    def host_fields(self, iteration: int, changes: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """Host memory: the most in the measured iterations, and through one of them.

        Args:
            iteration: whose timeline :meth:`timeline_fields` gives.
            changes: nanoseconds, and bytes from then on.
        """

        def span(prefix: str) -> tuple[int, int]:
            inside = [phase for phase in self.timeline.phases if phase.name.startswith(prefix)]
            return self.tracker.events[inside[0].first].at, self.tracker.events[inside[-1].first].at

        start, end = span(f"iter{iteration}_")
        before = [size for at, size in changes if at <= start]
        points = [[0.0, before[-1] / MIB if before else 0.0]]
        points += [[(at - start) / 1e6, size / MIB] for at, size in changes if start < at <= end]
        first, last = span("iter")
        most = max((size for at, size in changes if first <= at <= last), default=0)
        return {"peak_mb": most / MIB, "points": points}

    def _inside_an_operation(self, peak: Peak, event: int, start: int) -> list[list[float]]:
        """The operation of a peak that takes memory inside itself, from the event before it to the next."""
        events, parts = self.tracker.events, peak.instant.components
        until = events[min(event + 1, len(events) - 1)].at
        with_it = {**parts, TEMPORARY: parts[TEMPORARY] + peak.inside}
        return [
            [(at - start) / 1e6, *(components[name] / MIB for name in TRACKED)]
            for at, components in ((events[event].at, with_it), (until, parts))
        ]

    def step_ms(self) -> float:
        """Median time of a measured step under the tracker."""
        events = self.tracker.events
        found = []
        starts = [p.first for p in self.timeline.phases if p.name.endswith("before_forward")]
        ends = [p.first for p in self.timeline.phases if p.name.endswith("after_step")]
        for start, end in zip(starts, ends, strict=False):
            found.append((events[end].at - events[start].at) / 1e6)
        return statistics.median(found)

    def failure(self) -> dict[str, Any] | None:
        """What was live where an operation failed, and where that was."""
        failed = self.tracker.failed
        if failed is None:
            return None
        until = replay(self.tracker, self.shares, count=failed.events)
        now = until.phases[-1] if until.phases else None
        instant = until.end
        return {
            "phase": None if now is None else phase_of(now.name),
            "module": failed.module or None,
            "operator": failed.operator,
            "allocated_mb": instant.total / MIB,
            "components": _components(instant, None),
        }
