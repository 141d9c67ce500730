"""Measure experiments, each in processes of its own: memory one after the other, then time in common rounds.

A process starts with an empty allocator, and one that dies or runs out of memory takes nothing with it but its own
answer. What the processes answer becomes one result for each experiment (:mod:`tools.memory.result`).
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import psutil

from tools.common.conditions import conditions
from tools.common.meter import MIB
from tools.common.rounds import Stepper, Times, lacked_memory, time_in_rounds, too_large
from tools.common.spread import spread
from tools.common.worker import Worker, WorkerError
from tools.memory.memory_process import measure_memory
from tools.memory.result import SCHEMA
from tools.memory.setup import EXPERIMENTS, Setup
from tools.memory.steps import TimedSteps

PRELOAD = ["torch", "transformers.models.llama.modeling_llama", "opacus", "dpft"]
PRELOAD += ["tools.memory.memory_process", "tools.memory.steps"]
Say = Callable[[str], None]


def prepare_environment(threads: int) -> None:
    """Set what the libraries read when the processes import them."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # ended processes leave their locks
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


@dataclass
class Measured:
    """What is known of one experiment so far.

    Attributes:
        name: one of :data:`tools.memory.setup.EXPERIMENTS`.
        setup: of the first repetition.
        answers: of the memory processes, one for each repetition; the last may be a failure.
        times: of each repetition, of the timing processes.
        ratios: each time over vanilla's of the same round, those of all repetitions; empty where there are none.
        conditions: machine, versions and commit when it was measured.
    """

    name: str
    setup: Setup
    answers: list[dict[str, Any]] = field(default_factory=list)
    times: list[Times] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    conditions: dict[str, Any] = field(default_factory=dict)

    def needed_mb(self) -> float:
        """MiB that a process takes at its peak, its tensors and what it takes beside them."""
        reserved = max((snapshot["reserved_mb"] or 0.0 for snapshot in self.answers[0]["snapshots"]), default=0.0)
        return float(max(reserved, self.answers[0]["peak_memory_mb"]) + self.answers[0]["beside_mb"])

    def failed(self) -> dict[str, Any] | None:
        """Status, reason and failure of the first process that failed; None where none did."""
        for answer in self.answers:
            if answer["status"] != "ok":
                return answer
        for times in self.times:
            if times.failure is not None:
                return failure_fields(times.failure, "timing")
        return None

    def result(self, repetitions: int) -> dict[str, Any]:
        """As :func:`tools.memory.result.validate` checks it: of the first repetition, with times and spread of all."""
        found, failed = self.answers[0], self.failed()
        peaks = [answer["peak_memory_mb"] for answer in self.answers if answer["status"] == "ok"]
        values = [value for times in self.times for value in times.milliseconds]
        tracked = found.get("tracked_step_ms")
        return {
            "schema": SCHEMA,
            "experiment": self.name,
            "words": EXPERIMENTS[self.name].words,
            "status": "ok" if failed is None else failed["status"],
            "reason": None if failed is None else failed["reason"],
            "failure": None if failed is None else failed.get("failure"),
            "config": self.setup.config(),
            "parameters": found.get("parameters"),
            "avg_time_ms": sum(values) / len(values) if values else None,
            "time_ms": spread_of(values),
            "time_over_vanilla": spread_of(self.ratios),
            "timing": self._timing(),
            "peak_memory_mb": found.get("peak_memory_mb"),
            "breakdown": found.get("breakdown"),
            "snapshots": found.get("snapshots", []),
            "phases": found.get("phases", []),
            "largest": found.get("largest", []),
            "highest": found.get("highest"),
            "timeline": found.get("timeline"),
            "host": found.get("host"),
            "notes": found.get("notes", []),
            "profiling": {
                "time_ratio": tracked / statistics.median(values) if tracked and values else None,
                "independent_peak_mb": found.get("independent_peak_mb"),
                "tracked_peak_mb": found.get("tracked_peak_mb"),
                "independent": _independent(self.setup),
            },
            "repetitions": {"count": repetitions, "peak_memory_mb": spread_of(peaks)},
            "environment": {**self.conditions, **found.get("device", {})},
        }

    def _timing(self) -> dict[str, Any] | None:
        """With whom it was timed; of several repetitions the one in which it was alone, since it then has no ratio."""
        if not self.times:
            return None
        times = next((times for times in self.times if times.alone_because is not None), self.times[0])
        return {"interleaved_with": times.beside, "alone_because": times.alone_because}


def spread_of(values: Iterable[float]) -> dict[str, Any] | None:
    """Median, range and the values themselves; None where there are none."""
    found = list(values)
    return {**spread(found), "values": found} if found else None


