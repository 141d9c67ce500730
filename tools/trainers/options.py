"""The command line of profile_trainers.py, and the shapes and the device that it asks for."""

from __future__ import annotations

import argparse
import itertools
import os
from dataclasses import replace
from pathlib import Path

import torch

from tools.benchmarks.cases import Shape
from tools.common.command_line import Parser
from tools.common.json_files import json_path
from tools.trainers.implementations import TRAINERS
from tools.trainers.worker import find_trainer

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


def parse(description: str | None, arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; ends with status 2 and one line where it is wrong."""
    parser = Parser("profile_trainers", description)
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
