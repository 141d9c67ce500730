"""From the events of a step to bytes by component, at every instant: replayed when it is known what became of all.

A storage belongs to the component of the first of its holders in the order of :class:`tools.memory.events.Role`.
Without a holder it is a temporary matrix while the phase lasts in which it was born, and "other" from then on.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tools.common.meter import MIB
from tools.memory.components import OTHER, TEMPORARY, TRACKED
from tools.memory.events import Event, Kind, Role, Storage
from tools.memory.tracker import Tracker

COMPONENT_OF = {
    Role.PARAMETER: "model_parameters",
    Role.BUFFER: "buffers",
    Role.GRADIENT: "gradients",
    Role.OPTIMIZER: "optimizer_states",
    Role.NORM: "norm_samples",
    Role.SAVED: "activation_hooks",
    Role.CHECKPOINT: "checkpoint_inputs",
    Role.KEPT: "book_keeping",
    Role.RECOMPUTED: "activation_hooks",
    Role.INPUT: "other",
}


@dataclass
class Instant:
    """What was live after one event.

    Attributes:
        event: its index.
        total: bytes.
        components: bytes by component.
    """

    event: int
    total: int
    components: dict[str, int]


@dataclass
class Phase:
    """Between two marks: the first and the last event, and the highest instant."""

    name: str
    first: int
    last: int
    peak: Instant


@dataclass
class Timeline:
    """A replay of all events.

    Attributes:
        storages, events: the tracker's.
        shares: of the rank that it is of.
        phases: one for each mark, from it to the next; the name is the mark's.
        marks: the instant of each mark.
        end: the last instant.
        highest: the most bytes of each component from the first mark of an iteration on.
        wanted: instants by the event that they are after, where they were asked for.
    """

    storages: list[Storage]
    events: list[Event]
    shares: Shares | None
    end: Instant
    phases: list[Phase] = field(default_factory=list)
    marks: list[Instant] = field(default_factory=list)
    wanted: dict[int, Instant] = field(default_factory=dict)
    highest: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TRACKED, 0))


@dataclass(frozen=True)
class Shares:
    """What one of several ranks holds of what one process would.

    Attributes:
        factors: of a component's bytes.
        constants: bytes in the place of a component's, while it has any.
        added: bytes beside a component's.
    """

    factors: dict[str, float]
    constants: dict[str, int]
    added: dict[str, int]

    def of(self, components: dict[str, int]) -> dict[str, int]:
        """Bytes by component of one rank."""
        found = {name: math.ceil(size * self.factors.get(name, 1.0)) for name, size in components.items()}
        found |= {name: size for name, size in self.constants.items() if components[name]}
        return {name: size + self.added.get(name, 0) for name, size in found.items()}


class Replay:
    """The state of every storage while events go by."""

    def __init__(self, storages: list[Storage], shares: Shares | None = None) -> None:
        self.storages, self.shares = storages, shares
        self.bytes: Counter[str] = Counter()
        self._total = 0
        self.live: dict[int, str] = {}
        self._roles: dict[int, Counter[Role]] = {}
        self._new: set[int] = set()  # born in this phase

    def apply(self, event: Event) -> None:
        """Go on by one event."""
        index, kind = event.storage, event.kind
        if kind == Kind.MARK:
            for born in self._new:
                if self.live[born] == TEMPORARY:
                    self._move(born, OTHER)
            self._new.clear()
        elif kind == Kind.BIRTH:
            becomes = self.storages[index].becomes
            self._roles[index] = Counter() if becomes is None else Counter({becomes: 1})
            self.live[index] = TEMPORARY
            self.bytes[TEMPORARY] += self.storages[index].size
            self._total += self.storages[index].size
            self._new.add(index)
            self._settle(index)
        elif kind == Kind.DEATH:
            self.bytes[self.live.pop(index)] -= self.storages[index].size
            self._total -= self.storages[index].size
            self._new.discard(index)
            del self._roles[index]
        elif index in self._roles and event.role is not None:
            self._roles[index][event.role] += 1 if kind == Kind.HOLD else -1
            self._settle(index)

    def _settle(self, index: int) -> None:
        held = [role for role, count in self._roles[index].items() if count > 0]
        self._move(index, COMPONENT_OF[min(held)] if held else TEMPORARY if index in self._new else OTHER)

    def _move(self, index: int, component: str) -> None:
        size = self.storages[index].size
        self.bytes[self.live[index]] -= size
        self.live[index] = component
        self.bytes[component] += size

    @property
    def components(self) -> dict[str, int]:
        """Bytes by component, now."""
        whole = {name: self.bytes[name] for name in TRACKED}
        return whole if self.shares is None else self.shares.of(whole)

    @property
    def total(self) -> int:
        """Bytes now."""
        return self._total if self.shares is None else sum(self.components.values())

    def instant(self, event: int) -> Instant:
        """What is live now, after the event of that index."""
        return Instant(event, self.total, self.components)


def replay(
    tracker: Tracker, shares: Shares | None = None, count: int | None = None, wanted: frozenset[int] = frozenset()
) -> Timeline:
    """Go through a tracker's events, all or the first ``count``, as one process or as one rank of several.

    ``wanted``: events after which the instant is kept besides.
    """
    state = Replay(tracker.storages, shares)
    timeline = Timeline(tracker.storages, tracker.events, shares, state.instant(0))
    measured = False
    for i, event in enumerate(tracker.events[:count]):
        state.apply(event)
        if measured and event.kind not in (Kind.DROP, Kind.DEATH):  # what is let go of most often dies next
            for name, size in state.components.items():
                timeline.highest[name] = max(timeline.highest[name], size)
        if i in wanted:
            timeline.wanted[i] = state.instant(i)
        if event.kind == Kind.MARK:
            measured = measured or tracker.marks[event.storage].startswith("iter")
            timeline.marks.append(state.instant(i))
            timeline.phases.append(Phase(tracker.marks[event.storage], i, i, state.instant(i)))
        elif timeline.phases:
            phase = timeline.phases[-1]
            phase.last = i
            # Owners are asked right after the birth that reaches the height.
            if state.total > phase.peak.total or (state.total == phase.peak.total and event.kind == Kind.HOLD):
                phase.peak = state.instant(i)
    timeline.end = state.instant(len(tracker.events[:count]) - 1)
    return timeline


def series(timeline: Timeline, first: int, last: int, most: int) -> list[tuple[int, dict[str, int]]]:
    """Nanoseconds and components after the events from ``first`` to ``last``, thinned out to at most ``most``.

    Of each group of neighbours the highest is taken, so that no peak is lost.
    """
    state = Replay(timeline.storages, timeline.shares)
    group = max(1, -(-(last - first + 1) // most))
    found: list[tuple[int, dict[str, int]]] = []
    best: tuple[int, int, dict[str, int]] | None = None
    for i, event in enumerate(timeline.events[: last + 1]):
        state.apply(event)
        if i < first:
            continue
        if best is None or state.total > best[0] or (state.total == best[0] and event.kind == Kind.HOLD):
            best = state.total, event.at, state.instant(i).components
        if (i - first + 1) % group == 0 or i == last:
            found.append(best[1:])
            best = None
    return found


def largest(timeline: Timeline, at: Instant, most: int) -> list[dict[str, Any]]:
    """The largest storages that were live after an event, those alike counted together, largest sum first."""
    state = Replay(timeline.storages)
    for event in timeline.events[: at.event + 1]:
        state.apply(event)
    kinds: Counter[tuple[Any, ...]] = Counter()
    for index, component in state.live.items():
        s = timeline.storages[index]
        kinds[component, s.shape, s.dtype, s.operator, _starred(s.module), s.private, s.size] += 1
    found = sorted(kinds.items(), key=lambda item: -item[0][-1] * item[1])
    names = ("component", "shape", "dtype", "operator", "module", "private")
    return [
        {**dict(zip(names, kind, strict=False)), "count": count, "mb": kind[-1] * count / MIB}
        for kind, count in found[:most]
    ]


def _starred(module: str) -> str:
    """The name with every number in it as a star: the blocks of a model are alike."""
    return ".".join("*" if part.isdigit() else part for part in module.split("."))
