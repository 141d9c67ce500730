"""Times of several experiments in rounds: one step of each in turn, so that what slows the machine slows them all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tools.common.worker import KILLED, WorkerError

MARGIN = 0.8  # of the memory that is free: the share that the processes may need together


class Stepper(Protocol):
    """A process that is warmed up; see :class:`tools.memory.steps.TimedSteps`."""

    def step(self) -> float:
        """Milliseconds of one step.

        Raises:
            WorkerError: the step failed, or the process died.
        """
        ...

    def end(self) -> None:
        """End the process."""
        ...


Start = Callable[[str], Stepper]


@dataclass
class Times:
    """What was timed of one experiment.

    Attributes:
        milliseconds: of the step of each round; fewer than the rounds where one failed.
        failure: why; None where all went well.
        beside: the experiments whose processes were alive at the same time and stepped in the same rounds.
        alone_because: why there are none; None where there are.
    """

    milliseconds: list[float] = field(default_factory=list)
    failure: WorkerError | None = None
    beside: list[str] = field(default_factory=list)
    alone_because: str | None = None

    def ratios(self, vanilla: Times) -> list[float]:
        """Each time over vanilla's of the same round; empty where the two were not timed in the same rounds."""
        if self.alone_because is not None:
            return []
        return [a / b for a, b in zip(self.milliseconds, vanilla.milliseconds, strict=False)]


def too_large(needed_mb: Mapping[str, float], free_mb: float) -> str | None:
    """Why processes do not fit into memory at the same time; None where they do.

    Args:
        needed_mb: MiB that each process takes at its peak.
        free_mb: MiB that are free.
    """
    total = sum(needed_mb.values())
    if total <= MARGIN * free_mb:
        return None
    return f"{len(needed_mb)} processes at once may need {total:.0f} MiB; {free_mb:.0f} MiB are free"


def time_in_rounds(
    names: Sequence[str],
    start: Start,
    rounds: int,
    say: Callable[[str], None],
    alone_because: str | None = None,
) -> dict[str, Times]:
    """Time every experiment, all processes alive at once, or one process after the other.

    Within a round each experiment takes one step; the order goes back and forth from round to round, so that a machine
    that grows slower or faster favours none of them. Where one of several processes runs out of memory, all are timed
    again, alone.

    Args:
        names: of the experiments.
        start: makes a process and warms it up; raises :class:`WorkerError` where that fails.
        rounds: how many, at least 1.
        say: is told what is going on.
        alone_because: why the experiments are not to be timed together; None where they are.

    Returns:
        For each name its times.
    """
    if len(names) == 1:
        alone_because = alone_because or "it is the only experiment"
    if alone_because is None:
        found = _together(names, start, rounds, say)
        crowded = [name for name, times in found.items() if times.failure and lacked_memory(times.failure)]
        if not crowded:
            return found
        alone_because = f"{crowded[0]} ran out of memory beside the others"
        say(f"{alone_because}: each alone")
    times: dict[str, Times] = {}
    for name in names:
        times |= _together([name], start, rounds, say)
        times[name].alone_because = alone_because
    return times


def lacked_memory(error: WorkerError) -> bool:
    """An allocation failed, or the system killed the process."""
    return error.out_of_memory or error.status == KILLED


def _together(names: Sequence[str], start: Start, rounds: int, say: Callable[[str], None]) -> dict[str, Times]:
    """The rounds of processes that are alive at the same time; they are ended, whatever happens."""
    found = {name: Times(beside=[other for other in names if other != name]) for name in names}
    steppers: dict[str, Stepper] = {}
    try:
        for name in names:
            try:
                steppers[name] = start(name)
            except WorkerError as error:
                found[name].failure = error
        for number in range(rounds):
            going = [name for name in names if found[name].failure is None]
            for name in going if number % 2 == 0 else reversed(going):
                say(f"{name}: time, round {number + 1} of {rounds}")
                try:
                    found[name].milliseconds.append(steppers[name].step())
                except WorkerError as error:
                    found[name].failure = error
        return found
    finally:
        for stepper in steppers.values():
            stepper.end()
