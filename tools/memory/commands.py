"""The commands of tools/profile_memory.py: run, single, plot and compare, and what they print."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tools.common.command_line import say
from tools.memory.compare import compare
from tools.memory.derived import time_ratio
from tools.memory.measurement import measure, prepare_environment
from tools.memory.options import check_model, find_experiments, setup_of
from tools.memory.report import summary, write_report
from tools.memory.result import SUMMARY, load_results, ordered, write_result, write_text
from tools.memory.setup import Setup
from tools.memory.units import unit_for


def run_directory(parent: Path) -> Path:
    """A new folder ``run_TIME``.

    Raises:
        OSError: nothing can be written there.
    """
    if parent.exists() and not parent.is_dir():
        raise OSError(f"--output-dir {parent} is a file; expected a folder")
    parent.mkdir(parents=True, exist_ok=True)
    stamp = time.strftime("run_%Y%m%d_%H%M%S")
    for attempt in range(100):
        directory = parent / (stamp if attempt == 0 else f"{stamp}_{attempt + 1}")
        try:
            directory.mkdir()
        except FileExistsError:
            continue
        return directory
    raise OSError(f"{parent} has a hundred folders {stamp}_N")


def brief(result: dict[str, Any]) -> str:
    """One line of a result."""
    if result["status"] != "ok":
        where = result["failure"] or {}
        at = ", ".join(str(where[key]) for key in ("phase", "module") if where.get(key))
        status = result["status"].replace("_", " ") + (f" in {at}" if at else "")
        return f"{result['experiment']}: {status}: {result['reason']}"
    spread, unit = result["time_ms"], unit_for([result["peak_memory_mb"]])
    taken = f", median {spread['median']:.0f} ms a step" if spread else ""
    ratio = time_ratio(result)
    taken += f", {ratio:.2f} x vanilla's" if ratio is not None else ""
    return f"{result['experiment']}: peak {unit.text(result['peak_memory_mb'])} {unit.name}{taken}"


def run(args: argparse.Namespace, setup: Setup) -> int:
    """Measure experiments into a new folder, with a report; returns the exit status.

    What is measured is written as it becomes known: an interrupted run leaves the memory of the experiments that it
    has finished, and their times if it has come to them.
    """
    names = find_experiments(args.experiments, args.simulate, args.long_context)
    directory = run_directory(args.output_dir)
    start = time.monotonic()

    def keep(result: dict[str, Any]) -> None:
        write_result(directory / f"{result['experiment']}.json", result)
        print(brief(result), file=sys.stderr, flush=True)

    try:
        results = measure(names, setup, args.repetitions, say, keep)
        return report(args, ordered(results), directory, start)
    except KeyboardInterrupt:
        if any(directory.iterdir()):
            print(f"\ninterrupted; what was finished is in {directory}", file=sys.stderr)
        else:
            directory.rmdir()
            print("\ninterrupted; nothing was finished", file=sys.stderr)
        return 130


def report(args: argparse.Namespace, results: list[dict[str, Any]], directory: Path, start: float) -> int:
    """Pictures, tables and the summary of a run that began at ``start``; returns the exit status."""
    say("pictures")
    write_report(results, directory)
    options = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    names = [result["experiment"] for result in results]
    suite = {"arguments": options, "experiments": names, "seconds": round(time.monotonic() - start, 1)}
    write_text(directory / SUMMARY, json.dumps(suite, indent=1) + "\n")
    if args.json:
        print(json.dumps({"directory": str(directory), "results": results}, indent=1))
    else:
        print(summary(results))
        print(f"{directory / 'index.html'} has it all, after {suite['seconds']:.0f} s")
    return int(any(result["status"] == "failed" for result in results))


def single(args: argparse.Namespace, setup: Setup) -> int:
    """Measure one experiment into one file; returns the exit status."""
    (name,) = find_experiments([args.experiment], args.simulate, args.long_context)
    try:
        (result,) = measure([name], setup, args.repetitions, say, lambda _: None)
    except KeyboardInterrupt:
        print("\ninterrupted; nothing was written", file=sys.stderr)
        return 130
    write_result(args.output, result)
    print(json.dumps(result, indent=1) if args.json else brief(result))
    return int(result["status"] == "failed")


def plot(args: argparse.Namespace) -> int:
    """Pictures and report of stored results; returns the exit status."""
    results = load_results(args.input_dir)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=args.output_dir):
        pass
    for path in write_report(results, args.output_dir):
        print(path)
    return 0


def execute(args: argparse.Namespace) -> int:
    """Do what the command line says; returns the exit status, which tools/profile_memory.py explains."""
    try:
        if args.command == "compare":
            found = compare(args.before, args.after, args.threshold, args.least_mb)
            print(json.dumps(found.as_dict(), indent=1) if args.json else found.text())
            return int(found.regressed)
        if args.command == "plot":
            return plot(args)
        setup = setup_of(args)
        check_model(setup)
        prepare_environment(setup.threads)
        return run(args, setup) if args.command == "run" else single(args, setup)
    except KeyboardInterrupt:  # in what comes after the measurements, or in between
        print("\nprofile_memory: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:  # ResultError is a ValueError
        print(f"profile_memory: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
