"""Epsilon of selections, pure releases and filters: against closed forms of the papers, and exact attacks below."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate, special, stats

from dpft.errors import BudgetExceededError, PrivacyConfigError
from dpft.privacy import Mechanism, PrivacyFilter, Protects, PureRelease, Selection, compose_epsilon
from dpft.privacy.account import composition as events
from dpft.privacy.account.events import Release, one_training
from dpft.privacy.accounting.accountant import of_one_run
from dpft.privacy.accounting.calibration import max_steps_within

ADD = Protects("add_or_remove_one")


def gaussian(sigma: float) -> Mechanism:
    return Mechanism(sampler="poisson", noise_multiplier=sigma, sample_rate=1.0)


def epsilon(uses: list[tuple[Release, int]], delta: float, composition: str = "rdp") -> float:
    return events.uses_epsilon(uses, delta, ADD, composition)  # type: ignore[arg-type]  # one of the two names


# --------------------------------------------------------------------------------------------------- selections
@pytest.mark.parametrize("shape", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize(("rho", "mean"), [(0.01, 5.0), (0.1, 20.0), (0.5, 3.0)])
def test_negative_binomial_is_corollary_4(rho: float, mean: float, shape: float) -> None:
    """Papernot and Steinke 2022, Corollary 4, for rho-zCDP; a grid of orders may only lie above."""
    selection = Selection(((gaussian(math.sqrt(0.5 / rho)), 1),), mean, "negative_binomial", shape)
    curve = events.rdp_curve([(selection, 1)])
    gamma = gamma_of(mean, shape)
    if rho > -math.log(gamma):
        pytest.skip("outside the corollary")
    constant = 2 * (1 + shape) * math.sqrt(-rho * math.log(gamma)) - shape * rho
    for order, value in zip(events.orders(), curve, strict=True):
        if order <= 1 + math.sqrt(math.log(mean) / rho):
            exact = 2 * math.sqrt(rho * math.log(mean)) + constant
        else:
            exact = rho * (order - 1) + math.log(mean) / (order - 1) + constant
        if order < 60:
            assert exact * (1 - 1e-6) <= value <= exact * 1.05


def gamma_of(mean: float, shape: float) -> float:
    """By interpolation of Definition 1's mean, computed as a sum over its probabilities."""
    grid = np.exp(np.linspace(-6, -0.01, 600))
    k = np.arange(1, 3000)
    if shape == 0:
        means = [((1 - g) ** k).sum() / (((1 - g) ** k) / k).sum() for g in grid]
    else:
        weight = np.exp(special.gammaln(k + shape) - special.gammaln(k + 1))
        means = [((1 - g) ** k * weight * k).sum() / ((1 - g) ** k * weight).sum() for g in grid]
    return float(np.interp(-mean, -np.asarray(means), grid))


@pytest.mark.parametrize(("sigma", "mean"), [(2.0, 5.0), (5.0, 30.0), (1.0, 2.0)])
def test_poisson_is_theorem_6(sigma: float, mean: float) -> None:
    """With the Gaussian's own delta (Balle and Wang 2018), which is below the one that RDP gives."""
    curve = events.rdp_curve([(Selection(((gaussian(sigma), 1),), mean), 1)])
    for order, value in zip(events.orders(), curve, strict=True):
        eps = math.log1p(1 / (order - 1))
        tail = stats.norm.cdf(0.5 / sigma - eps * sigma) - math.exp(eps) * stats.norm.cdf(-0.5 / sigma - eps * sigma)
        exact = order / (2 * sigma**2) + mean * tail + math.log(mean) / (order - 1)
        assert value >= exact * (1 - 1e-9)
        if tail * mean < 1e-3:
            assert value <= exact * 1.05 + 0.01


