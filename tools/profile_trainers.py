"""Five trainers side by side: plain, three of Opacus, and dpft's; where their time goes and which bytes they move.

    python tools/profile_trainers.py --mode test
    python tools/profile_trainers.py --mode single --trainer DPGhostClippingTrainer --batch-size 4 --seq-len 512 \
        --model-size medium
    python tools/profile_trainers.py --mode profile

"test" takes a small Llama on a CPU, "profile" one of about a billion parameters on a GPU, at batches of 4 and 8 rows
of 512 and 1,024 tokens. "single" takes one shape; StandardTrainer is measured with it, to compare with. Each trainer
at each shape has a process of its own. One that fails or runs out of memory is a result, and the others go on.

Trainers are timed one after the other: where others use the machine too, ratios of times move with what they do, and
the load is in the first line of the summary. Bytes, FLOPs and peaks do not.

Measured: time without a profiler; the peak of a step, all bytes counted; what a step retains, that is what is alive
after zero_grad() besides parameters, buffers, the batch and the optimiser's state; operators by class (see
trainers/operators.py); and steps under torch.profiler. Everything is in runs/<date-time>/results.json and
summary.txt. Each trainer's trace, runs/<date-time>/<trainer>_<shape>/*.pt.trace.json, opens in chrome://tracing, in
Perfetto and in TensorBoard's profiler plugin, which torch 2.13 calls deprecated.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script finds `tools` from its root

from tools.benchmarks.cases import Shape
from tools.common.conditions import conditions
from tools.common.json_files import json_path, write_json
from tools.memory.result import write_text
from tools.memory.units import counted
from tools.trainers.implementations import TRAINERS
from tools.trainers.report import BASELINE, complete, tables
from tools.trainers.worker import Job, find_trainer, measure_apart

SCHEMA = "dpft.trainers_profile/1"
SIZES = {
    "small": Shape(width=128, layers=4, vocab=1000),
    "medium": Shape(width=768, layers=12, vocab=32000),
    "large": Shape(width=2048, layers=16, vocab=32000),
}
TEST = replace(SIZES["small"], rows=4, tokens=128)
PROFILE = [replace(SIZES["large"], rows=b, tokens=t) for b, t in itertools.product((4, 8), (512, 1024))]
# Options that a mode settles itself, by the mode.
SETTLED = {
    "test": ("trainer", "batch_size", "seq_len", "model_size", "dtype", "gradient_checkpointing", "device"),
    "profile": ("trainer", "batch_size", "seq_len", "model_size", "device"),
    "single": (),
}
STEPS = {"test": 10, "single": 5, "profile": 10}


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the command line in one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"profile_trainers: {message}\n")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; ends with status 2 and one line where it is wrong."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", required=True, choices=tuple(STEPS))
    parser.add_argument("--trainer", nargs="+", help="names, or module:Class of your own, with --mode single")
    parser.add_argument("--batch-size", type=int, help="B (default 1)")
    parser.add_argument("--seq-len", type=int, help="T (default 512)")
    parser.add_argument("--model-size", choices=tuple(SIZES), help="about 1M, 140M or 1B parameters (default small)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default float32")
    parser.add_argument("--gradient-checkpointing", action="store_true", default=None)
    parser.add_argument("--steps", type=int, help=f"that are timed; by the mode {STEPS}")
    parser.add_argument("--warmup", type=int, default=2, help="steps before (default %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output-dir", type=Path, default=Path("runs"))
    parser.add_argument("--json", type=json_path, help="where results.json goes too")
    args = parser.parse_args(arguments)
    for name in SETTLED[args.mode]:
        if getattr(args, name) is not None:
            option = f"--{name.replace('_', '-')}"
            parser.error(f"--mode {args.mode} settles {option} itself; leave it out, or take --mode single")
    least = {"batch_size": 1, "seq_len": 2, "steps": 1, "warmup": 1, "threads": 1}
    for name, value in least.items():
        given = getattr(args, name)
        if given is not None and given < value:
            parser.error(f"--{name.replace('_', '-')} is {given}; expected at least {value}")
    if args.mode == "single" and args.trainer is None:
        parser.error(f"--mode single needs --trainer: {', '.join(TRAINERS)}, or module:Class of your own")
    for name in args.trainer or []:
        try:
            find_trainer(name)
        except (ValueError, ImportError, AttributeError) as error:
            parser.error(str(error))
    return args


def shapes_of(args: argparse.Namespace) -> list[Shape]:
    """What the mode and the options ask for."""
    if args.mode == "test":
        return [TEST]
    if args.mode == "profile":
        shapes = PROFILE
    else:
        shapes = [replace(SIZES[args.model_size or "small"], rows=args.batch_size or 1, tokens=args.seq_len or 512)]
    dtype, checkpointing = args.dtype or "float32", bool(args.gradient_checkpointing)
    return [replace(shape, dtype=dtype, checkpointing=checkpointing) for shape in shapes]


def device_of(args: argparse.Namespace) -> str:
    """``"cpu"`` or ``"cuda"``.

    Raises:
        RuntimeError: a GPU is needed and torch finds none.
    """
    there = torch.cuda.is_available()
    wanted: str = {"test": "cpu", "profile": "cuda"}.get(args.mode) or args.device or ("cuda" if there else "cpu")
    if wanted == "cuda" and not there:
        raise RuntimeError(
            f"--mode {args.mode} is to run on a GPU, and torch finds none. On a CPU: --mode test, or --mode single "
            "--device cpu"
        )
    return wanted


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


def say(line: str) -> None:
    """Progress, to the terminal's error stream."""
    print(f"  ... {line}", file=sys.stderr, flush=True)


def run(args: argparse.Namespace, device: str, directory: Path) -> dict[str, Any]:
    """Measure everything, writing ``results.json`` after each trainer and ``summary.txt`` after each shape."""
    names = list(dict.fromkeys([BASELINE, *(args.trainer or TRAINERS)]))
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "arguments": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "conditions": conditions(args.threads),
        "results": [],
    }
    texts: list[str] = []
    for shape in shapes_of(args):
        result: dict[str, Any] = {"title": str(shape), "shape": asdict(shape), "device": device, "rows": []}
        report["results"].append(result)
        for name in names:
            say(f"{name}, {shape}")
            folder = folder_of(name, shape)
            (directory / folder).mkdir()
            trace = directory / folder / f"{folder}.pt.trace.json"
            job = Job(name, shape, device, args.threads, args.warmup, args.steps or STEPS[args.mode], trace)
            row = measure_apart(job)
            report["conditions"].update(row.pop("machine", {}))
            if row["status"] == "ok":
                row["trace"] = f"{folder}/{trace.name}"
            result["rows"].append(row)
            report["results"][-1] = complete(result)
            for path in filter(None, (directory / "results.json", args.json)):
                write_json(path, report)
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


def main(arguments: list[str] | None = None) -> int:
    """The tool; returns its exit status: 1 where every trainer failed, 2 where it could not start, 130 interrupted."""
    args = parse(arguments)
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


if __name__ == "__main__":
    sys.exit(main())
