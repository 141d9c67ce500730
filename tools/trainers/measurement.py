"""Trainers at one shape, each in processes of its own: profiled one after the other, then timed in common rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from tools.common.meter import MIB
from tools.common.rounds import Stepper, Times, lacked_memory, time_in_rounds, too_large
from tools.common.spread import spread
from tools.common.worker import Worker, WorkerError
from tools.trainers.worker import PHASES, Job, Session

PRELOAD = ["torch", "transformers.models.llama.modeling_llama", "tools.trainers.worker"]
BESIDE_MB = 600.0  # of a process beside its tensors: libraries, or a GPU's context


def log_of(job: Job) -> Path:
    """What the process printed, its libraries' warnings and the traceback of a failure: beside the trace."""
    return job.trace.with_name("log.txt")


def failure(error: WorkerError) -> dict[str, Any]:
    """What a trainer that raised, or whose process died, is in the results."""
    return {"status": "out_of_memory" if lacked_memory(error) else "failed", "reason": str(error)}


def profile_apart(job: Job) -> dict[str, Any]:
    """All but the times of one trainer, from a fresh process that ends with this call, also where it is interrupted.

    Returns:
        ``status`` "ok", "out_of_memory" or "failed", the last two with a ``reason``.
    """
    with Worker(job.trainer, preload=PRELOAD, threads=job.threads, log=log_of(job)) as worker:
        try:
            worker.ask(Session, job)
            found: dict[str, Any] = worker.ask("profile")
            return {"trainer": job.trainer, "status": "ok", "reason": None, **found}
        except WorkerError as error:
            return {"trainer": job.trainer, **failure(error)}


class _TimingProcess:
    """A warmed-up :class:`tools.trainers.worker.Session` in a process of its own, and the phases of its steps."""

    def __init__(self, job: Job) -> None:
        self.phases: dict[str, list[float]] = {name: [] for name in PHASES}
        log = log_of(job).with_name("log_timing.txt")
        self._worker = Worker(job.trainer, preload=PRELOAD, threads=job.threads, log=log)
        try:
            self._worker.ask(Session, job)
            self._worker.ask("warm_up")
        except BaseException:  # Ctrl-C too: nobody else knows of the process yet
            self._worker.end()
            raise

    def step(self) -> float:
        """Milliseconds of one step."""
        seconds: dict[str, float] = self._worker.ask("timed_step")
        for name, value in seconds.items():
            self.phases[name].append(value)
        return 1e3 * sum(seconds.values())

    def end(self) -> None:
        """End the process."""
        self._worker.end()


def add_times(jobs: Sequence[Job], rows: dict[str, dict[str, Any]], say: Callable[[str], None]) -> None:
    """Time the trainers whose profile succeeded, and put the times, or why there are none, into their rows.

    Args:
        jobs: one for each trainer; ``steps`` is the number of rounds.
        rows: of :func:`profile_apart`, by trainer; ``seconds``, ``phases``, ``timing`` and ``time_over_plain`` (of the
            first of the jobs; None where the two were not timed in the same rounds) are added.
        say: is told what is going on.
    """
    going = {job.trainer: job for job in jobs if rows[job.trainer]["status"] == "ok"}
    if not going:
        return
    processes: dict[str, _TimingProcess] = {}

    def start(name: str) -> Stepper:
        processes[name] = _TimingProcess(going[name])
        return processes[name]

    needed = {name: rows[name]["peak_bytes"] / MIB + BESIDE_MB for name in going}
    gpu = rows[next(iter(going))]["machine"].get("gpu_memory_bytes")
    why = too_large(needed, (gpu or psutil.virtual_memory().available) / MIB)
    times = time_in_rounds(list(going), start, jobs[0].steps, say, why)
    for name, found in times.items():
        if found.failure is not None:
            rows[name].update(failure(found.failure))
        else:
            rows[name].update(_fields(found, processes[name], times.get(jobs[0].trainer)))


def _fields(found: Times, process: _TimingProcess, plain: Times | None) -> dict[str, Any]:
    ratios = found.ratios(plain) if plain is not None else []
    seconds = [value / 1e3 for value in found.milliseconds]
    return {
        "seconds": {**spread(seconds), "values": seconds},
        "phases": {name: {**spread(values), "values": values} for name, values in process.phases.items()},
        "timing": {"interleaved_with": found.beside, "alone_because": found.alone_because},
        "time_over_plain": {**spread(ratios), "values": ratios} if ratios else None,
    }
