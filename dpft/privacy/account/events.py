"""What an account counts: trainings, queries and selections on the same records, and the epsilon of all together.

===============  ======================================================================================================
release          theorem
===============  ======================================================================================================
``Mechanism``    that of its sampler (:mod:`dpft.privacy.mechanism`); a query that reads every record is Poisson
                 sampling at rate 1 (``replace_one``: a fixed-size batch of all)
``PureRelease``  epsilon-DP: dominated by randomised response (Kairouz, Oh, Viswanath 2015, arXiv 1311.0776), exactly
                 in PLD and RDP; inside a selection as epsilon^2 / 2-zCDP (Bun, Steinke 2016, arXiv 1605.02065,
                 Proposition 1.4)
``Selection``    the best of a random number of trials: Papernot, Steinke 2022 (arXiv 2110.03620), Theorem 2 (truncated
                 negative binomial) and Theorem 6 (Poisson); RDP alone (dp_accounting's RepeatAndSelectDpEvent)
===============  ======================================================================================================
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np

from dpft.errors import AccountingError, PrivacyConfigError
from dpft.privacy.accounting import accountant as accounting
from dpft.privacy.mechanism import AccountantName, AdjacencyName, Mechanism, UnitName
from dpft.privacy.packages import import_package

TrialsName = Literal["poisson", "negative_binomial"]


@dataclass(frozen=True)
class PureRelease:
    """A release that is epsilon-DP with delta 0, such as a sparse vector, under the account's adjacency and unit.

    Attributes:
        epsilon: > 0.

    Raises:
        PrivacyConfigError: out of range.
    """

    epsilon: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise PrivacyConfigError(f"a pure release with epsilon={self.epsilon!r}; expected a finite number > 0.")


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
        if not self.trial or any(isinstance(release, Selection) or count < 1 for release, count in self.trial):
            raise PrivacyConfigError(
                f"a trial with the releases {self.trial!r}; expected (mechanism, number >= 1) pairs, at least one, "
                "and no selection inside a selection."
            )


Release = Mechanism | PureRelease | Selection
Use = tuple[Release, int]
"""A release, and how often it is made."""


class Protects(NamedTuple):
    """Whom an account protects: its adjacency and unit."""

    adjacency: AdjacencyName
    unit: UnitName = "example"
    examples_per_user: int | None = None


# --------------------------------------------------------------------------------------------------- as data
def use_to_json(use: Use) -> list[Any]:
    """A use as JSON-serialisable list ``[kind, constants, count]``."""
    release, count = use
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
    """A release in a few words, with its constants."""
    if isinstance(release, Mechanism):
        constants = {name: value for name, value in release.to_dict().items() if name not in ("sampler", "unit")}
        shown = ", ".join(f"{name} {value:g}" for name, value in constants.items())
        return f"{release.sampler} Gaussian ({shown})"
    if isinstance(release, PureRelease):
        return f"pure epsilon {release.epsilon:g}"
    law = "Poisson" if release.distribution == "poisson" else f"truncated negative binomial, shape {release.shape:g}"
    trial = "; ".join(f"{count} x {described(inner)}" for inner, count in release.trial)
    return f"best of a random number of trials (mean {release.trials:g}, {law}), each: {trial}"


def counted(uses: Sequence[Use]) -> Counter[Release]:
    """How often each release is made."""
    total: Counter[Release] = Counter()
    for release, count in uses:
        total[release] += int(count)
    return total


def less(uses: Sequence[Use], others: Sequence[Use]) -> bool:
    """Whether ``others`` make some release more often than ``uses`` do."""
    mine = counted(uses)
    return any(count > mine[release] for release, count in counted(others).items())


# --------------------------------------------------------------------------------------------------- checks
def check_use(use: Use, protects: Protects, composition: AccountantName) -> None:
    """Refuse what an account cannot compose: another adjacency or unit, no theorem, no noise, no whole number.

    Raises:
        AccountingError: saying what to use instead.
    """
    release, count = use[0], cast(Any, use[1])  # nothing enforces the annotation at run time
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < 0:
        raise AccountingError(f"{count!r} releases; expected a whole number >= 0.")
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


def _check_mechanism(mechanism: Mechanism, protects: Protects, composition: AccountantName) -> None:
    if (mechanism.unit, mechanism.examples_per_user) != (protects.unit, protects.examples_per_user):
        raise AccountingError(
            f"a release for the unit {_unit(mechanism.unit, mechanism.examples_per_user)} and an account for the unit "
            f"{_unit(protects.unit, protects.examples_per_user)}: they have no common epsilon; give the release the "
            "account's unit, or create an account for the release's unit and enter every use of the records there."
        )
    if mechanism.strategy is not None:
        raise AccountingError(
            "correlated noise in an account: an account adds up equal releases, and the steps of one training with "
            "correlated noise are not equal; use mechanism='dp_sgd', or this run with its ledger and no account."
        )
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
    # Unit and examples per user are checked as a mechanism's are.
    if protects.unit == "user" or protects.examples_per_user is not None:
        shape = Mechanism(
            sampler="poisson",
            noise_multiplier=1.0,
            sample_rate=1.0,
            unit=protects.unit,
            examples_per_user=protects.examples_per_user,
        )
        check_use((shape, 1), protects, composition)  # type: ignore[arg-type]  # checked above


def _unit(unit: str, examples: int | None) -> str:
    return unit if examples is None else f"{unit} (at most {examples} examples each)"


# --------------------------------------------------------------------------------------------------- accounting
def orders() -> tuple[float, ...]:
    """The Renyi orders at which :func:`rdp_curve` gives values: dp_accounting's default ones."""
    return tuple(import_package("dp_accounting.rdp.rdp_privacy_accountant").DEFAULT_RDP_ORDERS)