def failure_fields(error: WorkerError, phase: str) -> dict[str, Any]:
    """Status, reason and failure for a process that failed or died in a phase."""
    where = {"phase": phase, "module": None, "allocated_mb": None}
    reason = str(error) if error.status is None else f"in {phase}: {error}"
    return {"status": "out_of_memory" if lacked_memory(error) else "failed", "reason": reason, "failure": where}


def _independent(setup: Setup) -> str:
    """What counted the peak independently of the tracker."""
    if setup.simulate:
        return "none: simulated"
    return "torch.cuda.max_memory_allocated" if setup.device == "cuda" else "torch.profiler's events of the allocator"


def measure(
    names: Sequence[str], setup: Setup, repetitions: int, say: Say, keep: Callable[[dict[str, Any]], None]
) -> list[dict[str, Any]]:
    """Measure experiments: the memory of all, then their times, as often as asked for.

    Args:
        names: of :data:`tools.memory.setup.EXPERIMENTS`.
        setup: of the first repetition; each further one takes the next seed.
        repetitions: how often.
        say: is told what is going on.
        keep: is given the result of each experiment when its memory is known, and once more when its times are.

    Returns:
        The results, in the order of the names.
    """
    setups = [replace(setup, seed=setup.seed + i) for i in range(repetitions)]
    entries = [Measured(name, setup) for name in names]
    for entry in entries:
        entry.conditions = {**conditions(setup.threads), "date": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        for i, each in enumerate(setups):
            entry.answers.append(memory_of(entry.name, each, _prefixed(say, f"{entry.name}: {_ordinal(i, setups)}")))
            if entry.failed() is not None:
                break
        keep(entry.result(repetitions))
    if not setup.simulate:
        for i, each in enumerate(setups):
            _time([entry for entry in entries if entry.failed() is None], each, _prefixed(say, _ordinal(i, setups)))
        for entry in entries:
            if entry.times:
                keep(entry.result(repetitions))
    return [entry.result(repetitions) for entry in entries]


def memory_of(
    name: str,
    setup: Setup,
    say: Say,
    task: Callable[[Setup, str], dict[str, Any]] = measure_memory,
) -> dict[str, Any]:
    """What a process of its own answers of one experiment's memory.

    Args:
        task: what the process does: a function of a module.

    Returns:
        The fields of ``task``; where the process died, or failed before the tracker had anything to tell, ``status``,
        ``reason`` and a ``failure`` that says in which phase.
    """
    at = "start"

    def hear(words: str) -> None:
        nonlocal at
        at = words
        say(f"memory, {words}")

    with Worker(name, preload=PRELOAD, threads=setup.threads) as worker:
        try:
            fields: dict[str, Any] = worker.ask(task, setup, name, hear=hear)
            return fields
        except WorkerError as error:
            return failure_fields(error, at)


class _TimingProcess:
    """A :class:`tools.memory.steps.TimedSteps` in a process of its own."""

    def __init__(self, name: str, setup: Setup, say: Say) -> None:
        self._worker = Worker(name, preload=PRELOAD, threads=setup.threads)
        try:
            self._worker.ask(TimedSteps, setup, name, hear=_prefixed(say, f"{name}: time, "))
        except BaseException:  # Ctrl-C too: nobody else knows of the process yet
            self._worker.end()
            raise

    def step(self) -> float:
        """Milliseconds of one step."""
        return float(self._worker.ask("step"))

    def end(self) -> None:
        """End the process."""
        self._worker.end()


def _time(entries: Sequence[Measured], setup: Setup, say: Say) -> None:
    """Time one repetition of all entries, together where they fit into memory."""
    if not entries:
        return

    def start(name: str) -> Stepper:
        return _TimingProcess(name, setup, say)

    why = too_large({entry.name: entry.needed_mb() for entry in entries}, free_mb(entries))
    found = time_in_rounds([entry.name for entry in entries], start, setup.num_iter, say, why)
    for entry in entries:
        entry.times.append(found[entry.name])
        if "vanilla" in found:
            entry.ratios += found[entry.name].ratios(found["vanilla"])


def free_mb(entries: Sequence[Measured]) -> float:
    """MiB that the processes of all entries may take together: of the GPU, or of this machine where there is none."""
    gpu = entries[0].answers[0]["device"].get("gpu_memory_bytes")
    return float((gpu or psutil.virtual_memory().available) / MIB)


def _prefixed(say: Say, prefix: str) -> Say:
    return lambda words: say(f"{prefix}{words}")


def _ordinal(index: int, setups: Sequence[Setup]) -> str:
    """Which repetition it is; empty where there is one."""
    return f"{index + 1}/{len(setups)} " if len(setups) > 1 else ""
