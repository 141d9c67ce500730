"""Epsilon from a mechanism and a number of releases.

The numbers come from Google's ``dp_accounting``: privacy loss distributions (PLD, the default; connect-the-dots,
pessimistic, hence an upper bound up to float64 rounding), or Renyi DP (RDP, up to 3.8 times looser). This module
chooses the event that describes each sampler (:mod:`dpft.privacy.mechanism` lists the theorems) and the discretisation
of the privacy losses, and refuses whatever no theorem covers.

Discretisation. At every step, losses are rounded pessimistically to multiples of an interval h. That adds a variance
of the order of h^2 to the loss of each step: *measured*, epsilon is overestimated by a relative 0.08 (h / s)^2, where
s is the standard deviation of the loss of one step. At q = 1e-4, sigma = 1 (s = 1.3e-4), 300,000 steps, the usual
h = 1e-3 gives 0.544, h = 2e-5 gives 0.240. So h is the largest value of a fixed ladder that is at most s / 16 and at
most 1e-3. It depends on the mechanism alone, never on the number of steps, so that epsilon is monotone in the steps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dpft.errors import AccountingError
from dpft.privacy.accounting import allocation, renyi
from dpft.privacy.mechanism import EPOCH_SAMPLERS, AccountantName, Mechanism
from dpft.privacy.packages import import_package as _import

Event = tuple[Mechanism, int]
"""A mechanism and how many releases it made."""

_LADDER = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0)
_LARGEST_FINE, _LARGEST_COARSE = 1e-3, 5e-3
# Number of points of the distribution of one step above which a larger h is taken: about 1 s per epsilon.
_MOST_POINTS = 100_000
_MOST_MIXTURE_POINTS = 30_000  # a mixture's losses are inverted one by one, in Python: about 3 s
# Below these, rounding of float64 FFTs would count. It grows with the number of compositions: of Gaussians, whose
# epsilon is known, a delta is off by up to 2.5e-17 for each of up to 1e6 of them.
_SMALLEST_DELTA, _DELTA_OF_ONE = 1e-12, 1e-14

# Samplers whose batches are no secret: what they compose is a Gaussian without sampling.
_UNSAMPLED = ("shuffle", "fixed_order")

# Names of dp_accounting.NeighboringRelation.
_RELATIONS = {
    "add_or_remove_one": "ADD_OR_REMOVE_ONE",
    "replace_one": "REPLACE_ONE",
    "zero_out": "REPLACE_SPECIAL",
}


def epsilon(mechanism: Mechanism, steps: int, delta: float, *, accountant: AccountantName = "pld") -> float:
    """The epsilon of ``steps`` releases of one mechanism, at ``delta``.

    Args:
        mechanism: what one release is.
        steps: number of releases, >= 0.
        delta: in (0, 1).
        accountant: ``pld`` or ``rdp``.

    Returns:
        An upper bound on epsilon; 0 for no release, inf for a noise multiplier of 0.

    Raises:
        AccountingError: no theorem for this sampler with this accountant, or delta too small for its arithmetic.
    """
    return compose_epsilon([(mechanism, steps)], delta, accountant=accountant)


def compose_epsilon(events: Sequence[Event], delta: float, *, accountant: AccountantName = "pld") -> float:
    """The epsilon of the adaptive composition of several mechanisms on the same data.

    Args:
        events: mechanisms with their numbers of releases. Two entries of ``shuffle`` or ``balls_and_bins`` count
            their epochs separately, because the second one starts with a fresh epoch; and two of correlated noise are
            two trainings, each with its own noise. :func:`of_one_run` joins the starts of one training.
        delta: in (0, 1).
        accountant: ``pld`` or ``rdp``.

    Returns:
        An upper bound on epsilon.

    Raises:
        AccountingError: as :func:`epsilon`, and where the events have no common adjacency or unit.
    """
    return compose_cached(tuple(merged(events)), float(delta), accountant)


def rounded_up(value: float) -> str:
    """An epsilon with four digits, for display. Rounded up: to state less than was spent would be false."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    unit = 10.0 ** (math.floor(math.log10(abs(value))) - 3)
    # The small factor keeps 8 at 8: the quotient may be 8000.000000000001.
    return f"{math.ceil(value / unit * (1 - 1e-12)) * unit:.4g}"


