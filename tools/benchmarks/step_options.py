"""The command line of benchmark_steps.py, and the shapes that its options name."""

from __future__ import annotations

import argparse
import itertools
import os
from dataclasses import replace

import torch

from tools.benchmarks.cases import Shape
from tools.benchmarks.presets import EVERYTHING, Longest, Preset, Run
from tools.common.command_line import Parser
from tools.common.json_files import json_path

ARCHITECTURES = ("llama", "gpt2", "bert")


FIELDS = ("architecture", "width", "layers", "vocab", "dtype", "update", "lora")
HAND = (*FIELDS, "tokens", "rows", "checkpointing", "methods")


def parse(description: str | None, arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; ends with status 2 and one line where it is wrong."""
    parser = Parser("benchmark_steps", description)
    parser.add_argument("--preset", choices=("cpu", "short", "gpu", "smoke"), help="instead of the shapes below")
    parser.add_argument("--architecture", choices=ARCHITECTURES)
    for name in ("width", "layers", "vocab"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--tokens", type=int, nargs="+", help="T, one or several")
    parser.add_argument("--rows", type=int, nargs="+", help="B, one or several")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--checkpointing", choices=("off", "on", "both"))
    parser.add_argument("--update", action="store_true", default=None, help="with AdamW, and for ours with noise")
    parser.add_argument("--lora", type=int, help="rank of adapters that are trained instead of the weights")
    parser.add_argument("--first", action="store_true", help="time one-pass's first steps, too")
    parser.add_argument("--methods", nargs="+", help="names, or module:function of your own")
    parser.add_argument("--alone", action="store_true", help="one process after the other, not in turns")
    parser.add_argument("--longest", type=int, nargs=3, metavar=("START", "STEP", "MOST"), help="search the longest T")
    parser.add_argument("--rounds", type=int, help="of every shape, in the place of the preset's")
    parser.add_argument("--seconds", type=float, help="time budget; what does not fit into it is skipped, and says so")
    parser.add_argument("--memory-limit", type=float, metavar="GIB", help="for a process, beyond its model")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the preset's, or cuda where there is one")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=json_path)
    args = parser.parse_args(arguments)
    given = [name for name in HAND if getattr(args, name) is not None]
    if args.preset and given:
        parser.error(f"--preset {args.preset} brings its own shapes; got --{given[0]} too. Leave one of them out")
    for name in ("width", "layers", "vocab", "rounds", "seconds", "threads", "memory_limit"):
        value = getattr(args, name)
        if value is not None and value < (0 if name == "rounds" else 1e-9):
            parser.error(f"--{name} is {value}; expected a positive number")
    for value in [*(args.tokens or []), *(args.rows or [])]:
        if value < 1:
            parser.error(f"--tokens and --rows are numbers above 0; got {value}")
    return args


def by_hand(args: argparse.Namespace) -> Preset:
    """The shapes that the options name; T, B and checkpointing in every combination."""
    fields = {name: getattr(args, name) for name in FIELDS}
    base = Shape(**{name: value for name, value in fields.items() if value is not None})
    kinds = {"off": [False], "on": [True], "both": [False, True]}[args.checkpointing or "off"]
    methods = tuple(args.methods or EVERYTHING)
    lengths, sizes = args.tokens or [base.tokens], args.rows or [base.rows]
    shapes = [replace(base, tokens=t, rows=b, checkpointing=c) for c, b, t in itertools.product(kinds, sizes, lengths)]
    parts: list[Run | Longest] = [Run(shape, methods, alone=args.alone, first=args.first) for shape in shapes]
    if args.longest:
        start, step, most = args.longest
        parts = parts if args.tokens else []
        for c, b in itertools.product(kinds, sizes):
            longest = replace(base, tokens=most, rows=b, checkpointing=c)
            parts.append(Longest(longest, methods, start, step, most))
    return Preset("cuda" if torch.cuda.is_available() else "cpu", tuple(parts), 3600.0)