@pytest.mark.parametrize("distribution", ["poisson", "negative_binomial"])
def test_the_best_of_gaussians_stays_below_the_bound(distribution: str) -> None:
    """The largest of K noisy values, K random: its exact trade-off between two neighbours, by integration.

    It is more than that of one trial, so that an account which counted one trial would be caught here.
    """
    sigma, mean, delta = 2.0, 20.0, 1e-3
    gamma = 1 / mean  # geometric

    def density(y: np.ndarray, shift: float) -> np.ndarray:
        below, here = stats.norm.cdf(y, shift, sigma), stats.norm.pdf(y, shift, sigma)
        if distribution == "poisson":
            return np.asarray(mean * here * np.exp(-mean * (1 - below)))
        return np.asarray(gamma * here / (1 - (1 - gamma) * below) ** 2)

    y = np.linspace(-40, 40, 100_001)

    def exact(eps: float) -> float:
        p, q = density(y, 1.0), density(y, 0.0)
        up = integrate.trapezoid(np.maximum(p - math.exp(eps) * q, 0), y)
        down = integrate.trapezoid(np.maximum(q - math.exp(eps) * p, 0), y)
        return float(max(up, down))

    shape = 1.0 if distribution == "negative_binomial" else 0.0
    stated = epsilon([(Selection(((gaussian(sigma), 1),), mean, distribution, shape), 1)], delta)  # type: ignore[arg-type]  # one of the two names
    one = compose_epsilon([(gaussian(sigma), 1)], delta)
    assert exact(stated) < delta < exact(one)


def test_selections_are_monotone() -> None:
    def cost(
        sigma: float = 2.0, steps: int = 10, mean: float = 5.0, distribution: str = "poisson", shape: float = 0.0
    ) -> float:
        selection = Selection(((gaussian(sigma), steps),), mean, distribution, shape)  # type: ignore[arg-type]  # one of the two names
        return epsilon([(selection, 1)], 1e-5)

    base = cost()
    assert cost(sigma=4.0) < base < cost(steps=20) and base < cost(mean=50.0)
    assert cost(distribution="negative_binomial", shape=0.5) < cost(distribution="negative_binomial", shape=2.0)
    assert base > epsilon([(gaussian(2.0), 10)], 1e-5)
    assert base < epsilon([(gaussian(2.0), 50)], 1e-5)  # less than all five trials, composed


def test_one_trial_costs_what_it_costs() -> None:
    """A truncated distribution with mean 1 is always 1; what the bound adds is from its smallest order, 1.1."""
    selection = Selection(((gaussian(3.0), 4),), 1.0, "negative_binomial", 1.0)
    one = events.rdp_curve([(gaussian(3.0), 4)])
    more = events.rdp_curve([(selection, 1)]) - one
    assert more == pytest.approx(2 * (1 - 1 / 1.1) * one[0], rel=1e-6)


def test_shuffled_and_fixed_size_trials_take_their_own_adjacency() -> None:
    shuffled = Mechanism(sampler="shuffle", noise_multiplier=3.0, batch_size=10, dataset_size=100)
    fixed = Mechanism(sampler="fixed_size", noise_multiplier=6.0, batch_size=100, dataset_size=100)
    as_gaussian = events.rdp_curve([(Selection(((gaussian(3.0), 2),), 4.0), 1)])
    for release, count in ((shuffled, 11), (fixed, 2)):
        assert events.rdp_curve([(Selection(((release, count),), 4.0), 1)]) == pytest.approx(as_gaussian)


@pytest.mark.parametrize(
    ("trials", "distribution", "shape"),
    [
        (0.5, "poisson", 0),
        (math.inf, "poisson", 0),
        (3, "fixed", 0),
        (3, "poisson", 1.0),
        (3, "negative_binomial", -1),
    ],
)
def test_distributions_without_a_theorem(trials: float, distribution: str, shape: float) -> None:
    with pytest.raises(PrivacyConfigError):
        Selection(((gaussian(1.0), 1),), trials, distribution, shape)  # type: ignore[arg-type]  # what is tested


def test_a_selection_of_nothing_or_of_selections() -> None:
    inner = Selection(((gaussian(1.0), 1),), 2.0)
    for trial in ((), ((gaussian(1.0), 0),), ((inner, 1),)):
        with pytest.raises(PrivacyConfigError, match="expected"):
            Selection(trial, 2.0)  # type: ignore[arg-type]  # what is tested


