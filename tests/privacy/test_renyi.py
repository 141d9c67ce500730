"""Renyi DP of users and truncated batches: against dp_accounting, exact integrals, and the PLD of the same pairs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import integrate, stats

from dpft.privacy import Mechanism, epsilon
from dpft.privacy.accounting import accountant, renyi
from dpft.privacy.accounting.accountant import _rdp_of_one

ORDERS = (1.5, 2.0, 3.5, 8.0, 32.0)


def users(k: int, q: float, sigma: float) -> Mechanism:
    return Mechanism(sampler="poisson", noise_multiplier=sigma, sample_rate=q, unit="user", examples_per_user=k)


def cut(n: int, q: float, most: int, sigma: float) -> Mechanism:
    return Mechanism(
        sampler="truncated_poisson", noise_multiplier=sigma, sample_rate=q, max_batch_size=most, dataset_size=n
    )


def orders() -> np.ndarray:
    return np.array(accountant._import("dp_accounting.rdp.rdp_privacy_accountant").DEFAULT_RDP_ORDERS)


@pytest.mark.parametrize(("q", "sigma"), [(0.01, 1.0), (0.001, 0.6), (0.2, 4.0), (1.0, 2.0)])
def test_one_example_is_dp_accountings_sampled_gaussian(q: float, sigma: float) -> None:
    """To 1e-9 at whole orders, where it has a closed sum; at others it has upper bounds."""
    theirs = np.array(_rdp_of_one(Mechanism(sampler="poisson", noise_multiplier=sigma, sample_rate=q)))
    for ours in (np.array(_rdp_of_one(users(1, q, sigma))), np.array(_rdp_of_one(cut(1000, q, 2000, sigma)))):
        whole = orders() == np.rint(orders())
        np.testing.assert_allclose(ours[whole], theirs[whole], rtol=1e-9)
        assert (ours <= theirs * (1 + 1e-9)).all()


def test_all_examples_of_a_user_are_a_gaussian() -> None:
    np.testing.assert_allclose(_rdp_of_one(users(3, 1.0, 2.0)), orders() * 9 / 8, rtol=1e-9)


@pytest.mark.parametrize(("k", "q", "sigma"), [(3, 0.1, 1.5), (8, 0.01, 2.0)])
def test_mixtures_against_an_adaptive_integral(k: int, q: float, sigma: float) -> None:
    law, orders = stats.binom.pmf(np.arange(k + 1), k, q).tolist(), [alpha for alpha in ORDERS if alpha * k <= 28]

    def mean_moves(x: float) -> float:
        return sum(w * math.exp((j * x - j * j / 2) / sigma**2) for j, w in enumerate(law))

    found = renyi.of_mixture(list(range(k + 1)), law, sigma, orders)
    for alpha, value in zip(orders, found, strict=True):
        both = []
        for power in (alpha, 1 - alpha):  # of the ratio of the two densities, under the one without the user
            moment = integrate.quad(
                lambda x, power=power: mean_moves(x) ** power * math.exp(-((x / sigma) ** 2) / 2),
                -20 * sigma,
                alpha * k + 20 * sigma,
                limit=500,
                points=[0, k, alpha * k],
            )[0]
            both.append(math.log(moment / (sigma * math.sqrt(2 * math.pi))) / (alpha - 1))
        assert value == pytest.approx(max(both), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize(
    "mechanism",
    [
        pytest.param(users(4, 0.02, 2.0), marks=pytest.mark.slow),
        pytest.param(cut(1000, 0.02, 24, 1.5), marks=pytest.mark.slow),
        cut(200, 0.05, 8, 3.0),
    ],
)
def test_it_is_above_the_pld_of_the_same_pairs(mechanism: Mechanism) -> None:
    """Which is a bound too, and the tighter one; but not by more than the conversion costs."""
    tight, loose = (epsilon(mechanism, 200, 1e-5, accountant=name) for name in ("pld", "rdp"))
    assert tight < loose < 3 * tight + 4


def test_a_batch_that_is_always_cut_has_twice_the_sensitivity() -> None:
    """Of 1000 examples all are drawn and one is kept: a neighbour replaces it with probability 1 / 1000."""
    found = np.array(_rdp_of_one(cut(1000, 1.0, 1, 3.0)))
    pair = ((0.0, 2.0), (1 - 1e-3, 1e-3)), ((0.0, -2.0), (1 - 1e-3, 1e-3))
    at_least = renyi.log_moments(*pair, 3.0, list(orders())) / (orders() - 1)
    np.testing.assert_allclose(found, at_least, rtol=1e-6)


def test_cut_batches_are_the_mean_of_the_moments() -> None:
    """Computed again from dp_accounting's own probabilities, and by the direct integral of both pairs."""
    n, q, most, sigma = 1000, 0.02, 24, 1.5
    p = stats.binom.sf(most - 1, n, q)  # of N + 1 examples: the larger value here
    drawn = stats.binom.sf(most, n + 1, q) * most / p / (n + 1)
    whole = renyi.of_mixture([0, 1], [1 - q, q], sigma, ORDERS)
    replaced = renyi.log_moments(((0, 2), (1 - drawn, drawn)), ((0, -2), (1 - drawn, drawn)), sigma, ORDERS)
    a = np.array(ORDERS) - 1
    expected = np.logaddexp(np.log(p) + replaced, np.log1p(-p) + a * whole) / a
    np.testing.assert_allclose(renyi.of_truncated(cut(n, q, most, sigma), ORDERS), expected, rtol=1e-6)
    assert (expected > whole).all()


