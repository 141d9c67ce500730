"""measure_mechanisms.py: its command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tools.common.command_line import Parser, say
from tools.common.conditions import conditions
from tools.common.json_files import json_path, write_json
from tools.mechanisms.settings import (
    BANDS,
    BATCH,
    CLIP_NORM,
    DELTA,
    STEPS,
    TOKENS,
    TUNED_EPSILON,
    VARIANTS,
    measured,
    tuning,
)

NOTE = (
    "validation losses without noise, of trainings on the docstrings of Python's standard library, which are public. "
    "On private records they would not be for publication, and a choice by them is not accounted for. Sampling and "
    "noise have fixed seeds, so that the figures can be had again: the trained models are not private"
)
SHAPES = {
    "model": "recipes/assets/base_model",
    "trained": "the last of 3 blocks and the norm after it, 101,664 of 403,104 parameters",
    "data": "docstrings",
    "tokens": TOKENS,
    "batch": BATCH,
    "steps": STEPS,
    "delta": DELTA,
    "clip_norm": CLIP_NORM,
    "schedule": "cosine to 0, no warm-up",
    "adam": "betas 0.8 and 0.95, no weight decay",
    "sgd": "no momentum",
    "bands": ", ".join(f"{bands} at epsilon {epsilon:g}" for epsilon, bands in BANDS.items()),
    "learning_rates": f"each variant's best of three or more at epsilon {TUNED_EPSILON:g}, on another seed",
}


def read(path: Path) -> dict[str, Any]:
    """The file's report, or an empty one.

    Raises:
        SystemExit: it is of another setting.
    """
    if not path.exists():
        return {"shapes": SHAPES, "note": NOTE, "trainings": [], "exact": []}
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if report["shapes"] != SHAPES:
        raise SystemExit(f"measure_mechanisms: {path} is of {report['shapes']}, expected {SHAPES}; name another file")
    return report


def train_all(path: Path, evaluated: int, only: list[str], tune_only: bool) -> None:
    """Train what has no result; the file is written after each."""
    from tools.mechanisms.training import train

    report = {**read(path), "conditions": conditions(1)}
    rows = report["trainings"]
    while True:
        wanted = tuning(rows)
        if not wanted and not tune_only:
            wanted = measured(rows)
        wanted = [training for training in wanted if not only or training.variant.name in only]
        if not wanted:
            return
        rows.append(train(wanted[0], evaluated))
        say(f"{len(wanted) - 1} left: {rows[-1]}")
        write_json(path, report)


def main(description: str | None, argv: list[str] | None = None) -> None:
    """Read the command line and do what it says."""
    parser = Parser("measure_mechanisms", description)
    parser.add_argument("--json", type=json_path, required=True)
    parser.add_argument("--eval-examples", type=int, default=396, help="validation examples (default %(default)s)")
    names = [variant.name for variant in VARIANTS]
    parser.add_argument("--only", nargs="+", default=[], choices=names, metavar="VARIANT", help=", ".join(names))
    parser.add_argument("--tune", action="store_true", help="choose the learning rates alone")
    args = parser.parse_args(argv)
    train_all(args.json, args.eval_examples, args.only, args.tune)
