"""Audits of what is not a training: private figures, early stopping, and the choice of the best of several trials.

Each trial asks dpft once, on one of two neighbouring sets of records; what it answers is the observation. An account
pays for the first trial, which gives the claim; the others are repetitions of the same release, as an audit needs.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import dpft
from dpft.audit import TwoWorldsAudit, two_worlds
from dpft.audit.two_worlds import as_it_is, by_frequency
from dpft.privacy import Protects, PureRelease

DELTA = 0.01
RECORDS = 20
QUESTIONS = 160
EARLY_STOP = 2.0  # epsilon
TRIALS = 6
NONE = -1.0  # for a search without a trial: below every score


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
    ask: Callable[[bool, Any], list[float]], trials: int, attacks: dict[str, Any], **options: Any
) -> TwoWorldsAudit:
    """The audit of a query that is asked ``trials`` times in each of the two worlds."""
    with new_account(**options) as account:
        ask(True, account)
        claim, delta = account.spent(), DELTA
        if isinstance(release := account.uses()[0][0], PureRelease):
            claim, delta = release.epsilon, 0.0
    worlds = [np.array([ask(present, Purse()) for _ in range(trials)]) for present in (True, False)]
    return two_worlds(worlds[0], worlds[1], attacks, claimed_epsilon=claim, delta=delta)


def private_mean(seed: int) -> TwoWorldsAudit:
    """A noisy mean of 20 records, or of 19: the person's value is at the end of the range."""

    def ask(present: bool, payer: Any) -> list[float]:
        found = dpft.private_mean(records(present), low=0, high=1, size=RECORDS, account=payer, noise_multiplier=1.0)
        return [found.value]

    return _audited(ask, 12_000, {"the mean": as_it_is}, composition="pld")


def early_stop(seed: int) -> TwoWorldsAudit:
    """A sparse vector that is asked about a mean near its threshold, and about one without the person in turn.

    Observed is when it stopped, and how many more stops the first question got: after a stop there must be no answer.
    The claim has no delta, and neither has the bound.
    """

    def ask(present: bool, payer: Any) -> list[float]:
        asked = ([0.0, 1.0] if present else [0.0], [0.0])
        stop = dpft.EarlyStop(threshold=0.375, low=0, high=1, size=2, epsilon=EARLY_STOP, account=payer)
        answers: list[bool] = []
        with contextlib.suppress(dpft.BudgetExceededError):
            while len(answers) < QUESTIONS:
                answers.append(stop(asked[len(answers) % 2]))
        first = answers.index(True) if True in answers else QUESTIONS
        return [float(first), float(sum(answers[::2]) - sum(answers[1::2]))]

    attacks = {"when it stopped": by_frequency, "stops": lambda *shown: lambda observed: observed[:, 1]}
    return _audited(ask, 8_000, attacks, composition="pld")


def tune(seed: int) -> TwoWorldsAudit:
    """The best of a random number of trials, six on average, each of which answers yes or no with a known law.

    With the person's record yes is so much likelier that a trial is (0.8, 0)-DP. That none of many trials said yes
    tells much more than one trial does.
    """
    one, often = PureRelease(0.8), {True: 0.3 * math.exp(0.8), False: 0.3}
    assert (1 - often[False]) / (1 - often[True]) <= math.exp(one.epsilon)
    rng = np.random.default_rng(seed)

    def ask(present: bool, payer: Any) -> list[float]:
        def trial(candidate: int, budget: dpft.Trial) -> tuple[float, None]:
            budget.spend([(one, 1)], "an answer")
            return float(rng.random() < often[present]), None

        best = dpft.tune(
            trial,
            [0],
            account=payer,
            trial=[(one, 1)],
            trials=TRIALS,
            distribution="poisson",
            scores="public",
            folder=Path(folder) / "trials",
        )
        return [NONE if best is None else best.score]  # type: ignore[list-item]  # with public scores it is a number

    with tempfile.TemporaryDirectory(prefix="dpft-audit-") as folder:
        return _audited(ask, 3_000, {"the best score": as_it_is})
