"""Memory and time of the noise of a logical batch, by mechanism, beside DP-SGD's: counted, on any machine.

    python tools/plan_noise.py --json docs/benchmarks/noise_planned.json

Of models of bf16 parameters on meta, on H100s of 80 GB: one, and eight under FSDP2. It is what
`dpft.plan(privacy=...)` says; nothing has run on a GPU. Times are bytes that are read and written over the
data sheet's bandwidth.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script finds `tools` from its root

import dpft
from dpft.planning.hardware import HARDWARE
from dpft.planning.noise import noise_cost
from dpft.planning.simulate import Sharding
from tools.common.command_line import Parser
from tools.common.conditions import conditions
from tools.common.json_files import json_path, write_json
from tools.plan_long_context import build

GIB = 2**30
MODELS = (("llama-3.1-8b", "lora"), ("llama-3.2-1b", "full"), ("llama-3.1-8b", "full"))
CARDS = {1: Sharding(), 8: Sharding("fsdp2", 8)}
_PLAN: dict[str, Any] = {
    **{"noise_multiplier": 1.0, "target_delta": 1e-6, "expected_batch_size": 1000, "num_steps": 1000},
}
NOISES: dict[str, dict[str, Any]] = {
    "dp_sgd": {},
    "dp_sgd, secure_rng": {"secure_rng": True},
    "bandmf, 8 bands": {"mechanism": "bandmf", "bands": 8, "sampler": "cyclic_poisson"},
    "blt, 4 buffers": {"mechanism": "blt", "buffers": 4, "sampler": "fixed_order"},
}


def rows() -> list[dict[str, Any]]:
    """Every figure of the table."""
    found = []
    for name, training in MODELS:
        model = build(name, training).bfloat16()
        for cards, sharding in CARDS.items():
            costs = {
                words: noise_cost(model, sharding, HARDWARE["h100"], dpft.PrivacyConfig(**_PLAN, **changes))
                for words, changes in NOISES.items()
            }
            found += [
                {
                    "model": f"{name}, {training}",
                    "cards": cards,
                    "noise": words,
                    "vectors kept": cost.vectors,
                    "GiB kept by a card": round(cost.kept_bytes / GIB, 2),
                    "values drawn by a card": cost.elements,
                    "ms for a logical batch": float(f"{1e3 * cost.seconds:.4g}"),
                    "of dp_sgd": round(cost.seconds / costs["dp_sgd"].seconds, 2),
                }
                for words, cost in costs.items()
            ]
    return found


def main(description: str | None, arguments: list[str] | None = None) -> None:
    """Read the command line, count, and print."""
    parser = Parser("plan_noise", description)
    parser.add_argument("--json", type=json_path)
    args = parser.parse_args(arguments)
    found = rows()
    if args.json:
        write_json(args.json, {"conditions": conditions(1), "rows": found})
    for row in found:
        print(", ".join(f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main(__doc__)