# --------------------------------------------------------------------------------------------------- pure releases
@pytest.mark.parametrize("eps", [0.01, 0.5, 3.0])
def test_pure_releases(eps: float) -> None:
    """One is epsilon at most; randomised response, which attains it, is the Renyi divergence to the digit."""
    curve = events.rdp_curve([(PureRelease(eps), 1)])
    p = math.exp(eps) / (1 + math.exp(eps))
    for order, value in zip(events.orders(), curve, strict=True):
        log_terms = [
            order * math.log(p) + (1 - order) * math.log1p(-p),
            order * math.log1p(-p) + (1 - order) * math.log(p),
        ]
        assert value == pytest.approx(special.logsumexp(log_terms) / (order - 1), rel=1e-6)
        assert value <= min(eps, order * eps**2 / 2) * (1 + 1e-9)
    assert eps - 0.05 <= epsilon([(PureRelease(eps), 1)], 1e-9, "pld") <= eps * 1.07
    assert epsilon([(PureRelease(eps), 3)], 1e-9, "pld") <= 3 * eps * 1.07
    for bad in (0.0, -1.0, math.nan, math.inf, 701.0):
        with pytest.raises(PrivacyConfigError):
            PureRelease(bad)


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_the_largest_pure_release_has_an_epsilon(accountant: str) -> None:
    assert 699.99 <= epsilon([(PureRelease(700.0), 1)], 1e-9, accountant) < 701  # delta takes some


def test_pld_of_pure_and_gaussian_together() -> None:
    """At least each alone, at most their sum at half the delta each."""
    both = epsilon([(gaussian(3.0), 1), (PureRelease(0.5), 1)], 1e-5, "pld")
    alone = compose_epsilon([(gaussian(3.0), 1)], 1e-5)
    assert alone < both <= compose_epsilon([(gaussian(3.0), 1)], 1e-5) + 0.5 + 1e-3
    assert both < epsilon([(gaussian(3.0), 1), (PureRelease(0.5), 1)], 1e-5, "rdp")


@pytest.mark.parametrize("delta", [1e-12, 1e-9])
def test_many_pure_releases_at_a_small_delta(delta: float) -> None:
    """Exact for randomised response, the worst of them. Of 10,000, PLD's rounding was 1.6 % of a delta of 1e-12."""
    eps, count = 0.01, 10_000
    found = epsilon([(PureRelease(eps), count)], delta, "pld")
    true = np.arange(count + 1)  # answers of the better side
    loss = (2 * true - count) * eps
    likely = stats.binom.logpmf(true, count, 1 / (1 + math.exp(-eps)))[loss > found]
    assert np.exp(likely + np.log1p(-np.exp(found - loss[loss > found]))).sum() <= delta * 1.0001
    assert found <= eps * count


def test_nothing_costs_nothing() -> None:
    assert epsilon([], 1e-5) == epsilon([], 1e-5, "pld") == epsilon([(gaussian(1.0), 0)], 1e-5) == 0.0


# --------------------------------------------------------------------------------------------------- the filter
def test_a_filter_admits_until_its_budget_is_spent() -> None:
    guard = PrivacyFilter(2.0, 1e-5)
    rng = np.random.default_rng(0)
    steps = 0
    with pytest.raises(BudgetExceededError, match="must not be released"):
        while True:
            guard.spend([(gaussian(float(rng.choice([8.0, 12.0, 20.0]))), 1)])
            steps += 1
    assert steps > 10 and guard.rdp(guard.uses()) <= guard.budget
    assert compose_epsilon(guard.uses(), 1e-5) <= guard.spent() <= 2.0 + 1e-9  # type: ignore[arg-type]  # mechanisms alone
    assert guard.admits([(gaussian(1e4), 1)]) and not guard.admits([(gaussian(8.0), 1)])


def test_the_budget_is_the_inverse_of_the_conversion() -> None:
    for order in (3.2, 4.5, 20):
        guard = PrivacyFilter(6.0, 1e-5, order=order)
        curve = np.full(len(events.orders()), np.inf)
        curve[events.orders().index(order)] = guard.budget
        assert events.epsilon_of_rdp(curve, 1e-5) == pytest.approx(6.0)


