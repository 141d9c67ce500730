"""profile_trainers.py: every trainer at every shape in a process of its own, into one folder."""

from __future__ import annotations

import argparse
import datetime
import itertools
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tools.benchmarks.cases import Shape
from tools.common.command_line import say
from tools.common.conditions import conditions
from tools.common.json_files import write_json
from tools.memory.result import write_text
from tools.memory.units import counted
from tools.trainers.implementations import TRAINERS
from tools.trainers.measurement import add_times, profile_apart
from tools.trainers.options import STEPS, device_of, shapes_of
from tools.trainers.report import BASELINE, complete, tables
from tools.trainers.worker import Job

SCHEMA = "dpft.trainers_profile/1"


def new_directory(parent: Path) -> Path:
    """A folder of its own for this run, named by date and time.

    Raises:
        OSError: none can be made there.
    """
    parent.mkdir(parents=True, exist_ok=True)
    name = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for number in itertools.count():
        path = parent / (f"{name}_{number}" if number else name)
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise AssertionError("numbers do not end")


def folder_of(trainer: str, shape: Shape) -> str:
    """A name of a trainer at a shape that is good for a file."""
    ends = "_checkpointed" * shape.checkpointing
    size = f"{shape.architecture}{shape.width}x{shape.layers}_B{shape.rows}_T{shape.tokens}_{shape.dtype}{ends}"
    return f"{trainer.replace(':', '.')}_{size}"


def run(args: argparse.Namespace, device: str, directory: Path) -> dict[str, Any]:
    """Measure everything, writing ``results.json`` after each trainer and ``summary.txt`` after each shape.

    The times of a shape are measured last, and are in no row before.
    """
    names = list(dict.fromkeys([BASELINE, *(args.trainer or TRAINERS)]))
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "arguments": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "conditions": conditions(args.threads),
        "results": [],
    }
    texts: list[str] = []

    def keep(result: dict[str, Any]) -> None:
        report["results"][-1] = complete(result)
        for path in filter(None, (directory / "results.json", args.json)):
            write_json(path, report)

    for shape in shapes_of(args):
        result: dict[str, Any] = {"title": str(shape), "shape": asdict(shape), "device": device, "rows": []}
        report["results"].append(result)
        jobs = []

        for name in names:
            say(f"{name}, {shape}")
            folder = folder_of(name, shape)
            (directory / folder).mkdir()
            trace = directory / folder / f"{folder}.pt.trace.json"
            jobs.append(Job(name, shape, device, args.threads, args.warmup, args.steps or STEPS[args.mode], trace))
            row = profile_apart(jobs[-1])
            report["conditions"].update(row.get("machine", {}))
            if row["status"] == "ok":
                row["trace"] = f"{folder}/{trace.name}"
            result["rows"].append(row)
            keep(result)
        add_times(jobs, {row["trainer"]: row for row in result["rows"]}, say)
        keep(result)
        texts.append(tables(report["results"][-1]))
        print(texts[-1], flush=True)
        write_text(directory / "summary.txt", "\n".join([_heading(report["conditions"]), *texts]) + "\n")
    return report


def _heading(found: dict[str, Any]) -> str:
    device = found.get("gpu") or f"{found['cpu']}, {counted(found['threads'], 'thread')}"
    libraries = ", ".join(f"{name} {found['versions'][name]}" for name in ("torch", "transformers", "opacus"))
    return f"{device}; {libraries}; {_commit(found)}; load {found['load_before']}"


def _commit(found: dict[str, Any]) -> str:
    return f"commit {(found['commit'] or 'unknown')[:8]}{' with changes' * found['dirty']}"


def execute(args: argparse.Namespace) -> int:
    """Do what the command line says.

    Returns:
        The exit status: 1 where every trainer failed, 2 where it could not start, 130 where it was interrupted.
    """
    try:
        device = device_of(args)
        directory = new_directory(args.output_dir)
    except RuntimeError as error:
        print(f"profile_trainers: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"profile_trainers: nothing can be written in --output-dir: {error}. Name another", file=sys.stderr)
        return 2
    # The libraries read these when the processes import them.
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    try:
        report = run(args, device, directory)
    except KeyboardInterrupt:
        print(f"\ninterrupted; what was finished is in {directory}", file=sys.stderr)
        return 130
    print(f"\n{directory}")
    return 0 if any(row["status"] == "ok" for result in report["results"] for row in result["rows"]) else 1
