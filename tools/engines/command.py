"""measure_engines.py: the command line, every engine in turn, the table and the JSON."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from tools.common.accelerate_launch import ENGINES, RANKS
from tools.common.command_line import Parser
from tools.common.conditions import conditions
from tools.common.json_files import json_path, write_json
from tools.engines.launches import cases, launch, rows


def table(engine: str, made: list[dict[str, Any]]) -> str:
    """What is printed."""
    lines = [
        f"\n{engine:13} ckpt phys traversals  FLOPs   gathered  reduced  sent a rank      rest  peak           between"
    ]
    for r in made:
        lines.append(
            f"  {r['strategy']:11} {'yes' if r['checkpointing'] else 'no':4} {r['physical']:4} {r['traversals']:10}  "
            f"{r['flops_ratio']:.3f} x {r['gathered']:8.2f} {r['reduced']:8.2f}  {r['wire']:5.2f} = "
            f"{r['wire_ratio']:.2f} x  {r['rest']:5.2f}  {r['peak']:.2f} = {r['peak_ratio']:.2f} x  "
            f"{r['held_between']:5.2f}"
        )
    return "\n".join(lines)


def main(description: str | None, arguments: list[str] | None = None) -> None:
    """Read the command line and measure every engine."""
    parser = Parser("measure_engines", description)
    for name, value in (("width", 256), ("layers", 4), ("tokens", 256), ("vocab", 1000), ("rows", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--ranks", type=int, default=RANKS)
    parser.add_argument("--sequence", type=int, default=1, help="over how many ranks an example's tokens are spread")
    parser.add_argument("--json", type=json_path)
    args = parser.parse_args(arguments)
    shapes = {name: getattr(args, name) for name in ("width", "layers", "tokens", "vocab", "rows")}
    shapes.update(sequence=args.sequence, ranks=args.ranks, rows=args.rows if args.sequence == 1 else 1)
    results: dict[str, Any] = {}
    for engine in args.engines:
        with tempfile.TemporaryDirectory() as scratch:
            ranks = launch(engine, {**shapes, "cases": cases(args.sequence)}, Path(scratch), args.ranks)
        made = rows(ranks)
        print(table(engine, made), flush=True)
        results[engine] = made
        shapes["parameters"] = ranks[0]["parameters"]
    if args.json:
        found = {**conditions(threads=1), "backend": "gloo, CPU, one thread a process"}
        write_json(args.json, {"shapes": shapes, "conditions": found, "results": results})