@pytest.mark.parametrize("sigma", [0.7, 3.0])
@pytest.mark.parametrize("q", [1e-4, 1e-6, 1e-8, 1e-10])
def test_tiny_rates_do_not_round_to_nothing(q: float, sigma: float) -> None:
    """At order 2 the moment is 1 + q^2 (exp(1 / sigma^2) - 1)."""
    exact = math.log1p(q**2 * math.expm1(1 / sigma**2))
    pair: Any = ((0.0, 1.0), (1 - q, q)), ((0.0,), (1.0,))
    (found,) = renyi.log_moments(*pair, sigma, [2.0])
    assert exact * (1 - 1e-9) <= found <= exact * (1 + 1e-4 + 1e-13 / q)
    (back,) = renyi.log_moments(*pair[::-1], sigma, [2.0])
    assert back == pytest.approx(exact, rel=100 * q + 1e-13 / q)


def test_many_steps_of_a_tiny_rate_cost_a_user_as_much_as_a_row() -> None:
    """Of 1e6 steps that rounded to nothing, epsilon was 0."""
    row = Mechanism(sampler="poisson", noise_multiplier=0.8, sample_rate=1e-9)
    one, two = (epsilon(mechanism, 10**6, 1e-10, accountant="rdp") for mechanism in (row, users(2, 1e-9, 0.8)))
    assert 0.5 < one < two


@pytest.mark.parametrize("q", [1e-3, 0.5])
def test_large_orders_need_no_finer_grid(q: float) -> None:
    """Of the pair the other way round, whose integrand ends within a small part of sigma."""
    sigma, alpha = 0.3, 1024.0
    pair: Any = ((0.0,), (1.0,)), ((0.0, 1.0), (1 - q, q))
    x = np.arange(-5.0, 3.0, 1e-4)
    p, moved = stats.norm.logpdf(x, 0, sigma), stats.norm.logpdf(x, 1, sigma)
    integrand = alpha * p + (1 - alpha) * np.logaddexp(math.log1p(-q) + p, math.log(q) + moved)
    highest = integrand.max()
    exact = highest + math.log(np.exp(integrand - highest).sum() * 1e-4)
    (found,) = renyi.log_moments(*pair, sigma, [alpha])
    assert found == pytest.approx(exact, rel=1e-11)


def test_monotone() -> None:
    def cost(mechanism: Mechanism) -> np.ndarray:
        return np.array(_rdp_of_one(mechanism))

    base = cost(users(3, 0.05, 2.0))
    for less in (users(2, 0.05, 2.0), users(3, 0.03, 2.0), users(3, 0.05, 2.5)):
        assert (cost(less) < base).all()
    assert (np.diff(base) >= -1e-12).all()
    base = cost(cut(1000, 0.02, 24, 1.5))
    for less in (cut(1000, 0.02, 40, 1.5), cut(1000, 0.02, 24, 2.0)):
        assert (cost(less) < base)[:-4].all()  # at 128 on, only that an example is drawn counts, and not the cut
    assert (np.diff(base) >= -1e-12).all()


def test_what_takes_too_many_points_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = renyi.of_mixture([0, 5], [0.9, 0.1], 1.0, ORDERS)
    monkeypatch.setattr(renyi, "_MOST_POINTS", 10)
    bound = renyi.of_mixture([0, 5], [0.9, 0.1], 1.0, ORDERS)
    assert (bound >= exact).all()
    np.testing.assert_allclose(bound, np.array(ORDERS) * 25 / 2)
    assert renyi.log_moments(((1.0,), (1.0,)), ((1.0,), (1.0,)), 1.0, ORDERS).tolist() == [0.0] * len(ORDERS)


def test_the_attack_on_a_user_stays_below() -> None:
    """Exact delta of one step on a user with all records at C, at the epsilon that RDP states."""
    k, q, sigma, delta = 3, 0.1, 2.0, 1e-3
    eps = epsilon(users(k, q, sigma), 1, delta, accountant="rdp")
    x = np.linspace(-30, 40, 200_001)
    law: Any = stats.binom.pmf(np.arange(k + 1), k, q)
    p, none = sum(w * stats.norm.pdf(x, j, sigma) for j, w in enumerate(law)), stats.norm.pdf(x, 0, sigma)

    def exact(epsilon: float) -> float:
        return max(integrate.trapezoid(np.maximum(a - math.exp(epsilon) * b, 0), x) for a, b in ((p, none), (none, p)))

    assert exact(eps) < delta < exact(eps / 3)
