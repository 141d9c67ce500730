"""Hyperparameter search under differential privacy: the best of a random number of trials.

Choosing the best of several private trainings by their results reveals more than one training does. If the number of
trials is random, and nothing but the best is released, it reveals a few times as much, not as many times as there were
trials: Papernot and Steinke 2022 (arXiv 2110.03620), Theorem 2 (truncated negative binomial) and Theorem 6
(Poisson). What the theorems assume, :func:`tune` does: candidates are drawn uniformly and with replacement, every
trial runs to its end, and the number of trials, and all trials but the best, are forgotten.
"""

from __future__ import annotations

import functools
import math
import os
import secrets
import shutil
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch.distributed as dist

from dpft.errors import AccountingError, BudgetExceededError, EngineError, LedgerError, PrivacyConfigError
from dpft.evaluation import PrivateMean
from dpft.privacy.account.account import Account
from dpft.privacy.account.events import (
    PureRelease,
    Release,
    Selection,
    Use,
    check_count,
    check_item,
    check_use,
    less,
    one_training,
)
from dpft.privacy.mechanism import Mechanism, UnitName

C = TypeVar("C")
Distribution = Literal["poisson", "negative_binomial", "fixed"]
TrialUse = tuple[Mechanism | PureRelease, int]


class Trial:
    """The budget of one trial: pass it as ``account=`` to :func:`dpft.prepare` and :func:`dpft.private_mean`.

    It covers what was declared for a trial, release by release, and refuses everything else.

    Attributes:
        folder: for the trial's ledger and files; deleted unless the trial is the best one.
        account_id: of the account that pays for the search.
        delta: the account's.
        protects: the account's.
        composition: the account's.
    """

    def __init__(self, account: Account, trial: Sequence[TrialUse], folder: Path) -> None:
        self.folder = folder
        self.account_id, self.delta = account.account_id, account.delta
        self.protects, self.composition = account.protects, account.composition
        self._declared = _counted(trial)
        self._used: dict[str, Sequence[Use]] = {}
        self._ended: set[str] = set()
        self._ledgers: dict[str, Path] = {}
        self._pid = os.getpid()
        self._over = False

    def reserve(
        self,
        name: str,
        uses: Sequence[Use],
        what: str,
        *,
        ledger: Path | None = None,
        released: Sequence[Use] = (),
        item: UnitName = "example",
    ) -> None:
        """Take some of the trial's releases.

        Raises:
            BudgetExceededError: they were not declared, or are used up, or the trial is over.
            AccountingError: the examples are not the account's units, or no theorem composes them.
            LedgerError: a training that began elsewhere, or whose ledger is a copy; or this is a forked process.
        """
        uses, released = one_training(uses), one_training(released)
        check_item(uses, self.protects, item)
        for use in uses:
            check_use(use, self.protects, self.composition)
        if os.getpid() != self._pid:
            raise LedgerError(
                f"process {os.getpid()} inherited a trial, whose budget would be spent in each process; pay from the "
                "trial in the process that dpft.tune runs in."
            )
        if released and name not in self._used:
            raise LedgerError(
                f"the trial does not know the run {name}, which has releases: trials that go on from another trial, "
                "or from an earlier training, are not independent. Begin each with a ledger in its own trial.folder."
            )
        self._check_before(name, released)
        first = self._ledgers.get(name)
        if name not in self._ended and first is not None and ledger is not None and first != ledger.absolute():
            raise LedgerError(
                f"the run {name} of the trial is open with the ledger {first}, and {ledger} is a copy of it: the "
                "releases of both would be counted once. Go on with the first."
            )
        if self._over:
            raise BudgetExceededError(f"{what} would be paid from a trial that is over; pay from the account.")
        others = [use for other, theirs in self._used.items() if other != name for use in theirs]
        declared = self._declared
        for (release, number), count in _counted([*others, *uses]).items():
            if count > declared[release, number]:
                raise BudgetExceededError(
                    f"{what} would make {count} releases of {release} in one trial, and {declared[release, number]} "
                    "were declared for it; declare in trial=... all that a trial releases, alike for all candidates."
                )
        self._used[name] = tuple(uses)
        self._ended.discard(name)
        if ledger is not None:
            self._ledgers[name] = ledger.absolute()

    def finish(self, name: str, uses: Sequence[Use]) -> None:
        """Give back what was not used, to this trial alone.

        Raises:
            LedgerError: nothing of this name was taken, or it has ended with more releases.
        """
        uses = one_training(uses)
        if name not in self._used:
            raise LedgerError(f"the trial has no use named {name!r}; it may be another trial's.")
        self._check_before(name, uses)
        self._used[name] = tuple(uses)
        self._ended.add(name)

    def _check_before(self, name: str, released: Sequence[Use]) -> None:
        """Refuse who knows of fewer releases than a use ended with, as an account does."""
        if name in self._ended and less(released, self._used[name]):
            raise LedgerError(
                f"the trial counts more releases of the run {name} than its ledger: the ledger is an old copy. Give "
                "the ledger that the run wrote last."
            )

    def spend(self, uses: Sequence[Use], what: str, *, item: UnitName = "example") -> str:
        """Take releases that are made at once."""
        name = str(uuid.uuid4())
        self.reserve(name, uses, what, item=item)
        self._ended.add(name)
        return name

    def __reduce__(self) -> Any:
        # Each copy would have the budget of one trial.
        raise TypeError("a Trial cannot be copied or pickled; pay from it in the process that dpft.tune runs in")

    def end(self) -> None:
        """Nothing more can be paid from it."""
        self._over = True

    def paid_for(self, name: str) -> bool:
        """Whether a release was paid from this trial."""
        return name in self._used


