"""The parent's side of the memory profiler: one process for each measurement, and their answers as one result.

A process is forked from a server that has imported the libraries and run nothing: it starts with an empty allocator,
and one that dies, or runs out of memory, takes nothing with it but its own answer.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from tools.common.conditions import conditions, describe_device
from tools.common.failures import out_of_memory, reason_of
from tools.common.processes import end_process
from tools.memory.result import SCHEMA
from tools.memory.setup import EXPERIMENTS, Setup
from tools.memory.worker import measure_memory, measure_time, spread

PRELOAD = ["torch", "transformers.models.llama.modeling_llama", "opacus", "dpft", "tools.memory.worker"]
KILLED = -signal.SIGKILL
Task = Callable[[Setup, str, Callable[[str], None]], dict[str, Any]]


def prepare_environment(threads: int) -> None:
    """Set what the libraries read when the processes import them."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # ended processes leave their locks
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def _serve(connection: Connection, task: Task, setup: Setup, name: str) -> None:
    """Do one task and send ``("result", fields)``; before it, ``("at", words)`` as it goes on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its children
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # for as long as the process lives: libraries print
    with contextlib.suppress(OSError):  # torch's profiler writes lines of its own there
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    warnings.simplefilter("ignore")
    threading.Thread(target=_end_with_parent, args=(connection,), daemon=True).start()
    torch.set_num_threads(setup.threads)
    try:
        fields = task(setup, name, lambda words: connection.send(("at", words)))
        if not setup.simulate:
            fields["device"] = describe_device(setup.device)
    except Exception as error:  # a model that cannot be built is an answer too
        fields = {"status": "out_of_memory" if out_of_memory(error) else "failed", "reason": reason_of(error)}
    with contextlib.suppress(BrokenPipeError):
        connection.send(("result", fields))


def _end_with_parent(connection: Connection) -> None:
    """A parent that is killed cannot end its children; its end of the pipe closes all the same."""
    with contextlib.suppress(EOFError, OSError):
        connection.recv()
    os._exit(1)


def ask(task: Task, setup: Setup, name: str, say: Callable[[str], None]) -> dict[str, Any]:
    """The fields that a task answers in a fresh process; where that dies, a failure that says in which phase."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, task, setup, name), name=name, daemon=True)
    process.start()
    theirs.close()
    at = "start"
    try:
        while True:
            kind, value = ours.recv()
            if kind == "result":
                fields: dict[str, Any] = value
                return fields
            at = value
            say(at)
    except (EOFError, ConnectionResetError):
        process.join(10)
        killed = process.exitcode == KILLED
        why = "killed, as the system does where memory runs out" if killed else f"status {process.exitcode}"
        phase = {"phase": at, "module": None, "allocated_mb": None}
        status = "out_of_memory" if killed else "failed"
        return {"status": status, "reason": f"its process ended in {at}: {why}", "failure": phase}
    finally:
        ours.close()
        end_process(process)


def _tell(say: Callable[[str], None], what: str, words: str) -> None:
    say(f"{what}, {words}")


def environment(setup: Setup) -> dict[str, Any]:
    """Machine, versions and commit."""
    return {**conditions(setup.threads), "date": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


def run_experiment(name: str, setup: Setup, repetitions: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure one experiment: memory in one process, time in another, as often as asked for.

    Args:
        name: one of :data:`tools.memory.setup.EXPERIMENTS`.
        setup: of the first repetition; each further one takes the next seed.
        repetitions: how often.
        say: is told what is going on.

    Returns:
        A result as ``profile_result`` checks it: that of the first repetition, with times and the spread of all.
    """
    found: dict[str, Any] = {}
    peaks: list[float] = []
    times: list[float] = []
    failed: dict[str, Any] | None = None
    for i in range(repetitions):
        each = replace(setup, seed=setup.seed + i)
        ordinal = f"{i + 1}/{repetitions} " if repetitions > 1 else ""
        memory = ask(measure_memory, each, name, functools.partial(_tell, say, f"{name}: {ordinal}memory"))
        found = found or memory
        if memory["status"] != "ok":
            failed = memory
            break
        peaks.append(memory["peak_memory_mb"])
        if setup.simulate:
            continue
        timed = ask(measure_time, each, name, functools.partial(_tell, say, f"{name}: {ordinal}time"))
        if timed["status"] != "ok":
            failed = timed
            break
        times += timed["values"]
    status = "ok" if failed is None else failed["status"]
    tracked = found.get("tracked_step_ms")
    measured = spread(times) if times else None
    return {
        "schema": SCHEMA,
        "experiment": name,
        "words": EXPERIMENTS[name].words,
        "status": status,
        "reason": None if failed is None else failed["reason"],
        "failure": None if failed is None else failed.get("failure"),
        "config": setup.config(),
        "parameters": found.get("parameters"),
        "avg_time_ms": sum(times) / len(times) if times else None,
        "time_ms": measured,
        "peak_memory_mb": found.get("peak_memory_mb"),
        "breakdown": found.get("breakdown"),
        "snapshots": found.get("snapshots", []),
        "phases": found.get("phases", []),
        "largest": found.get("largest", []),
        "highest": found.get("highest"),
        "timeline": found.get("timeline"),
        "notes": found.get("notes", []),
        "profiling": {
            "time_ratio": tracked / measured["median"] if tracked and measured else None,
            "independent_peak_mb": found.get("independent_peak_mb"),
            "tracked_peak_mb": found.get("tracked_peak_mb"),
            "independent": _independent(setup),
        },
        "repetitions": {"count": repetitions, "peak_memory_mb": spread(peaks) if peaks else None},
        "environment": {**environment(setup), **found.get("device", {})},
    }


def _independent(setup: Setup) -> str:
    if setup.simulate:
        return "none: simulated"
    return "torch.cuda.max_memory_allocated" if setup.device == "cuda" else "torch.profiler's events of the allocator"