def test_the_default_order_admits_most_gaussian_releases() -> None:
    def most(order: float | None) -> float:
        guard = PrivacyFilter(1.0, 1e-6, order=order)
        return guard.budget / guard.order

    assert all(most(None) >= most(order) for order in (20, 30, 40, 63, 128))


def test_the_order_for_a_typical_release_admits_most_of_them() -> None:
    sampled = Mechanism(sampler="poisson", noise_multiplier=1.5, sample_rate=0.01)

    def most(**options: float | Mechanism) -> float:
        guard = PrivacyFilter(1.0, 1e-5, **options)  # type: ignore[arg-type]  # one of the two
        return guard.budget / guard.rdp([(sampled, 1)])

    chosen = most(typical=sampled)
    assert chosen > 50 and all(chosen >= most(order=order) for order in (13, 14, 16, 18, 20, 30, 63))
    assert chosen > most()


def test_the_odometer_holds_at_all_times_at_once() -> None:
    """An analyst who chooses the noise by the loss so far, in two neighbours that differ by 1: the worst for it."""
    delta, rng, exceeded, closest = 0.05, np.random.default_rng(1), 0, 0.0
    for _ in range(120):
        guard, loss = PrivacyFilter(12.0, delta, order=2.0), 0.0
        for _ in range(12):
            sigma = 1.0 if loss > 1 else 4.0
            if not guard.admits([(gaussian(sigma), 1)]):
                break
            guard.spend([(gaussian(sigma), 1)])
            loss += rng.normal(0.5 / sigma**2, 1 / sigma)
            closest = max(closest, loss / guard.odometer())
            if loss > guard.odometer():
                exceeded += 1
                break
    assert exceeded <= stats.binom.ppf(0.999, 120, delta) and closest > 0.8
    assert PrivacyFilter(1.0, 1e-5).odometer() == 0.0
    assert guard.odometer() > guard.spent() * 0.5


# --------------------------------------------------------------------------------------------------- iterators
def test_releases_given_as_an_iterator_are_counted() -> None:
    """The second pass over an iterator finds nothing: what was admitted would be counted as no release."""
    release = gaussian(2.0)
    budget = PrivacyFilter(1e9, 1e-5)
    budget.spend(iter([(release, 3)]))
    assert budget.uses() == [(release, 3)] and budget.rdp(iter([(release, 3)])) == budget.rdp([(release, 3)]) > 0
    best = Selection(iter([(release, 2)]), 4.0)  # type: ignore[arg-type]  # not as annotated
    assert epsilon([(best, 1)], 1e-5) == epsilon([(Selection(((release, 2),), 4.0), 1)], 1e-5) > 0
    assert one_training(iter([(PureRelease(0.5), 1), (release, 2)])) == [(release, 2), (PureRelease(0.5), 1)]
    assert of_one_run(iter([(release, 2)])) == [(release, 2)]  # type: ignore[arg-type]  # not as annotated
    history = [(release, 4)]
    steps = [max_steps_within(release, 3.0, 1e-5, history=h) for h in (history, iter(history))]  # type: ignore[arg-type]  # not as annotated
    assert steps[0] == steps[1] < max_steps_within(release, 3.0, 1e-5)


@pytest.mark.parametrize("eps", [1e-10, 1e-8, 1e-6, 1e-3, 0.0999, 0.1])
def test_a_tiny_pure_release_costs_what_it_costs(eps: float) -> None:
    """Rounding made its Renyi divergence too small or negative, so that paying for it enlarged what was left."""
    curve = events.rdp_curve([(PureRelease(eps), 1)])
    orders = np.array(events.orders())
    exact = orders * eps**2 / 2  # to the second order, of which it falls short by eps^2 / 3 for each order squared
    assert (curve <= exact * (1 + 1e-12)).all() and (curve <= eps * (1 + 1e-9)).all()
    small = orders * eps < 0.01
    assert (curve[small] >= exact[small] * (1 - (orders[small] * eps) ** 2 - eps**2)).all() and (curve > 0).all()
