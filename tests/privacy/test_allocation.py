"""Balls and bins: closed forms, another library's interval, Monte-Carlo bounds below, and what must be monotone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from dpft.errors import AccountingError, PrivacyConfigError
from dpft.privacy import Mechanism, PrivacyConfig, calibrate_noise_multiplier, compose_epsilon, epsilon
from dpft.privacy.accounting.allocation import added, deviation, epoch_pld, likelihood_ratio, one_batch

FLOAT = 1e-11


def bins(batches: int, sigma: float) -> Mechanism:
    return Mechanism(sampler="balls_and_bins", dataset_size=4 * batches, batch_size=4, noise_multiplier=sigma)


def deltas(sigma: float, batches: int, at: float) -> tuple[float, float]:
    """Of one epoch, with the example removed and added, on the grid that the accountant takes."""
    pld = epoch_pld(sigma, batches, min(1e-3, deviation(sigma, batches) / 16))
    removed, added_ = (float(pmf.get_delta_for_epsilon(at)) for pmf in (pld._pmf_remove, pld._pmf_add))
    return removed, added_


@pytest.mark.parametrize("sigma", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("step", [0.01, 0.3])
def test_one_batch_is_spread_around_a_mean_of_one(sigma: float, step: float) -> None:
    law = one_batch(sigma, step)
    values = np.exp(law.logs)
    assert law.mass.min() >= 0
    assert abs(law.mass.sum() - 1) < FLOAT and abs(law.mass @ values - 1) < FLOAT
    second = math.exp(1 / sigma**2)
    # Spread within a cell adds (value - a)(b - value), at most a square of its width over four.
    assert second < law.mass @ values**2 < second * (1 + math.expm1(step) ** 2 / 4 * math.exp(step))


@pytest.mark.parametrize(("sigma", "batches"), [(1.0, 1), (1.0, 2), (0.5, 7), (1.0, 100), (3.0, 1000), (0.8, 4097)])
def test_moments_of_the_likelihood_ratio(sigma: float, batches: int) -> None:
    """E L = 1 and E L^2 = 1 + (e^(1 / sigma^2) - 1) / T, which Dong et al. 2025 have as the Renyi divergence of order
    2 (arXiv 2503.03043): the spreading may only add to it, by little."""
    law = likelihood_ratio(sigma, batches)
    ratio = np.exp(law.logs - math.log(batches))
    variance = math.expm1(1 / sigma**2) / batches
    assert abs(law.mass.sum() - 1) < FLOAT and abs(law.mass @ ratio - 1) < FLOAT
    assert 1 < (law.mass @ ratio**2 - 1) / variance < 1.03
    third = (  # E L^3, by which of three batches are the same one
        math.exp(3 / sigma**2) + 3 * (batches - 1) * math.exp(1 / sigma**2) + (batches - 1) * (batches - 2)
    ) / batches**2
    assert third < law.mass @ ratio**3 < third * (1 + 0.05 * (third - 1))


def test_a_sum_is_that_of_independent_values() -> None:
    """By brute force, each pair of values; and both means are kept."""
    a = one_batch(1.0, 0.25).trimmed()
    b = added(a, a)
    values, other = np.exp(a.logs), np.exp(b.logs)
    pairs = np.add.outer(values, values)
    weights = np.outer(a.mass, a.mass)
    assert abs(b.mass @ other - 2 * (a.mass @ values)) < FLOAT
    for strike in (0.5, 1.9, 2.1, 5.0, 40.0):
        exact = (weights * np.maximum(pairs - strike, 0)).sum()
        found = b.mass @ np.maximum(other - strike, 0)
        assert exact * (1 - 1e-12) <= found <= exact + math.expm1(0.25) * strike / 4


@pytest.mark.parametrize("sigma", [0.7, 1.0, 3.0])
def test_one_batch_an_epoch_is_the_gaussian_mechanism(sigma: float) -> None:
    for at in (0.1, 1.0, 3.0):
        exact = stats.norm.cdf(0.5 / sigma - at * sigma) - math.exp(at) * stats.norm.cdf(-0.5 / sigma - at * sigma)
        for found in deltas(sigma, 1, at):
            assert exact * (1 - FLOAT) <= found <= exact * 1.02 + FLOAT


@pytest.mark.parametrize(
    ("sigma", "batches", "epochs", "lower", "upper"),
    [
        (1.0, 100, 1, 0.6085, 0.6357),
        (2.0, 10, 1, 0.6055, 0.6384),
        (0.6, 50, 1, 4.0944, 4.1206),
        (1.0, 20, 4, 2.6682, 2.7416),
    ],
)
def test_within_the_interval_of_another_library(
    sigma: float, batches: int, epochs: int, lower: float, upper: float
) -> None:
    """Bounds below and above at delta = 1e-5, of PLD_accounting 2.0 (Feldman & Shenfeld 2026, arXiv 2602.17284)."""
    assert lower <= epsilon(bins(batches, sigma), epochs * batches, 1e-5) <= upper


@pytest.mark.parametrize(("sigma", "batches"), [(1.0, 2), (0.6, 10), (1.0, 50), (2.0, 10)])
def test_above_what_sampling_finds(sigma: float, batches: int) -> None:
    """The two divergences as means over 200,000 draws of an epoch: not five errors below them, nor far off."""
    rng, count = np.random.default_rng(0), 200_000
    z = rng.standard_normal((count, batches))
    without = np.exp(z / sigma - 1 / (2 * sigma**2)).mean(1)
    z[:, 0] += 1 / sigma
    given = np.exp(z / sigma - 1 / (2 * sigma**2)).mean(1)
    for at in (0.1, 0.5, 1.0):
        draws = np.maximum(0, 1 - math.exp(at) / given), np.maximum(0, 1 - math.exp(at) * without)
        for drawn, found in zip(draws, deltas(sigma, batches, at), strict=True):
            error = drawn.std() / math.sqrt(count)
            assert drawn.mean() - 5 * error <= found <= drawn.mean() * 1.05 + 5 * error + 1e-4


def test_an_epoch_with_fewer_and_smaller_gradients_is_covered() -> None:
    """An adversary who adapts: the gradient's norm is 1 or 0, by whether the release before was above zero."""
    rng, count, batches, sigma = np.random.default_rng(1), 200_000, 4, 0.8
    for start in (0.0, 1.0):
        z = rng.standard_normal((count, batches))
        bin_ = rng.integers(batches, size=count)
        for example in (0, 1):
            ratio, norm = np.zeros(count), np.full(count, start)
            for t in range(batches):
                y = sigma * z[:, t] + (example * (bin_ == t)) * norm
                ratio += np.exp((norm * y - norm**2 / 2) / sigma**2) / batches
                norm = (y > 0).astype(float)
            for at in (0.2, 1.0):
                drawn = np.maximum(0, 1 - math.exp(at) / ratio if example else 1 - math.exp(at) * ratio)
                assert drawn.mean() <= deltas(sigma, batches, at)[1 - example] + 5 * drawn.std() / math.sqrt(count)


