"""--distribution private: how many texts of each condition follows from noisy counts of the training records.

The counts are a second use of the records, beside the training. Both are paid from an account of the run, in its
folder: its budget is ``--target-epsilon``, of which the counts get ``--histogram-epsilon`` and the training the rest,
and its statement is the data card's. The counts are drawn once: whoever generates other texts of the same model reads
them again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import dpft
from finetune.output import ACCOUNT, DISTRIBUTION

# The training's target is lower by so much, beside the counts' epsilon: privacy loss distributions are rounded up.
MARGIN = 0.005
UNBOUNDED = 1e6


def create_account(
    folder: Path, schedule: Any, epsilon: float, target: float | None, users: bool, records: str
) -> Path:
    """The account of a run, which its training and its counts will pay from. For one rank.

    Args:
        folder: of the run.
        schedule: of the training.
        epsilon: of the counts.
        target: the budget of both; None: what they will spend together.
        users: whether an example is a user.
        records: which records these are, as they may be named in public.

    Returns:
        Its file.
    """
    unit: dict[str, Any] = {"unit": "user" if users else "example", "adjacency": schedule.mechanism.adjacency}
    if target is None:
        trial = folder / f"{ACCOUNT}.trial"
        try:
            account = dpft.Account.create(
                trial, epsilon=UNBOUNDED, delta=schedule.target_delta, composition="pld", **unit
            )
            account.spend([(schedule.mechanism, schedule.num_steps)], "the training", item=unit["unit"])
            one: dict[str, Any] = {"users": [0], "rows": 1} if users else {}
            dpft.private_counts([""], ["any"], account=account, epsilon=epsilon, **one)  # of no record of anybody
            target = account.spent() * (1 + 1e-9)
        finally:
            trial.unlink(missing_ok=True)
    path = folder / ACCOUNT
    dpft.Account.create(
        path, epsilon=target, delta=schedule.target_delta, composition="pld", records=records.replace("*", ""), **unit
    )
    return path


def counts(
    folder: Path,
    epsilon: float,
    values: Sequence[str],
    categories: Sequence[str],
    users: Sequence[Any] | None,
    rows: int,
) -> dict[str, Any]:
    """The noisy counts of a run: drawn and paid for at the first call, and read from its folder at later ones.

    Args:
        folder: of the run, with its account.
        epsilon: of the counts.
        values: the condition of each training record.
        categories: all conditions.
        users: whose each record is; None: each record is a unit of its own.
        rows: of a user that count at most.

    Returns:
        ``counts`` by category, and their ``statement``. All of it may be published.

    Raises:
        ValueError: the file is of other conditions or another epsilon, or was lost after it was paid for.
        BudgetExceededError: the account does not cover it.
    """
    path = folder / DISTRIBUTION
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if list(found["counts"]) != list(categories) or found["epsilon"] != epsilon:
            raise ValueError(
                f"{path} has counts of other conditions, or of epsilon {found['epsilon']:g}: each histogram is paid "
                "for. Give the same --condition-on, --values and --histogram-epsilon, or --distribution uniform."
            )
        return dict(found)
    account = dpft.Account.open(folder / ACCOUNT)
    if any(entry.ledger is None for entry in account.entries()):
        raise ValueError(
            f"the account of {folder} has paid for counts, and {DISTRIBUTION} is gone. Restore it, or give "
            "--distribution uniform."
        )
    of_users: dict[str, Any] = {} if users is None else {"users": users, "rows": rows}
    drawn = dpft.private_counts(
        values, categories, account=account, epsilon=epsilon, what="texts of each condition", **of_users
    )
    found = {**asdict(drawn), "statement": drawn.statement()}
    with path.with_suffix(".part").open("w", encoding="utf-8") as file:
        json.dump(found, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path.with_suffix(".part"), path)
    return found


def shares(found: dict[str, Any]) -> list[float]:
    """The share of each condition: its count, and none if noise made it negative; all alike if none is left."""
    kept = [float(max(0, count)) for count in found["counts"].values()]
    return kept if sum(kept) else [1.0] * len(kept)
