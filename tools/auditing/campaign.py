"""Audits of the mechanism as it is under several seeds, and of every broken one: which were noticed, and by what."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from dpft.audit import TwoWorldsAudit
from tools.auditing.catalogue import Audit, audited
from tools.auditing.plants import Plant


def quieten() -> None:
    """No remark of the libraries between the lines of an audit."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    for name in ("accelerate", "torch", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.ERROR)


def row_of(plant: Plant, seed: int, audit: Audit, seconds: float) -> dict[str, Any]:
    """What the table and the JSON say of one audit."""
    row: dict[str, Any] = {
        "plant": plant.name,
        "subject": plant.subject,
        "what": plant.what,
        "seed": seed,
        "right": audit.violated == (plant.name != "none"),
        "violated": audit.violated,
        "epsilon_lower": audit.epsilon_lower,
        "epsilon_lower_sure": audit.epsilon_lower_sure,
        "process_seconds": seconds,
    }
    if isinstance(audit, TwoWorldsAudit):
        claimed = {"epsilon": audit.claimed_epsilon, "delta": audit.delta}
        trials = {"trials": [len(audit.members), len(audit.others)], "attack": audit.attack}
        return row | trials | {"claimed": claimed, "failed": {}, "bound_above_claim": audit.violated}
    return row | {
        "claimed": audit.claimed,
        "measured": audit.measured,
        "bound_above_claim": audit.epsilon_lower_sure > audit.claimed["epsilon"],
        "failed": {check.name: check.p_value for check in audit.failed},
        "least_p_value": min(check.p_value for check in audit.checks),
    }


def run(
    plants: Sequence[Plant],
    seeds: int,
    steps: int,
    canaries: int,
    keep: Callable[[dict[str, Any], Audit], None],
) -> list[dict[str, Any]]:
    """Audit each plant once, and what is not broken under ``seeds`` seeds.

    Args:
        plants: the mechanisms.
        seeds: audits of plants named "none"; broken mechanisms get one.
        steps: releases of each audit.
        canaries: of each audit.
        keep: called with each row when it is there.
    """
    rows = []
    for plant in plants:
        for seed in range(seeds if plant.name == "none" else 1):
            began = time.process_time()
            audit = audited(plant, seed, steps, canaries)
            rows.append(row_of(plant, seed, audit, time.process_time() - began))
            keep(rows[-1], audit)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: one line for each plant; the seeds of a sound mechanism are one line."""
    lines = [
        "| mechanism | refuted | audited epsilon (claimed) | noise multiplier | clip norm | rate | by |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, of in dict.fromkeys((row["plant"], row["subject"]) for row in rows):
        found = [row for row in rows if (row["plant"], row["subject"]) == (name, of)]
        refuted = sum(row["violated"] for row in found)
        failed = list(dict.fromkeys(test for row in found for test in row["failed"]))
        if any(row["bound_above_claim"] for row in found):
            failed = ["the bound of epsilon", *failed]
        measured = [
            _range([row["measured"][key] / row["claimed"][key] for row in found]) if "measured" in found[0] else ""
            for key in ("noise_multiplier", "max_grad_norm", "sample_rate")
        ]
        lower = _range([row["epsilon_lower"] for row in found])
        lines.append(
            f"| {of if name == 'none' else name}: {found[0]['what']} | {refuted} of {len(found)} "
            f"| {lower} ({found[0]['claimed']['epsilon']:.3g}) | {' | '.join(measured)} "
            f"| {'; '.join(failed) or 'nothing'} |"
        )
    return "\n".join(lines) + "\n\nNoise multiplier, clip norm and rate: measured / claimed.\n"


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"