def test_monotone() -> None:
    base = epsilon(bins(50, 1.0), 200, 1e-5)
    assert epsilon(bins(50, 1.2), 200, 1e-5) < base < epsilon(bins(50, 0.8), 200, 1e-5)
    assert epsilon(bins(100, 1.0), 400, 1e-5) < base  # the same four epochs, at half the rate
    assert (
        base < epsilon(bins(50, 1.0), 201, 1e-5) == epsilon(bins(50, 1.0), 250, 1e-5)
    )  # a begun epoch is a whole one
    assert epsilon(bins(50, 1.0), 1, 1e-5) == epsilon(bins(50, 1.0), 50, 1e-5)
    assert base < epsilon(bins(50, 1.0), 200, 1e-6)


def test_limits() -> None:
    assert epsilon(bins(50, 0.0), 10, 1e-5) == math.inf
    assert epsilon(bins(50, 1.0), 0, 1e-5) == 0.0
    assert epsilon(bins(50, 1000.0), 50, 1e-5) < 1e-3


@pytest.mark.filterwarnings("error")  # of numpy, where a number leaves the range
@pytest.mark.parametrize("sigma", [0.01, 0.03, 0.0499, 0.05, 0.06])
def test_next_to_no_noise(sigma: float) -> None:
    """The draw can take log(T) from the Gaussian mechanism's losses, and no more."""
    gaussian = epsilon(Mechanism(sampler="poisson", sample_rate=1.0, noise_multiplier=sigma), 1, 1e-5)
    found = epsilon(bins(10, sigma), 10, 1e-5)
    assert gaussian - math.log(10) < found < gaussian * 1.001 + 0.01
    assert epsilon(bins(10, sigma * 1.01), 10, 1e-5) < found


