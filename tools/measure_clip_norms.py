"""Do clip norms that adapt, or one for each layer, help? Private trainings that differ in nothing else.

    python tools/measure_clip_norms.py --json docs/benchmarks/clip_norms_cpu.json

The recipe's small Llama on the docstrings, as in tools/measure_advice.py: a minute of one core each. A file that has
results is continued. The docstrings are public: a choice by such losses on private records is not accounted for.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script finds `tools` from its root

import dpft
from finetune import private
from tools.advice.training import Setting, train
from tools.common.command_line import Parser, say
from tools.common.conditions import conditions
from tools.common.json_files import json_path, write_json

QUICK = {"learning_rate": 1.0}  # of twelve steps, the paper's 0.2 would move C by a factor of 3 at most
WAYS: dict[str, dict[str, Any]] = {
    "C = 1": {},
    "C = 100": {"max_grad_norm": 100.0},
    "adaptive from 100": {"max_grad_norm": 100.0, "adaptive_clip": dpft.AdaptiveClip(**QUICK)},
    "by layer, C = 1": {"clip_groups": "layer"},
    "automatic, C = 1": {"clip_function": "automatic"},
}
SETTING = Setting(epsilon=3, batch=256, steps=12, learning_rate=5e-3)


def run(way: str, evaluated: int) -> dict[str, Any]:
    """One training; its result says which way."""
    plain = private.privacy_config
    setting = dataclasses.replace(SETTING, clip_norm=WAYS[way].get("max_grad_norm", SETTING.clip_norm))
    with mock.patch.object(
        private, "privacy_config", lambda options: dataclasses.replace(plain(options), **WAYS[way])
    ):
        found = train(setting, evaluated)
    del found["clipped"]  # which is by the constant clip norm
    return {"way": way, **found}


def main(argv: list[str] | None = None) -> None:
    """Train each way as often, in turn, and print mean and spread."""
    parser = Parser("measure_clip_norms", __doc__)
    parser.add_argument("--times", type=int, default=3, help="trainings of each way (default %(default)s)")
    parser.add_argument("--eval-examples", type=int, default=128, help="validation examples (default %(default)s)")
    parser.add_argument("--json", type=json_path)
    args = parser.parse_args(argv)
    results: list[dict[str, Any]] = []
    if args.json is not None and args.json.exists():
        results = json.loads(args.json.read_text())["results"]
    for time in range(args.times):
        for way in WAYS:
            if sum(row["way"] == way for row in results) > time:
                continue
            results.append(run(way, args.eval_examples))
            say(f"{results[-1]}")
            if args.json is not None:
                write_json(args.json, {"conditions": conditions(1), "results": results})
    for way in WAYS:
        losses = [row["loss_after"] for row in results if row["way"] == way]
        spread = f" +- {stdev(losses):.4f}" if len(losses) > 1 else ""
        print(f"{way:20} {mean(losses):.4f}{spread} ({len(losses)})")


if __name__ == "__main__":
    main()
