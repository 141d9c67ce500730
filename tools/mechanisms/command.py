"""measure_mechanisms.py: its command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tools.common.command_line import Parser, say
from tools.common.conditions import conditions
from tools.common.json_files import write_json
from tools.mechanisms.settings import (
    BANDS,
    BATCH,
    CLIP_NORM,
    DELTA,
    STEPS,
    TOKENS,
    VARIANTS,
    measured,
    tuning,
)
from tools.mechanisms.summary import results, with_tables

NOTE = (
    "validation losses without noise, of trainings on the docstrings of Python's standard library, which are public. "
    "On private records they would not be for publication, and a choice by them is not accounted for. Sampling and "
    "noise have fixed seeds, so that the figures can be had again: the trained models are not private. "
    "`python tools/measure_mechanisms.py`, discussed in [mechanisms.md](mechanisms.md)"
)
EXACT_NOTE = (
    "Computed, not trained: noise that each mechanism leaves in the sum of its releases (root mean square over the "
    "steps), and in the last weights of plain SGD under a cosine, over that of DP-SGD with Poisson sampling at the "
    "same epsilon, batch and steps; below 1 it has less. `python tools/measure_mechanisms.py --exact`, discussed in "
    "[mechanisms.md](mechanisms.md)"
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
    "schedule": "cosine to 0, no warm-up; or constant",
    "adam": "betas 0.8 and 0.95, no weight decay",
    "sgd": "no momentum",
    "bands": ", ".join(f"{bands} at epsilon {epsilon:g}" for epsilon, bands in BANDS.items()),
    "learning_rates": "each variant's best of three or more at each epsilon, on another seed",
}


PAGE = Path(__file__).resolve().parents[2] / "docs" / "mechanisms.md"
TRAINED, EXACT = "mechanisms_cpu.json", "mechanisms_exact.json"


def read(path: Path, shapes: dict[str, Any]) -> dict[str, Any]:
    """The file's report, or an empty one.

    Raises:
        SystemExit: it is of another setting.
    """
    if not path.exists():
        return {"shapes": shapes}
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if report["shapes"] != shapes:
        raise SystemExit(f"measure_mechanisms: {path} is of {report['shapes']}, expected {shapes}; name another file")
    return report


def train_all(path: Path, evaluated: int, only: list[str]) -> None:
    """Train what has no result; the file is written after each."""
    from tools.mechanisms.training import train

    report = {"trainings": [], **read(path, SHAPES), "note": NOTE, "conditions": conditions(1)}
    rows = report["trainings"]
    while True:
        wanted = tuning(rows)
        tuned = not wanted
        wanted = [training for training in wanted or measured(rows) if not only or training.variant.name in only]
        if wanted:
            rows.append(train(wanted[0], evaluated))
            say(f"{len(wanted) - 1} left: {rows[-1]}")
        report["results"] = results(rows) if tuned else []
        write_json(path, report)
        if not wanted:
            return


def compute_all(path: Path, examples: int) -> None:
    """The exact noise, which needs no training; the file is written after each row."""
    from tools.mechanisms.exact import EXAMPLES, grid, of_corpus, of_grid

    shapes = {"examples": EXAMPLES, "delta": DELTA, "buffers": 4}
    report = {"results": [], **read(path, shapes), "note": EXACT_NOTE, "conditions": conditions(1)}
    report["corpus"] = of_corpus(examples)
    done = {(row["rate"], row["epochs"], row["epsilon"]) for row in report["results"]}
    for setting in grid():
        if setting in done:
            continue
        report["results"].append(of_grid(*setting))
        say(f"{report['results'][-1]}")
        write_json(path, report)


def reports(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both files of a folder."""
    trained, exact = (json.loads((folder / name).read_text(encoding="utf-8")) for name in (TRAINED, EXACT))
    return trained, exact


def main(description: str | None, argv: list[str] | None = None) -> None:
    """Read the command line and do what it says."""
    parser = Parser("measure_mechanisms", description)
    parser.add_argument("--folder", type=Path, default=PAGE.parent / "benchmarks", help="of the two JSON files")
    parser.add_argument("--eval-examples", type=int, default=396, help="validation examples (default %(default)s)")
    names = [variant.name for variant in VARIANTS]
    parser.add_argument("--only", nargs="+", default=[], choices=names, metavar="VARIANT", help=", ".join(names))
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--exact", action="store_true", help="compute the noise; no training")
    what.add_argument("--page", action="store_true", help="put the tables into docs/mechanisms.md")
    args = parser.parse_args(argv)
    if args.exact:
        compute_all(args.folder / EXACT, json.loads((args.folder / TRAINED).read_text())["trainings"][0]["examples"])
    elif args.page:
        PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), *reports(args.folder)), encoding="utf-8")
    else:
        train_all(args.folder / TRAINED, args.eval_examples, args.only)