def test_between_shuffling_without_amplification_and_nothing() -> None:
    shuffled = Mechanism(sampler="shuffle", dataset_size=200, batch_size=4, noise_multiplier=1.0)
    assert 0 < epsilon(bins(50, 1.0), 100, 1e-5) < epsilon(shuffled, 100, 1e-5) / 2


def test_starts_count_their_epochs_separately() -> None:
    one = bins(50, 1.0)
    assert compose_epsilon([(one, 25), (one, 25)], 1e-5) == pytest.approx(epsilon(one, 100, 1e-5), rel=1e-9)


def test_composes_with_poisson_and_shuffle_and_not_with_replacement() -> None:
    one = bins(50, 1.0)
    poisson = Mechanism(sampler="poisson", sample_rate=0.02, noise_multiplier=1.0)
    shuffled = Mechanism(sampler="shuffle", dataset_size=200, batch_size=4, noise_multiplier=5.0)
    alone = epsilon(one, 50, 1e-5)
    for other in (poisson, shuffled):
        assert compose_epsilon([(one, 50), (other, 50)], 1e-5) > alone
    fixed = Mechanism(sampler="fixed_size", dataset_size=200, batch_size=4, noise_multiplier=1.0)
    with pytest.raises(AccountingError):
        compose_epsilon([(one, 50), (fixed, 50)], 1e-5)
    cut = Mechanism(
        sampler="truncated_poisson", dataset_size=200, sample_rate=0.02, max_batch_size=9, noise_multiplier=1.0
    )
    with pytest.raises(AccountingError, match="no theorem composes"):
        compose_epsilon([(one, 50), (cut, 50)], 1e-5)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"accountant": "rdp"}, AccountingError),
        ({"unit": "user", "examples_per_user": 2}, AccountingError),
        ({"sample_rate": 0.1}, PrivacyConfigError),
        ({"expected_batch_size": 4.5}, PrivacyConfigError),
    ],
)
def test_what_no_theorem_covers_is_refused(changes: dict[str, Any], error: type[Exception]) -> None:
    settings = {"target_delta": 1e-5, "expected_batch_size": 10, "noise_multiplier": 1.0, "num_steps": 20}
    with pytest.raises(error):
        PrivacyConfig(**{"sampler": "balls_and_bins", **settings, **changes}).resolve(1000)


def test_calibrated_noise_meets_the_target() -> None:
    sigma = calibrate_noise_multiplier(bins(50, 1.0), 150, 3.0, 1e-5)
    assert 2.98 < epsilon(bins(50, sigma), 150, 1e-5) <= 3.0


def test_schedule_and_statement() -> None:
    config = PrivacyConfig(
        target_delta=1e-5, expected_batch_size=30, target_epsilon=2.0, num_epochs=2, sampler="balls_and_bins"
    )
    schedule = config.resolve(1000)
    assert schedule.mechanism.steps_per_epoch == 34 and schedule.num_steps == 67
    assert schedule.mechanism.adjacency == "zero_out" and schedule.mechanism.sensitivity == "C"
    assert schedule.dataset_size == 1000 and 1.9 < schedule.epsilon <= 2.0
    assert any("counts whole" in line for line in schedule.assumptions)
    assert "balls_and_bins" in schedule.describe()
