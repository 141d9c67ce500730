"""Launches of the worker under an engine, and one row for each case of what its ranks counted."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from tools.common.accelerate_launch import RANKS, launch_command, launch_environment

WORKER = Path(__file__).with_name("worker.py")


STRATEGIES = ("plain", "one_pass", "two_pass", "per_example")


GRADIENTS = ("all_reduce", "reduce_scatter", "reduce")


LIMIT = 900.0  # seconds for one engine


def cases(sequence: int = 1) -> list[dict[str, Any]]:
    """Every strategy; with checkpointing, and with four physical batches a logical one, those of the whole batch.

    Of tokens spread over ranks, the one strategy that there is.
    """
    if sequence > 1:
        return [
            {"strategy": s, "checkpointing": c, "physical": p}
            for c, p in ((False, 1), (True, 1), (False, 4))
            for s in STRATEGIES[:2]
        ]
    once = [{"strategy": s, "checkpointing": False, "physical": 1} for s in STRATEGIES]
    again = [{"strategy": s, "checkpointing": True, "physical": 1} for s in STRATEGIES[:3]]
    return once + again + [{"strategy": s, "checkpointing": False, "physical": 4} for s in STRATEGIES[:3]]


def launch(engine: str, options: dict[str, Any], scratch: Path, ranks: int = RANKS) -> list[dict[str, Any]]:
    """Run the worker under one engine; what each rank counted.

    Raises:
        RuntimeError: it failed; with the end of its output.
    """
    done = subprocess.run(
        launch_command(engine, WORKER, json.dumps(options), str(scratch), ranks=ranks),
        cwd=scratch,
        env={**launch_environment(scratch, cpu=True), "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{engine} ended with status {done.returncode}:\n{done.stdout[-4000:]}")
    return [json.loads((scratch / f"costs_{rank}.json").read_text()) for rank in range(ranks)]


def rows(ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a case, of rank 0, in units of the parameters' bytes, and beside plain training of the same case."""
    unit = 4 * ranks[0]["parameters"]
    made: list[dict[str, Any]] = []
    for facts, other in zip(ranks[0]["results"], ranks[1]["results"], strict=True):
        if facts["bytes"] != other["bytes"]:
            raise RuntimeError(f"the ranks counted different collectives: {facts['bytes']} and {other['bytes']}")
        row = {
            **{key: facts[key] for key in ("strategy", "checkpointing", "physical", "traversals", "flops", "calls")},
            "payload": {kind: n / unit for kind, n in facts["bytes"].items()},
            "gathered": facts["bytes"].get("all_gather", 0) / unit,
            "reduced": sum(facts["bytes"].get(kind, 0) for kind in GRADIENTS) / unit,
            "wire": facts["wire"] / unit,
            "rest": facts["rest"] / unit,
            "peak": facts["peak"] / unit,
            "held_between": facts["held_between"] / unit,
        }
        same = ("checkpointing", "physical")
        plain = next(r for r in [*made, row] if r["strategy"] == "plain" and all(r[k] == row[k] for k in same))
        for key in ("flops", "wire", "peak"):
            row[f"{key}_ratio"] = row[key] / plain[key]
        made.append(row)
    return made
