"""Where every byte of a training step goes: plain, private, and what privacy adds, each in a process of its own.

    python tools/profile_memory.py run
    python tools/profile_memory.py run --experiments vanilla flash_clip opacus_ghost --gradient-checkpointing
    python tools/profile_memory.py run --simulate --model meta-llama/Llama-3.1-8B --dtype bf16 --seq-len 131072
    python tools/profile_memory.py single --experiment flash_clip --output flash_result.json --seq-len 16384
    python tools/profile_memory.py plot --input-dir memory_profiling_results/run_20260101_120000 --output-dir pictures
    python tools/profile_memory.py compare before/flash_clip.json after/flash_clip.json --threshold 5

Every storage is followed from its birth to its death and belongs to one component, which docs/memory.md explains. What
torch's allocator has counted beyond that is shown as unattributed. Times are of another process, without the tracker.
Sizes are MiB (2**20 bytes) in files, and what reads best in pictures.

Exit status: 0; 1 where `compare` finds a regression, or an experiment failed other than by running out of memory,
which is a result; 2 for what cannot be done as asked; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script finds `tools` from its root

from tools.common.json_files import json_path
from tools.memory.compare import compare
from tools.memory.report import summary, write_report
from tools.memory.result import SUMMARY, load_results, ordered, write_result, write_text
from tools.memory.setup import (
    DEFAULT_EXPERIMENTS,
    EXPERIMENTS,
    Setup,
    add_setup,
    check_model,
    find_experiments,
    positive,
    setup_of,
)
from tools.memory.suite import prepare_environment, run_experiment
from tools.memory.words import unit_for

RESULTS = Path("memory_profiling_results")


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the command line in one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"profile_memory: {message}\n")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    listed = "; ".join(f"{name}: {experiment.words}" for name, experiment in EXPERIMENTS.items())

    run = commands.add_parser("run", help="several experiments, with pictures and a report")
    run.add_argument(
        "--experiments", nargs="+", default=list(DEFAULT_EXPERIMENTS), metavar="NAME", help=f"of {listed}"
    )
    run.add_argument("--output-dir", type=Path, default=RESULTS, help="run_TIME is made in it")
    single = commands.add_parser("single", help="one experiment, to one file")
    single.add_argument("--experiment", required=True, metavar="NAME", help=f"of {listed}")
    single.add_argument("--output", type=json_path, required=True, help="a file that ends in .json")
    for command in (run, single):
        command.add_argument("--repetitions", type=positive, default=1, help="each with the next seed")
        command.add_argument("--json", action="store_true", help="the results to standard output, as JSON")
        add_setup(command)

    plot = commands.add_parser("plot", help="pictures and report of stored results")
    plot.add_argument("--input-dir", type=Path, required=True)
    plot.add_argument("--output-dir", type=Path, required=True)

    words = "fail where B takes more memory than A: at its peak, or of any component, even if the peak falls"
    against = commands.add_parser("compare", help=words, description=words)
    against.add_argument("before", type=Path, metavar="A", help="a result, or the folder of a run")
    against.add_argument("after", type=Path, metavar="B")
    above = "that B may be above A; default 5"
    against.add_argument("--threshold", type=float, default=5.0, metavar="PERCENT", help=above)
    least = "a smaller difference is none; default 1"
    against.add_argument("--least-mb", type=float, default=1.0, metavar="MIB", help=least)
    against.add_argument("--json", action="store_true")
    return parser.parse_args(arguments)


def say(line: str) -> None:
    """Progress, to the terminal's error stream."""
    print(f"  ... {line}", file=sys.stderr, flush=True)


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
    return f"{result['experiment']}: peak {unit.text(result['peak_memory_mb'])} {unit.name}{taken}"


def run(args: argparse.Namespace, setup: Setup) -> int:
    names = find_experiments(args.experiments, args.simulate)
    directory = run_directory(args.output_dir)
    start = time.monotonic()
    results = []
    try:
        for name in names:
            result = run_experiment(name, setup, args.repetitions, say)
            write_result(directory / f"{name}.json", result)
            results.append(result)
            print(brief(result), file=sys.stderr, flush=True)
        return report(args, ordered(results), directory, start)
    except KeyboardInterrupt:
        if results:
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
    (name,) = find_experiments([args.experiment], args.simulate)
    try:
        result = run_experiment(name, setup, args.repetitions, say)
    except KeyboardInterrupt:
        print("\ninterrupted; nothing was written", file=sys.stderr)
        return 130
    write_result(args.output, result)
    print(json.dumps(result, indent=1) if args.json else brief(result))
    return int(result["status"] == "failed")


def plot(args: argparse.Namespace) -> int:
    results = load_results(args.input_dir)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=args.output_dir):
        pass
    for path in write_report(results, args.output_dir):
        print(path)
    return 0


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
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


if __name__ == "__main__":
    sys.exit(main())