def of_one_run(events: Sequence[Event]) -> list[Event]:
    """Joins the segments of a run whose noise is correlated over all of its starts; others stay as they are.

    Its steps count on, and its noise goes on, over a resume: see
    :mod:`dpft.privacy.correlated.noise_secrets`.
    """
    events, joined = list(events), dict[Mechanism, int]()
    for mechanism, count in events:
        if mechanism.strategy is not None:
            joined[mechanism] = joined.get(mechanism, 0) + count
    return [event for event in events if event[0].strategy is None] + list(joined.items())


def check_supported(mechanism: Mechanism, accountant: AccountantName) -> None:
    """Refuses a mechanism that the accountant has no theorem for.

    Raises:
        AccountingError: saying which accountant or sampler to use instead.
    """
    if accountant not in ("pld", "rdp"):
        raise AccountingError(f"accountant={accountant!r}; expected 'pld' or 'rdp'.")
    if mechanism.sampler == "fixed_size" and accountant == "pld":
        # A dominating pair exists for one step, but not one pair for both directions of replace-one, and composing
        # either of them alone is not a bound (Lebeda et al. 2024, arXiv 2405.20769).
        raise AccountingError(
            "sampler='fixed_size' with accountant='pld': no dominating pair is known that composes under replace-one "
            "adjacency; use accountant='rdp' (Wang et al. 2019, Theorem 27), or sampler='poisson'."
        )
    if mechanism.sampler == "balls_and_bins" and accountant == "rdp":
        # Its pair is not two mixtures on a line.
        raise AccountingError(
            "sampler='balls_and_bins' with accountant='rdp': only its PLD is implemented; use accountant='pld' (of an "
            "account: composition='pld')."
        )


def discretization(mechanism: Mechanism, *, coarse: bool = False) -> float:
    """The discretisation interval h of the privacy losses that PLD uses for a mechanism (see the module docstring).

    Args:
        mechanism: with noise.
        coarse: eight times coarser, for progress bars and the first steps of a search. Its epsilon is still an upper
            bound, larger by at most about 2 % (at least where the limit on the number of points does not apply).

    Returns:
        h, dimensionless (nats).

    Raises:
        AccountingError: PLD does not cover the sampler.
    """
    check_supported(mechanism, "pld")
    span, deviation = _loss_span_and_deviation(mechanism)
    wanted = min(deviation / 2, _LARGEST_COARSE) if coarse else min(deviation / 16, _LARGEST_FINE)
    most = _MOST_MIXTURE_POINTS if mechanism.unit == "user" else _MOST_POINTS
    allowed = [h for h in _LADDER if span / h <= most] or [_LADDER[-1]]
    return max([h for h in allowed if h <= wanted * (1 + 1e-9)] or allowed[:1])


# --------------------------------------------------------------------------------------------------- compose
def merged(events: Sequence[Event]) -> list[Event]:
    """Drops empty entries and adds up equal ones, whose releases are independent.

    Not those with epochs, where each entry starts one, nor of correlated noise, where each is a training.
    """
    kept: list[Event] = []
    counts: dict[Mechanism, int] = {}
    count: Any  # nothing enforces the annotation of Event at run time
    for mechanism, count in events:
        if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < 0:
            raise AccountingError(f"steps={count!r}; expected a whole number >= 0.")
        if count == 0:
            continue
        if mechanism.sampler in EPOCH_SAMPLERS or mechanism.strategy is not None:
            kept.append((mechanism, int(count)))
        else:
            counts[mechanism] = counts.get(mechanism, 0) + int(count)
    return kept + list(counts.items())


