"""Audits of what is not a training: private figures, early stopping, and the choice of the best of several trials.

Each trial asks dpft once, on one of two neighbouring sets of records; what it answers is the observation. An account
pays for the first trial, which gives the claim; the others are repetitions of the same release, as an audit needs.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import dpft
from dpft.audit import TwoWorldsAudit, two_worlds
from dpft.audit.two_worlds import as_it_is, by_frequency
from dpft.privacy import Mechanism, Protects

DELTA = 0.01
RECORDS = 20


class Purse:
    """Pays for everything, for the repetitions of a release that an account has paid for."""

    account_id = "an audit's"
    delta = DELTA
    protects = Protects("add_or_remove_one")
    composition: Any = "rdp"

    def reserve(self, name: str, uses: Sequence[Any], what: str, **_: Any) -> None:
        """Nothing."""

    def finish(self, name: str, uses: Sequence[Any]) -> None:
        """Nothing."""

    def spend(self, uses: Sequence[Any], what: str) -> str:
        """Nothing."""
        return "paid"


@contextlib.contextmanager
def new_account(**options: Any) -> Iterator[dpft.Account]:
    """An account with a large budget, for as long as the block lasts."""
    with tempfile.TemporaryDirectory(prefix="dpft-audit-") as folder:
        yield dpft.Account.create(Path(folder) / "account", epsilon=100.0, delta=DELTA, **options)


def records(present: bool) -> list[float]:
    """Values in [0, 1]; the person's is 1, and the others' are 0."""
    return [0.0] * (RECORDS - 1) + [1.0] * present


def _audited(
    ask: Callable[[bool, Any], float], trials: int, attack: Any, **options: Any
) -> TwoWorldsAudit:
    with new_account(**options) as account:
        ask(True, account)
        claim = account.spent()
    purse = Purse()
    worlds = [np.array([[ask(present, purse)] for _ in range(trials)]) for present in (True, False)]
    return two_worlds(worlds[0], worlds[1], {"the answer": attack}, claimed_epsilon=claim, delta=DELTA)


def private_mean(seed: int) -> TwoWorldsAudit:
    """A noisy mean of 20 records, or 19: the person's value is at the end of the range."""

    def ask(present: bool, payer: Any) -> float:
        found = dpft.private_mean(
            records(present), low=0, high=1, size=RECORDS, account=payer, noise_multiplier=1.0
        )
        return found.value

    return _audited(ask, 30_000, as_it_is, composition="pld")


QUESTIONS = 40


def early_stop(seed: int) -> TwoWorldsAudit:
    """A sparse vector that is asked 40 times about a mean just below its threshold; the answer is when it stopped."""

    def ask(present: bool, payer: Any) -> float:
        stop = dpft.EarlyStop(threshold=0.5 + 0.8, low=0, high=1, size=RECORDS, epsilon=1.5, account=payer)
        values = records(present)
        for question in range(QUESTIONS):
            if stop(values):
                return float(question)
        return float(QUESTIONS)

    return _audited(ask, 30_000, by_frequency, composition="pld")