def rdp_curve(uses: Sequence[Use], protects: Protects) -> np.ndarray:
    """RDP of all uses together, at :func:`orders`; it adds up over the uses."""
    return sum((_rdp_of_use(release, int(count), protects) for release, count in uses), np.zeros(len(orders())))


def _rdp_of_use(release: Release, count: int, protects: Protects) -> np.ndarray:
    if count == 0:
        return np.zeros(len(orders()))
    if isinstance(release, Mechanism):
        return accounting.rdp_of(release, count)
    return count * np.asarray(_rdp_of_one(release, protects))


@functools.lru_cache(maxsize=64)
def _rdp_of_one(release: PureRelease | Selection, protects: Protects) -> tuple[float, ...]:
    dp, events = import_package("dp_accounting"), import_package("dp_accounting.dp_event")
    if isinstance(release, PureRelease):
        # Two buckets that are told apart by a ratio of e^epsilon: the pair that dominates every epsilon-DP release.
        event = dp.RandomizedResponseDpEvent(noise_parameter=2 / (1 + math.exp(release.epsilon)), num_buckets=2)
        relation = dp.NeighboringRelation.REPLACE_ONE
    else:
        relation = getattr(dp.NeighboringRelation, accounting._RELATIONS[protects.adjacency])
        inner = dp.ComposedDpEvent([_inner_event(*use) for use in release.trial])
        shape = math.inf if release.distribution == "poisson" else release.shape
        event = events.RepeatAndSelectDpEvent(inner, release.trials, shape)
    accountant = import_package("dp_accounting.rdp").RdpAccountant(neighboring_relation=relation)
    accountant.compose(event)
    return tuple(float(value) for value in accountant.rdp)


def _inner_event(release: Mechanism | PureRelease, count: int) -> Any:
    dp = import_package("dp_accounting")
    if isinstance(release, PureRelease):
        return dp.SelfComposedDpEvent(dp.ZCDpEvent(rho=release.epsilon**2 / 2, xi=0.0), count)
    base, times = accounting._as_composition(release, count)
    return dp.SelfComposedDpEvent(accounting.dp_event(base), times)


def epsilon_of_rdp(curve: np.ndarray, delta: float) -> float:
    """Epsilon at delta of an RDP curve: Canonne, Kamath, Steinke 2020 (arXiv 2004.00010), Proposition 12."""
    if not curve.any():
        return 0.0
    return float(import_package("dp_accounting.rdp.rdp_privacy_accountant").compute_epsilon(orders(), curve, delta)[0])


def uses_epsilon(uses: Sequence[Use], delta: float, protects: Protects, composition: AccountantName) -> float:
    """The epsilon of all uses together, where what is used does not depend on results of earlier uses.

    Args:
        uses: what was released, or will be.
        delta: in (0, 1).
        protects: adjacency and unit.
        composition: ``pld`` or ``rdp`` (at the best order).

    Returns:
        An upper bound.

    Raises:
        AccountingError: as :func:`check_use`, or delta is too small for PLD.
    """
    for use in uses:
        check_use(use, protects, composition)
    if composition == "rdp":
        return epsilon_of_rdp(rdp_curve(uses, protects), delta)
    mechanisms = accounting.merged([(r, int(n)) for r, n in uses if isinstance(r, Mechanism)])
    pure = tuple((r.epsilon, int(n)) for r, n in uses if isinstance(r, PureRelease) and n > 0)
    if not pure:
        return accounting.compose_epsilon(mechanisms, delta)
    return _pld_epsilon(tuple(mechanisms), pure, delta)


@functools.lru_cache(maxsize=256)
def _pld_epsilon(events: tuple[accounting.Event, ...], pure: tuple[tuple[float, int], ...], delta: float) -> float:
    accounting.compose_cached(events, delta, "pld")  # its checks of delta and of the events among themselves
    module = import_package("dp_accounting.pld.privacy_loss_distribution")
    common = import_package("dp_accounting.pld.common")
    finest = min(epsilon for epsilon, _ in pure) / 16
    grid = [h for h in accounting._LADDER if h <= min(finest, accounting._LARGEST_FINE)] or [accounting._LADDER[0]]
    h = max([accounting.discretization(mechanism) for mechanism, _ in events], default=grid[-1])
    found = []
    for extra in (0, 1) if any(m.sampler == "truncated_poisson" for m, _ in events) else (0,):
        total = accounting.total_pld(events, h, extra) if events else None
        for epsilon, count in pure:
            parameters = common.DifferentialPrivacyParameters(epsilon, 0.0)
            part = module.from_privacy_parameters(parameters, h).self_compose(count)
            total = part if total is None else total.compose(part)
        assert total is not None
        found.append(float(total.get_epsilon_for_delta(delta)))
    return max(found)