@functools.lru_cache(maxsize=4096)
def compose_cached(events: tuple[Event, ...], delta: float, accountant: AccountantName, coarse: bool = False) -> float:
    check_events(events, delta, accountant)
    if not events:
        return 0.0
    if any(mechanism.noise_multiplier == 0 for mechanism, _ in events):
        return math.inf
    if accountant == "rdp":
        return _compose_rdp(events, delta)
    # The coarsest of the intervals: it costs least, and its error only increases epsilon.
    h = max(discretization(mechanism, coarse=coarse) for mechanism, _ in events)
    if any(mechanism.sampler == "truncated_poisson" for mechanism, _ in events):
        # The neighbour has one example more or one less; the bound takes the larger N of the two, and is not
        # known to be monotone in it.
        return max(_compose_pld(events, delta, h, 0), _compose_pld(events, delta, h, 1))
    return _compose_pld(events, delta, h, 0)


def check_events(
    events: tuple[Event, ...], delta: float, accountant: AccountantName, *, one_unit: bool = True
) -> None:
    """Refuses what no theorem composes, and a delta for which there is no arithmetic.

    Args:
        events: to be composed.
        delta: of the epsilon.
        accountant: ``pld`` or ``rdp``.
        one_unit: all must have the same unit; False where an account knows that the examples of some are its units.

    Raises:
        AccountingError: saying what to use instead.
    """
    for mechanism, _ in events:
        check_supported(mechanism, accountant)
    if not 0 < delta < 1:
        raise AccountingError(f"delta={delta!r}; expected a number strictly between 0 and 1.")
    _check_common(events, one_unit)
    noisy = bool(events) and all(mechanism.noise_multiplier > 0 for mechanism, _ in events)
    if accountant == "pld" and noisy and delta < (least := least_delta(events)):
        raise AccountingError(
            f"delta={delta!r} is below {least:g}, where PLD in float64 gives no bound any more (at this number of "
            "releases); take a larger delta, or accountant='rdp'."
        )


def least_delta(events: Sequence[Event], others: int = 0) -> float:
    """The least delta for which PLD composes these releases, each mechanism with noise, and ``others`` beside them."""
    return max(_SMALLEST_DELTA, _DELTA_OF_ONE * (others + sum(_as_composition(*event)[1] for event in events)))


def _check_common(events: tuple[Event, ...], one_unit: bool) -> None:
    units = {(mechanism.unit, mechanism.examples_per_user) for mechanism, _ in events}
    if one_unit and len(units) > 1:
        raise AccountingError(
            f"releases for different privacy units on the same data, {sorted(units, key=str)}: they have no common "
            "epsilon; keep the unit of the first run, or start a new ledger on data that was not used before."
        )
    kinds = {mechanism.adjacency for mechanism, _ in events}
    # Poisson sampling has the same losses under zero-out as under add/remove: those compose.
    if len(kinds) > 1 and kinds != {"add_or_remove_one", "zero_out"}:
        raise AccountingError(
            f"releases under different adjacencies on the same data, {sorted(kinds)}: no theorem composes them; keep "
            "the sampler of the first run."
        )
    if len(kinds) > 1 and any(mechanism.sampler == "truncated_poisson" for mechanism, _ in events):
        raise AccountingError(
            "no theorem composes 'truncated_poisson' with 'shuffle' or 'balls_and_bins'; keep the first run's sampler."
        )