@dataclass(frozen=True)
class Tuned(Generic[C]):
    """What a search releases: the best trial, and nothing of the others.

    Attributes:
        candidate: the best trial's.
        score: the best trial's.
        output: what ``train`` returned beside the score.
        folder: the best trial's files.
        tuning: how hyperparameters were chosen, for ``dpft.privacy_report(tuning=...)``.
    """

    candidate: C
    score: float | PrivateMean
    output: Any
    folder: Path
    tuning: str


def tune(
    train: Callable[[C, Trial], tuple[float | PrivateMean, Any]],
    candidates: Sequence[C],
    *,
    account: Account,
    trial: Sequence[TrialUse],
    trials: float,
    distribution: Distribution = "negative_binomial",
    shape: float = 1.0,
    scores: Literal["private", "public"] = "private",
    folder: str | Path = "tuning",
    what: str = "hyperparameter search",
) -> Tuned[C] | None:
    """Train candidates, a random number of times, and return the best; the account pays before the first trial.

    Nothing that ``train`` shows or writes about a trial may be published or acted upon, nor how long the search took
    or how many trials it ran: only the best trial is covered.

    Args:
        train: candidate and :class:`Trial` -> score (larger is better) and output. Everything that it computes from
            the account's records it must pay from the trial, and write below ``trial.folder``; for a training that
            it starts in other processes, which cannot pay, it calls ``trial.reserve``. An exception ends the search,
            which stays paid for; one that comes from the records is not, and is to be caught there: the lowest score.
        candidates: what is searched. One is drawn uniformly for each trial, with replacement.
        account: of the records, with ``composition="rdp"`` unless ``distribution="fixed"``.
        trial: the releases of one trial, all candidates alike: mechanisms with their numbers.
        trials: the expected number of trials; the number itself for ``fixed``.
        distribution: of the number of trials. ``negative_binomial``: at least 1, with ``shape``; its cost grows least
            with ``trials``. ``poisson``: less variation, but it may be 0. ``fixed``: composed, all trials are paid.
        shape: of ``negative_binomial``: 1 is geometric; nearer to 0 costs less and varies more.
        scores: ``private``: the score is a :class:`PrivateMean` that the trial paid for. ``public``: a number that is
            computed from public data and the trial's releases; that cannot be checked, and is stated.
        folder: trials get folders in it.
        what: the search, in words, for the account.

    Returns:
        The best trial; None where the random number of trials was 0.

    Raises:
        PrivacyConfigError: a parameter out of range, no candidates, or a score of another kind.
        AccountingError: no theorem for a trial's releases in this account.
        BudgetExceededError: the account does not cover the search, or a trial releases more than was declared.
        EngineError: several processes.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise EngineError(
            f"dpft.tune among {dist.get_world_size()} processes, each of which would draw its own trials; call it in "
            "one process, and start trainings of several processes from there."
        )
    if not candidates:
        raise PrivacyConfigError("candidates is empty; expected at least one.")
    if scores not in ("private", "public"):
        raise PrivacyConfigError(f"scores={scores!r}; expected 'private' or 'public'.")
    declared = tuple(trial)
    for _, count in declared:
        check_count(count)
    if distribution == "fixed":
        uses, number = _fixed(declared, trials)
        law = f"{number} trials, all of them composed"
    else:
        selection = Selection(
            declared, float(trials), distribution, 0.0 if distribution == "poisson" else float(shape)
        )
        uses, number = [(selection, 1)], -1
        law = f"the best of a random number of trials ({distribution}, mean {trials:g}), Papernot and Steinke 2022"
    # What an example is, each trial asks those who pay from it.
    account.spend(uses, what, item=account.protects.unit)
    if number < 0:
        number = number_of_trials(float(trials), distribution, float(shape))
    tuning = (
        f"{law}, over {len(candidates)} candidates; paid from account {account.account_id}, whose statement has the "
        f"epsilon; scores: {'private' if scores == 'private' else 'said to come from public data'}"
    )
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    best: Tuned[C] | None = None
    highest = -math.inf
    for _ in range(number):
        candidate = candidates[secrets.randbelow(len(candidates))]
        here = Trial(account, declared, Path(tempfile.mkdtemp(prefix="trial-", dir=root)))
        score, output = train(candidate, here)
        here.end()
        rank, loser = _rank(score, scores, here), here.folder
        if best is None or rank > highest:
            loser = here.folder if best is None else best.folder
            best, highest = Tuned(candidate, score, output, here.folder, tuning), rank
        if loser != best.folder:
            shutil.rmtree(loser)
    return best


def _counted(uses: Sequence[Use]) -> Counter[tuple[Release, int]]:
    """How often each release is made; of a shuffled training the whole epochs, as each training begins one.

    Trainings with correlated noise do not add up: each is counted apart, and the longest is compared with the longest
    that was declared. The number beside a release tells them apart; it is 0 for others.
    """
    total: Counter[tuple[Release, int]] = Counter()
    for release, count in sorted(uses, key=lambda use: -use[1]):
        epoch = release.steps_per_epoch if isinstance(release, Mechanism) else None
        if isinstance(release, Mechanism) and release.strategy is not None:
            number = sum(found == release for found, _ in total)
            total[release, number] = int(count)
        else:
            total[release, 0] += int(count) if epoch is None else math.ceil(count / epoch) * epoch
    return total


def _fixed(trial: tuple[TrialUse, ...], trials: float) -> tuple[list[Use], int]:
    if not (math.isfinite(trials) and trials == int(trials) and trials >= 1):
        raise PrivacyConfigError(f"trials={trials!r} with distribution='fixed'; expected a whole number >= 1.")
    number = int(trials)
    uses: list[Use] = []
    for release, count in trial:
        # A training with epochs starts one in each trial; one with correlated noise is not two shorter ones.
        one_by_one = isinstance(release, Mechanism) and (
            release.steps_per_epoch is not None or release.strategy is not None
        )
        uses += [(release, count)] * number if one_by_one else [(release, count * number)]
    return uses, number


def _rank(score: float | PrivateMean, scores: str, trial: Trial) -> float:
    """The number by which trials are compared; NaN is the worst."""
    if scores == "private":
        if not isinstance(score, PrivateMean) or not trial.paid_for(score.paid):
            raise PrivacyConfigError(
                f"a trial's score is a {type(score).__name__} with scores='private'; expected a PrivateMean that was "
                "paid from the trial: dpft.private_mean(..., account=trial). With scores='public' it is a number."
            )
        return score.value
    if isinstance(score, PrivateMean):
        raise PrivacyConfigError("a trial's score is a PrivateMean with scores='public'; say scores='private'.")
    return -math.inf if math.isnan(score) else float(score)


def number_of_trials(mean: float, distribution: str, shape: float) -> int:
    """Draw the number of trials: Poisson, or the truncated negative binomial of Papernot and Steinke, Definition 1.

    Exactly, from random bits of the operating system: by coins whose probabilities are fractions.

    Args:
        mean: the expectation, >= 1.
        distribution: ``poisson`` or ``negative_binomial``.
        shape: eta >= 0 of the negative binomial.

    Raises:
        AccountingError: another distribution.
    """
    if distribution == "poisson":
        whole, rest = divmod(Fraction(mean), 1)
        return sum(_poisson(Fraction(1)) for _ in range(whole)) + _poisson(rest)
    if distribution != "negative_binomial":
        raise AccountingError(f"distribution={distribution!r} of the number of trials has no theorem.")
    if mean == 1:
        return 1
    # Its P(k) is proportional to (1 - gamma)^k (l + eta) / (l + 1), multiplied over l = 1, ..., k - 1. The sum of m
    # geometric numbers has m in place of eta: a k of it is kept with the quotient of the two, which is at most 1.
    gamma, eta = Fraction(_gamma(mean, shape)), Fraction(shape)
    parts = max(1, math.ceil(eta))
    number, left = 0, parts
    while left or not number:
        if not left:  # truncated: drawn until it is not 0
            left = parts
        elif _coin(gamma):
            left -= 1
        elif number and not _coin((number + eta) / (number + parts)):
            number, left = 0, parts
        else:
            number += 1
    return number


def _poisson(mean: Fraction) -> int:
    """A Poisson number of a mean in [0, 1]: a k that has the probability 2^-(k + 1), kept with what it lacks."""
    while True:
        number = 0
        while secrets.randbelow(2):
            number += 1
        if _coin((2 * mean) ** number / (2 * math.factorial(number))):
            return number


def _coin(probability: Fraction) -> bool:
    return secrets.randbelow(probability.denominator) < probability.numerator


@functools.lru_cache(maxsize=8)
def _gamma(mean: float, shape: float) -> float:
    """The parameter gamma in (0, 1) with this mean, by bisection; rounded up, to fewer trials: the bound is safe."""

    def mean_of(log_gamma: float) -> float:
        gamma = math.exp(log_gamma)
        odds = math.expm1(-log_gamma)  # 1 / gamma - 1
        return odds / -log_gamma if shape == 0 else shape * odds / -math.expm1(shape * math.log(gamma))

    low, high = -60.0, -1e-12  # of ln(gamma); the mean falls
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_of(middle) > mean else (low, middle)
    return math.exp(high)
