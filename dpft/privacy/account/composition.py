"""The epsilon of all that an account counts together: Renyi DP, added up, or privacy loss distributions, composed."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

from dpft.privacy.account.events import Protects, PureRelease, Release, Selection, Use, check_use
from dpft.privacy.accounting import accountant as accounting
from dpft.privacy.mechanism import AccountantName, Mechanism
from dpft.privacy.packages import import_package

_TINY = 1e-4  # epsilon of a pure release


def orders() -> tuple[float, ...]:
    """The Renyi orders at which :func:`rdp_curve` gives values: dp_accounting's default ones."""
    return tuple(import_package("dp_accounting.rdp.rdp_privacy_accountant").DEFAULT_RDP_ORDERS)


def rdp_curve(uses: Sequence[Use]) -> np.ndarray:
    """RDP of all uses together, at :func:`orders`; it adds up over the uses."""
    return sum((_rdp_of_use(release, int(count)) for release, count in uses), np.zeros(len(orders())))


def _rdp_of_use(release: Release, count: int) -> np.ndarray:
    if count == 0:
        return np.zeros(len(orders()))
    if isinstance(release, Mechanism):
        return accounting.rdp_of(release, count)
    return count * np.asarray(_rdp_of_pure(release) if isinstance(release, PureRelease) else _rdp_of_best(release))


@functools.lru_cache(maxsize=64)
def _rdp_of_pure(release: PureRelease) -> tuple[float, ...]:
    if release.epsilon < _TINY:
        # That of randomised response rounds to too little, or below 0. Bun and Steinke 2016 (arXiv 1605.02065),
        # Proposition 1.4, which is larger by a relative 1e-8 only, at an order of 1.
        return tuple(min(release.epsilon, alpha * release.epsilon**2 / 2) for alpha in orders())
    dp = import_package("dp_accounting")
    # Two buckets that are told apart by a ratio of e^epsilon: the pair that dominates every epsilon-DP release.
    event = dp.RandomizedResponseDpEvent(noise_parameter=2 / (1 + math.exp(release.epsilon)), num_buckets=2)
    accountant = import_package("dp_accounting.rdp").RdpAccountant(
        neighboring_relation=dp.NeighboringRelation.REPLACE_ONE
    )
    accountant.compose(event)
    return tuple(float(value) for value in accountant.rdp)


@functools.lru_cache(maxsize=64)
def _rdp_of_best(release: Selection) -> tuple[float, ...]:
    # What dp_accounting does for its RepeatAndSelectDpEvent, for trials that it has no event for, too.
    of_best = import_package("dp_accounting.rdp.rdp_privacy_accountant")._compute_rdp_repeat_and_select
    shape = math.inf if release.distribution == "poisson" else release.shape
    return tuple(float(value) for value in of_best(orders(), rdp_curve(release.trial), release.trials, shape))


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
        return epsilon_of_rdp(rdp_curve(uses), delta)
    mechanisms = accounting.merged([(r, int(n)) for r, n in uses if isinstance(r, Mechanism)])
    pure = tuple((r.epsilon, int(n)) for r, n in uses if isinstance(r, PureRelease) and n > 0)
    return _pld_epsilon(tuple(mechanisms), pure, delta)


@functools.lru_cache(maxsize=256)
def _pld_epsilon(events: tuple[accounting.Event, ...], pure: tuple[tuple[float, int], ...], delta: float) -> float:
    # Its unit is the account's, whose example may be a user.
    accounting.check_events(events, delta, "pld", one_unit=False)
    if not events and not pure:
        return 0.0
    if pure and delta < accounting.least_delta(events, sum(count for _, count in pure)):
        return _pld_epsilon(events, (), delta) + sum(epsilon * count for epsilon, count in pure)  # basic composition
    module = import_package("dp_accounting.pld.privacy_loss_distribution")
    common = import_package("dp_accounting.pld.common")
    finest = min((epsilon for epsilon, _ in pure), default=math.inf) / 16
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