def _as_composition(mechanism: Mechanism, steps: int) -> tuple[Mechanism, int]:
    """A mechanism, and how often its one release (or epoch) is composed, that cost as much as ``steps`` releases."""
    if mechanism.sampler in EPOCH_SAMPLERS:
        # Epochs that have begun: in so many batches one example can have been.
        assert mechanism.steps_per_epoch is not None
        epochs = -(-steps // mechanism.steps_per_epoch)
        if mechanism.sampler == "shuffle":  # one Gaussian for each of these batches
            return mechanism.with_noise(mechanism.noise_multiplier / math.sqrt(epochs)), 1
        return mechanism, epochs
    strategy = mechanism.strategy
    if strategy is None:
        return mechanism, steps
    sensitivity = strategy.sensitivity(steps)  # it refuses more steps than there are
    if mechanism.sampler == "cyclic_poisson":
        return mechanism, strategy.participations_within(steps)
    return mechanism.with_noise(mechanism.noise_multiplier * strategy.scale / sensitivity), 1


def _compose_pld(events: tuple[Event, ...], delta: float, h: float, extra: int) -> float:
    return float(total_pld(events, h, extra).get_epsilon_for_delta(delta))


def total_pld(events: tuple[Event, ...], h: float, extra: int) -> Any:
    """The privacy loss distribution of all releases together; ``extra``: examples beyond ``truncated_poisson``'s N."""
    total: Any = None
    for mechanism, count in events:
        base, times = _as_composition(mechanism, count)
        part = _base_pld(base, h, extra)
        if times > 1:
            part = part.self_compose(times)
        total = part if total is None else total.compose(part)
    return total


@functools.lru_cache(maxsize=8)
def _base_pld(mechanism: Mechanism, h: float, extra: int) -> Any:
    """The privacy loss distribution of what is composed, see :func:`_as_composition`, discretised with interval h."""
    module = _import("dp_accounting.pld.privacy_loss_distribution")
    sigma = mechanism.noise_multiplier
    if mechanism.sampler in _UNSAMPLED:
        return module.from_gaussian_mechanism(sigma, value_discretization_interval=h)
    if mechanism.sampler == "balls_and_bins":
        assert mechanism.steps_per_epoch is not None
        return allocation.epoch_pld(sigma, mechanism.steps_per_epoch, h)
    assert mechanism.sample_rate is not None
    if mechanism.sampler == "truncated_poisson":
        assert mechanism.dataset_size is not None
        return module.from_truncated_subsampled_gaussian_mechanism(
            dataset_size=mechanism.dataset_size + extra,
            sampling_probability=mechanism.sample_rate,
            truncated_batch_size=mechanism.max_batch_size,
            noise_multiplier=sigma,
            value_discretization_interval=h,
        )
    if mechanism.unit == "user":
        sensitivities, probabilities = _mixture(mechanism)
        if len(sensitivities) == 1:  # at rate 1 all of a user's examples are there: a Gaussian, which is quicker
            return module.from_gaussian_mechanism(sigma / sensitivities[0], value_discretization_interval=h)
        return module.from_mixture_gaussian_mechanism(
            sigma, sensitivities, probabilities, value_discretization_interval=h
        )
    _require_poisson(mechanism)
    return module.from_gaussian_mechanism(sigma, value_discretization_interval=h, sampling_prob=mechanism.sample_rate)


def _require_poisson(mechanism: Mechanism) -> None:
    """What is left at the end of a choice is Poisson's: no other sampler gets its epsilon."""
    if mechanism.sampler not in ("poisson", "cyclic_poisson"):
        raise AccountingError(f"sampler={mechanism.sampler!r} has no accounting; none is taken from another sampler.")


def _mixture(mechanism: Mechanism) -> tuple[list[float], list[float]]:
    """The possible numbers of a user's k examples in the batch, and their probabilities: Binomial(k, q)."""
    k = 1 if mechanism.examples_per_user is None else mechanism.examples_per_user
    counts = np.arange(k + 1)
    probabilities = _import("scipy.stats").binom.pmf(counts, k, mechanism.sample_rate)
    keep = probabilities > 0  # q = 1, and powers of a tiny q that underflow
    return [float(c) for c in counts[keep]], [float(p) for p in probabilities[keep] / probabilities[keep].sum()]


def _loss_span_and_deviation(mechanism: Mechanism) -> tuple[float, float]:
    """Approximate range of the losses of one release that are kept (10 sigmas), and their standard deviation."""
    sigma = mechanism.noise_multiplier
    if mechanism.sampler in _UNSAMPLED:
        return 20 / sigma, 1 / sigma
    if mechanism.sampler == "balls_and_bins":
        assert mechanism.steps_per_epoch is not None
        return 20 / sigma + 1 / sigma**2, allocation.deviation(sigma, mechanism.steps_per_epoch)
    if mechanism.sampler == "truncated_poisson":
        # The component with the doubled sensitivity is the wider; the other is narrower, and usually more probable.
        assert mechanism.sample_rate is not None
        return 4 / (2 * sigma**2) + 20 / sigma, _chi(np.array([1.0]), np.array([mechanism.sample_rate]), sigma)
    sensitivities, probabilities = (np.asarray(values) for values in _mixture(mechanism))
    # dp_accounting truncates a mass of e^-50: the outcome beyond which the Gaussian at each sensitivity has that left.
    reach = float(np.max(sensitivities + sigma * np.sqrt(np.maximum(0, 2 * (50 + np.log(probabilities))))))
    exponents = (sensitivities * reach - sensitivities**2 / 2) / sigma**2
    highest = float(_import("scipy.special").logsumexp(exponents, b=probabilities))
    lowest = math.log(probabilities[0]) if sensitivities[0] == 0 else -highest
    return max(highest - lowest, 1e-12), _chi(sensitivities, probabilities, sigma)


def _chi(sensitivities: Any, probabilities: Any, sigma: float) -> float:
    """Square root of the chi-squared divergence of a mixture of Gaussians from the one at 0.

    Where it is small, it approximates the standard deviation of the losses.
    """
    exponents = np.minimum(np.outer(sensitivities, sensitivities) / sigma**2, 100.0)
    return float(math.sqrt(probabilities @ np.expm1(exponents) @ probabilities))


@functools.lru_cache(maxsize=64)
def _rdp_of_one(mechanism: Mechanism) -> tuple[float, ...]:
    """RDP of one release at dp_accounting's default orders; RDP adds up over releases."""
    dp_accounting = _import("dp_accounting")
    orders = _import("dp_accounting.rdp.rdp_privacy_accountant").DEFAULT_RDP_ORDERS
    if mechanism.sampler == "truncated_poisson":
        return tuple(renyi.of_truncated(mechanism, orders).tolist())
    if mechanism.unit == "user":
        return tuple(renyi.of_mixture(*_mixture(mechanism), mechanism.noise_multiplier, orders).tolist())
    # Under zero-out, Poisson sampling has the losses that it has under add/remove, under which dp_accounting has them.
    adjacency = "add_or_remove_one" if mechanism.sampler == "cyclic_poisson" else mechanism.adjacency
    relation = getattr(dp_accounting.NeighboringRelation, _RELATIONS[adjacency])
    accountant = _import("dp_accounting.rdp").RdpAccountant(neighboring_relation=relation)
    accountant.compose(dp_event(mechanism))
    return tuple(float(value) for value in accountant._rdp)


def rdp_of(mechanism: Mechanism, steps: int) -> np.ndarray:
    """RDP of ``steps`` releases of a supported mechanism with noise, at dp_accounting's default orders."""
    base, times = _as_composition(mechanism, steps)
    return times * np.asarray(_rdp_of_one(base))


def dp_event(mechanism: Mechanism) -> Any:
    """dp_accounting's description of one release, for RDP (of one Gaussian for ``shuffle`` and ``fixed_order``)."""
    dp_accounting, sigma = _import("dp_accounting"), mechanism.noise_multiplier
    if mechanism.sampler == "fixed_size":
        # dp_accounting's GaussianDpEvent says "standard deviation over the bound on one value's norm", but its RDP of
        # sampling without replacement takes it over the sensitivity of the sum (Wang et al. 2019, and its own
        # docstring), which is 2 C where one example replaces another: hence the half.
        gaussian = dp_accounting.GaussianDpEvent(sigma / 2)
        return dp_accounting.SampledWithoutReplacementDpEvent(mechanism.dataset_size, mechanism.batch_size, gaussian)
    if mechanism.sampler in _UNSAMPLED:
        return dp_accounting.GaussianDpEvent(sigma)
    _require_poisson(mechanism)
    return dp_accounting.PoissonSampledDpEvent(mechanism.sample_rate, dp_accounting.GaussianDpEvent(sigma))


def _compose_rdp(events: tuple[Event, ...], delta: float) -> float:
    rdp = _import("dp_accounting.rdp.rdp_privacy_accountant")
    orders = rdp.DEFAULT_RDP_ORDERS
    total = sum((rdp_of(mechanism, count) for mechanism, count in events), np.zeros(len(orders)))
    return float(rdp.compute_epsilon(orders, total, delta)[0])
