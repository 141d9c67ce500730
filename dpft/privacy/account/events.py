"""What an account counts: trainings, queries and selections on the same records, and the epsilon of all together.

===============  ======================================================================================================
release          theorem
===============  ======================================================================================================
``Mechanism``    that of its sampler (:mod:`dpft.privacy.mechanism`); a query that reads every record is Poisson
                 sampling at rate 1 (``replace_one``: a fixed-size batch of all); steps with correlated noise are one
                 training together, see :func:`dpft.privacy.accounting.accountant.of_one_run`
``PureRelease``  epsilon-DP: dominated by randomised response (Kairouz, Oh, Viswanath 2015, arXiv 1311.0776), exactly
                 in PLD and RDP
``Selection``    the best of a random number of trials: Papernot, Steinke 2022 (arXiv 2110.03620), Theorem 2 (truncated
                 negative binomial) and Theorem 6 (Poisson); RDP alone (dp_accounting's RepeatAndSelectDpEvent)
===============  ======================================================================================================
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from dpft.errors import AccountingError, PrivacyConfigError
from dpft.privacy.accounting import accountant as accounting
from dpft.privacy.mechanism import AccountantName, AdjacencyName, Mechanism, UnitName

TrialsName = Literal["poisson", "negative_binomial"]
MOST_RELEASES = 10**18


@dataclass(frozen=True)
class PureRelease:
    """A release that is epsilon-DP with delta 0, such as a sparse vector, under the account's adjacency and unit.

    Attributes:
        epsilon: > 0, at most 700: more protects nothing, and its exponential leaves the range of float64.

    Raises:
        PrivacyConfigError: out of range.
    """

    epsilon: float

    def __post_init__(self) -> None:
        if not 0 < self.epsilon <= 700:
            raise PrivacyConfigError(f"a pure release with epsilon={self.epsilon!r}; expected a number in (0, 700].")


@dataclass(frozen=True)
class Selection:
    """The best of a random number of trials, of which only the best is released.

    Attributes:
        trial: the releases of one trial, with their numbers.
        trials: expected number of trials, >= 1.
        distribution: of their number: ``poisson`` (0 is possible), or ``negative_binomial`` truncated to >= 1.
        shape: eta >= 0 of the negative binomial: 1 is geometric, 0 logarithmic; 0 with ``poisson``, where it has no
            meaning.

    Raises:
        PrivacyConfigError: out of range, or a selection of selections.
    """

    trial: tuple[tuple[Mechanism | PureRelease, int], ...]
    trials: float
    distribution: TrialsName = "poisson"
    shape: float = 0.0

    def __post_init__(self) -> None:
        if self.distribution not in ("poisson", "negative_binomial"):
            raise PrivacyConfigError(
                f"distribution={self.distribution!r} of the number of trials; expected 'poisson' or "
                "'negative_binomial': that the best of a fixed number of trials costs little has no theorem."
            )
        if not (math.isfinite(self.trials) and self.trials >= 1):
            raise PrivacyConfigError(f"trials={self.trials!r}; expected a finite number >= 1, the mean.")
        if not (math.isfinite(self.shape) and self.shape >= 0) or (self.distribution == "poisson" and self.shape):
            raise PrivacyConfigError(
                f"shape={self.shape!r} with distribution={self.distribution!r}; expected a finite number >= 0, and 0 "
                "for 'poisson', which has no shape."
            )
        object.__setattr__(self, "trial", tuple(self.trial))  # an iterator would be read once, and then cost nothing
        if not self.trial or any(isinstance(release, Selection) or count < 1 for release, count in self.trial):
            raise PrivacyConfigError(
                f"a trial with the releases {self.trial!r}; expected (mechanism, number >= 1) pairs, at least one, "
                "and no selection inside a selection."
            )


Release = Mechanism | PureRelease | Selection
Use = tuple[Release, int]
"""A release, and how often it is made."""


class Protects(NamedTuple):
    """Whom an account protects: its adjacency and unit, and how many examples a user has (None: not bounded)."""

    adjacency: AdjacencyName
    unit: UnitName = "example"
    examples_per_user: int | None = None


# --------------------------------------------------------------------------------------------------- as data
def use_to_json(use: Use) -> list[Any]:
    """A use as JSON-serialisable list ``[kind, constants, count]``."""
    release, count = use[0], int(use[1])
    if isinstance(release, Mechanism):
        return ["mechanism", release.to_dict(), count]
    if isinstance(release, PureRelease):
        return ["pure", {"epsilon": release.epsilon}, count]
    trial = [use_to_json(inner) for inner in release.trial]
    constants = {"trials": release.trials, "distribution": release.distribution, "shape": release.shape}
    return ["selection", {"trial": trial, **constants}, count]


def use_from_json(values: Any) -> Use:
    """Inverse of :func:`use_to_json`; for anything else PrivacyConfigError, KeyError, TypeError or ValueError."""
    kind, constants, count = values
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ValueError(f"not a use of an account: {values!r}")
    if kind == "mechanism":
        return Mechanism.from_dict(constants), count
    if kind == "pure":
        return PureRelease(**constants), count
    if kind == "selection":
        rest = {name: value for name, value in constants.items() if name != "trial"}
        return Selection(tuple(use_from_json(inner) for inner in constants["trial"]), **rest), count  # type: ignore[misc]  # it refuses selections
    raise ValueError(f"not a use of an account: {values!r}")


def described(release: Release) -> str:
    """A release in a few words, with its constants, to as many digits as it takes to compute its epsilon again."""
    if isinstance(release, Mechanism):
        left_out = ("sampler", "unit", "strategy")
        constants = {name: value for name, value in release.to_dict().items() if name not in left_out}
        shown = ", ".join(f"{name} {value:.10g}" for name, value in constants.items())
        if release.strategy is None:
            return f"{release.sampler} Gaussian ({shown})"
        strategy = ", ".join(f"{name} {value}" for name, value in release.strategy.to_dict().items() if name != "kind")
        return f"step of a training with correlated noise, {release.strategy.kind} ({shown}; {strategy})"
    if isinstance(release, PureRelease):
        return f"pure epsilon {release.epsilon:.10g}"
    law = (
        "Poisson" if release.distribution == "poisson" else f"truncated negative binomial, shape {release.shape:.10g}"
    )
    trial = "; ".join(f"{count} x {described(inner)}" for inner, count in release.trial)
    return f"best of a random number of trials (mean {release.trials:.10g}, {law}), each: {trial}"


def counted(uses: Sequence[Use]) -> Counter[Release]:
    """How often each release is made."""
    total: Counter[Release] = Counter()
    for release, count in uses:
        total[release] += int(count)
    return total


def whole(uses: Sequence[Use]) -> list[Use]:
    """The uses with their numbers as ``int``, so that a file that they are written to can be read again.

    Raises:
        AccountingError: a number that is not whole, or below 0.
    """
    uses = list(uses)  # an iterator would be read once
    for _, count in uses:
        check_count(count)
    return [(release, int(count)) for release, count in uses]


def one_training(uses: Sequence[Use]) -> list[Use]:
    """The uses of one run, whose correlated noise goes on over its starts: their steps are added up.

    Raises:
        AccountingError: as :func:`whole`.
    """
    uses = whole(uses)
    mechanisms = [(release, count) for release, count in uses if isinstance(release, Mechanism)]
    others: list[Use] = [use for use in uses if not isinstance(use[0], Mechanism)]
    return [*accounting.of_one_run(mechanisms), *others]


def released_by(uses: Sequence[Use]) -> list[Use]:
    """:func:`one_training` of what a ledger counts, which may be one more than there was: a line that a crash cut off.

    Correlated noise has no step beyond its last one, and no epsilon: the account could not be computed any more.
    """
    found: list[Use] = []
    for release, count in one_training(uses):
        strategy = release.strategy if isinstance(release, Mechanism) else None
        found.append((release, count if strategy is None else min(count, strategy.steps)))
    return found


def less(uses: Sequence[Use], others: Sequence[Use]) -> bool:
    """Whether ``others`` make some release more often than ``uses`` do."""
    mine = counted(uses)
    return any(count > mine[release] for release, count in counted(others).items())


# --------------------------------------------------------------------------------------------------- checks
def check_count(count: Any) -> None:
    """Refuse what is no number of releases; nothing enforces an annotation at run time.

    Raises:
        AccountingError: not whole, below 0, or so large that no epsilon could be computed.
    """
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or not 0 <= count <= MOST_RELEASES:
        raise AccountingError(f"{count!r} releases; expected a whole number >= 0, at most {MOST_RELEASES:.0e}.")


def check_words(name: str, what: str) -> None:
    """Refuse a use that could not be found again by its name, or stated in a table.

    Raises:
        PrivacyConfigError: saying which.
    """
    if type(name) is not str or not name:  # in the file it would be another name, which no later line takes up
        raise PrivacyConfigError(f"name={name!r} of a use; expected a text that no other use of the account has.")
    if type(what) is not str or not what.strip() or "\n" in what or "|" in what:
        raise PrivacyConfigError(f"what={what!r}; expected a few words on one line: what pays from the account.")


def check_use(use: Use, protects: Protects, composition: AccountantName) -> None:
    """Refuse what an account cannot compose: another adjacency or unit, no theorem, no noise, no whole number.

    What an example is, :func:`check_item` asks.

    Raises:
        AccountingError: saying what to use instead.
    """
    release, count = use
    check_count(count)
    if isinstance(release, Selection):
        if composition != "rdp":
            raise AccountingError(
                "the best of several trials in an account with composition='pld': its theorems are in Renyi DP; "
                "create the account with composition='rdp'."
            )
        for inner in release.trial:
            check_use(inner, protects, composition)
    elif isinstance(release, Mechanism):
        _check_mechanism(release, protects, composition)


def check_item(uses: Sequence[Use], protects: Protects, item: UnitName) -> None:
    """Refuse releases whose examples are not what the account counts them as.

    A release with unit ``example`` protects its examples, and only who makes it knows what these are: single records,
    or users with all of their records (:func:`dpft.by_user`).

    Args:
        uses: as a payer gives them.
        protects: the account's.
        item: what one example is.

    Raises:
        PrivacyConfigError: another item.
        AccountingError: single examples in an account for users, or the other way round.
    """
    if item not in get_args(UnitName):
        raise PrivacyConfigError(f"item={item!r}; expected 'example' or 'user': what one example of a release is.")
    if item == "user" and protects.unit == "example":
        # Without one of its rows a user's gradient is another one, so that this is no guarantee for rows either.
        raise AccountingError(
            "users as examples, and an account for the unit example: a user is not one record; create an account with "
            "unit='user' and enter every use of the records there."
        )
    for release, _ in uses:
        if isinstance(release, Selection):
            check_item(release.trial, protects, item)
        elif isinstance(release, Mechanism) and release.unit == "example" and item != protects.unit:
            raise AccountingError(_other_unit(release, protects))


def _other_unit(mechanism: Mechanism, protects: Protects) -> str:
    return (
        f"a release for the unit {in_words(mechanism.unit, mechanism.examples_per_user)} and an account for the unit "
        f"{in_words(protects.unit, protects.examples_per_user)}: they have no common epsilon; give the release the "
        "account's unit (dpft.by_user makes users the examples), or create an account for the release's unit and "
        "enter every use of the records there."
    )


def _check_mechanism(mechanism: Mechanism, protects: Protects, composition: AccountantName) -> None:
    # The examples of a release are the account's units, unless it counts several examples of one user.
    if mechanism.unit == "user" and (mechanism.unit, mechanism.examples_per_user) != protects[1:]:
        raise AccountingError(_other_unit(mechanism, protects))
    # Poisson sampling has the same losses under zero-out as under add/remove.
    as_zero_out = protects.adjacency == "zero_out" and mechanism.sampler == "poisson"
    if mechanism.adjacency != protects.adjacency and not as_zero_out:
        raise AccountingError(
            f"sampler={mechanism.sampler!r} protects under {mechanism.adjacency!r}, and the account counts under "
            f"{protects.adjacency!r}: no theorem composes them; use a sampler of the account's adjacency (such as "
            "'poisson' under 'add_or_remove_one' or 'zero_out'), or create an account with the sampler's adjacency."
        )
    if mechanism.noise_multiplier == 0:
        raise AccountingError(
            "a release without noise (noise_multiplier=0) has no epsilon: no account can pay for it."
        )
    accounting.check_supported(mechanism, composition)


def check_header(composition: str, protects: Protects, records: str) -> None:
    """Refuse an account that no theorem covers, or whose statement could not be read.

    Raises:
        PrivacyConfigError: a value out of range.
        AccountingError: no theorem for this unit or adjacency with this composition.
    """
    if composition not in get_args(AccountantName):
        raise PrivacyConfigError(f"composition={composition!r}; expected 'rdp' or 'pld'.")
    if protects.adjacency not in get_args(AdjacencyName):
        raise PrivacyConfigError(
            f"adjacency={protects.adjacency!r}; expected one of {', '.join(get_args(AdjacencyName))}."
        )
    if type(records) is not str or "\n" in records or "|" in records:
        raise PrivacyConfigError(f"records={records!r}; expected a few words on one line: which records these are.")
    if composition == "pld" and protects.adjacency == "replace_one":
        raise AccountingError(
            "an account with composition='pld' under 'replace_one': no dominating pair is known that composes; use "
            "composition='rdp'."
        )
    if protects.unit not in get_args(UnitName):
        raise PrivacyConfigError(f"unit={protects.unit!r}; expected 'example' or 'user'.")
    # What it says of a user's examples is checked as a mechanism's is.
    if protects.examples_per_user is not None:
        shape = Mechanism(
            sampler="poisson",
            noise_multiplier=1.0,
            sample_rate=1.0,
            unit=protects.unit,
            examples_per_user=protects.examples_per_user,
        )
        check_use((shape, 1), protects, composition)  # type: ignore[arg-type]  # checked above


def in_words(unit: str, examples: int | None) -> str:
    """A unit, with the number of examples that it has at most."""
    return unit if examples is None else f"{unit} (at most {examples} examples each)"
