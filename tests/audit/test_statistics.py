"""The bounds against published or closed-form values, and tests that must see what they test for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from dpft import PrivacyConfig, PrivacySchedule
from dpft.audit import one_run_epsilon
from dpft.audit.sampling import draw_all, sampling_checks
from dpft.audit.statistics import (
    correlation_p_value,
    gaussian_mu_lower,
    normality_p_value,
    proportion_bounds,
    variance_p_value,
)


def test_proportion_bounds_are_clopper_pearsons() -> None:
    # scipy's own interval, two-sided at 90 %, has these one-sided bounds at 95 %
    from scipy.stats import binomtest

    interval = binomtest(7, 50).proportion_ci(0.9, method="exact")
    assert proportion_bounds(7, 50, 0.95) == pytest.approx((interval.low, interval.high))
    # without a success the upper bound solves (1 - p)^n = alpha
    assert proportion_bounds(0, 50, 0.95) == (0.0, pytest.approx(1 - 0.05 ** (1 / 50)))
    assert proportion_bounds(50, 50, 0.95)[1] == 1.0
    assert proportion_bounds(0, 0, 0.95) == (0.0, 1.0)


def test_all_guesses_right_has_a_closed_form() -> None:
    """With delta 0: (1 / (1 + exp(-epsilon)))^r = significance."""
    expected = -math.log(0.05 ** (-1 / 1000) - 1)
    assert one_run_epsilon(1000, 1000, 1000, 0.0, 0.95) == pytest.approx(expected, abs=1e-6)
    assert one_run_epsilon(2000, 1000, 1000, 0.0, 0.95) == pytest.approx(expected, abs=1e-6)


def test_one_run_bound_of_steinke_et_al() -> None:
    """Of m guesses that are right as often as at epsilon e: the bound is below e, and near it for many (figure 1)."""
    for epsilon in (1.0, 2.0, 4.0):
        for count in (1_000, 100_000):
            right = int(count / (1 + math.exp(-epsilon)))
            bound = one_run_epsilon(count, count, right, 1e-5, 0.95)
            assert epsilon * (0.8 if count == 1_000 else 0.95) < bound < epsilon
    assert one_run_epsilon(1000, 1000, 500, 1e-5, 0.95) == 0.0
    assert one_run_epsilon(1000, 0, 0, 1e-5, 0.95) == 0.0
    with pytest.raises(ValueError, match="right"):
        one_run_epsilon(10, 5, 6, 0.0, 0.95)


def test_delta_costs() -> None:
    assert one_run_epsilon(1000, 1000, 900, 1e-3, 0.95) < one_run_epsilon(1000, 1000, 900, 0.0, 0.95)


def test_gaussian_bound_is_below_mu_and_near_it() -> None:
    rng = np.random.default_rng(0)
    above = 0
    for _ in range(200):
        outside, inside = rng.normal(0, 0.8, 4000), rng.normal(1, 0.8, 500)
        bound = gaussian_mu_lower(outside, inside, 0.95)
        assert bound > 0.65 / 0.8
        above += bound > 1 / 0.8
    assert above <= 10  # 5 % of 200, and in truth fewer: five thresholds share the error
    assert gaussian_mu_lower(np.zeros(0), np.ones(10), 0.95) == 0.0


def test_p_values_are_uniform_enough_and_see_what_is_wrong() -> None:
    rng = np.random.default_rng(1)
    assert 0.001 < variance_p_value(float(np.square(rng.normal(size=100_000)).sum()), 100_000) < 1
    assert variance_p_value(float(np.square(1.02 * rng.normal(size=100_000)).sum()), 100_000) < 1e-6
    assert variance_p_value(0.0, 10_000) == 0.0
    assert normality_p_value(rng.normal(size=20_000))[1] > 0.001
    assert normality_p_value(rng.laplace(scale=2**-0.5, size=20_000))[1] < 1e-6  # of the same variance
    rows = rng.normal(size=(30, 4000))
    assert correlation_p_value(rows)[1] > 0.001
    rows[20] = 0.9 * rows[3] + math.sqrt(1 - 0.81) * rows[20]
    assert correlation_p_value(rows)[1] < 1e-6
    assert correlation_p_value(rows[:1])[1] == 1.0


SAMPLERS: list[dict[str, Any]] = [
    {"sampler": "poisson"},
    {"sampler": "truncated_poisson", "max_batch_size": 14},
    {"sampler": "fixed_size", "accountant": "rdp"},
    {"sampler": "shuffle"},
    {"sampler": "balls_and_bins"},
]


@pytest.mark.parametrize("claimed", SAMPLERS, ids=lambda config: config["sampler"])
@pytest.mark.parametrize("drawn", SAMPLERS, ids=lambda config: config["sampler"])
def test_batches_pass_as_their_own_sampler_alone(claimed: dict[str, Any], drawn: dict[str, Any]) -> None:
    def schedule(changes: dict[str, Any]) -> PrivacySchedule:
        values: dict[str, Any] = {
            "target_delta": 1e-5,
            "expected_batch_size": 16,
            "noise_multiplier": 1.0,
            "num_steps": 100,
        }
        return PrivacyConfig(**values, **changes).resolve(160)

    rng = np.random.default_rng(2)
    segments = [draw_all(rng, schedule(drawn), 160, 60), draw_all(rng, schedule(drawn), 160, 60)]
    least = min(check.p_value for check in sampling_checks(segments, schedule(claimed), 160))
    assert (least > 1e-3) if claimed is drawn else (least < 1e-6)
