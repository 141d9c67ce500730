"""measure_advice.py: its command line."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tools.advice.grids import curve, settings
from tools.advice.training import DELTA, TOKENS, Setting, train
from tools.common.command_line import Parser, say
from tools.common.conditions import conditions
from tools.common.json_files import json_path, write_json

NOTE = (
    "validation losses and norms of trainings on the docstrings of Python's standard library, which are public. On "
    "private records they would not be for publication, and a choice by them is not accounted for"
)


def measure(tried: list[Setting], evaluated: int, processes: int, path: Path | None) -> list[dict[str, Any]]:
    """Train each setting in a pool of processes of one thread; the file is written after each, and continued."""
    fixed = {
        "model": "recipes/assets/base_model, 403,104 parameters, all trained where lora_r is 0",
        "data": "docstrings",
        "tokens": TOKENS,
        "delta": DELTA,
        "validation_examples": evaluated,
        "optimizer": "AdamW, betas 0.8 and 0.95, no weight decay, cosine to 0, no warm-up",
        "processes": processes,
    }
    report = {"shapes": fixed, "conditions": conditions(1), "note": NOTE}
    results: list[dict[str, Any]] = []
    if path is not None and path.exists():
        before = json.loads(path.read_text())
        if before["shapes"] != fixed:
            raise SystemExit(f"measure_advice: {path} is of {before['shapes']}, expected {fixed}; name another file")
        report, results = before, before["results"]
        tried = left(tried, results)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for job in as_completed([pool.submit(train, setting, evaluated) for setting in tried]):
            row = job.result()
            results.append(row)
            say(f"{row}")
            if path is not None:
                write_json(path, {**report, "results": results})
    return results


def left(tried: list[Setting], results: list[dict[str, Any]]) -> list[Setting]:
    """The settings without those that have a result, each result standing for one."""
    names = [field.name for field in dataclasses.fields(Setting)]
    done = Counter(Setting(**{name: row[name] for name in names}) for row in results)
    return list((Counter(tried) - done).elements())


def main(description: str | None, argv: list[str] | None = None) -> None:
    """Read the command line, train, and print a line for each setting."""
    parser = Parser("measure_advice", description)
    parser.add_argument("--first", type=int, metavar="K", help="the first K settings alone")
    parser.add_argument("--curve", action="store_true", help="one setting at several values of epsilon, not the grid")
    parser.add_argument("--eval-examples", type=int, default=128, help="validation examples (default %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="trainings at once (default %(default)s)")
    parser.add_argument("--json", type=json_path)
    args = parser.parse_args(argv)
    tried = curve() if args.curve else settings()
    results = measure(tried[: args.first], args.eval_examples, args.processes, args.json)
    for row in sorted(results, key=lambda row: (row["epsilon"], row["loss_after"])):
        names = ("epsilon", "batch", "steps", "learning_rate", "clip_norm", "lora_r", "noise_multiplier")
        print("  ".join(f"{row[name]:g}" for name in names), f"{row['loss_before']:.3f} -> {row['loss_after']:.3f}")
