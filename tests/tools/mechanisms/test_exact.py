"""The exact noise against the matrices themselves, and what was chosen by it."""

from __future__ import annotations

import math

import numpy as np
import pytest

import dpft
from tools.mechanisms import exact
from tools.mechanisms.settings import BANDS, BATCH, EPSILONS, SEEDS, STEPS, VARIANTS, Training
from tools.mechanisms.training import privacy_config, train

EXAMPLES = 3517


@pytest.mark.parametrize(
    "strategy",
    [
        exact.Strategy(kind="bandmf", steps=9, min_separation=4, weights=(1.0, 0.5, 0.375, 0.2)),
        exact.Strategy(kind="blt", steps=9, min_separation=5, weights=(0.3, 0.2), decays=(0.9, 0.4)),
    ],
    ids=lambda strategy: strategy.kind,
)
def test_noise_in_the_last_weights_is_that_of_the_inverse_matrix(strategy: exact.Strategy) -> None:
    """Also with constant rates, where the last weights have the last sum of the releases."""
    c = strategy.coefficients()
    matrix = np.array([[c[i - j] if i >= j else 0.0 for j in range(9)] for i in range(9)])
    inverse = np.linalg.inv(matrix) * strategy.scale
    rates = exact.cosine(9)
    assert exact.last_error(strategy, rates) == pytest.approx(np.linalg.norm(rates @ inverse))
    sums = np.tril(np.ones((9, 9))) @ inverse
    assert exact.last_error(strategy, np.ones(9)) == pytest.approx(np.linalg.norm(sums[-1]))
    assert exact.rms_error(strategy) == pytest.approx(np.linalg.norm(sums) / 3)


def test_noise_of_independent_releases() -> None:
    config = dpft.PrivacyConfig(noise_multiplier=0.7, target_delta=1e-6, expected_batch_size=147, num_steps=24)
    in_sums, in_last = exact.noise(config.resolve(EXAMPLES))
    assert in_sums == pytest.approx(0.7 * math.sqrt(25 / 2))
    assert in_last == pytest.approx(0.7 * math.sqrt(float((exact.cosine(24) ** 2).sum())))


@pytest.mark.slow
def test_bands_are_tried_until_they_cost_more() -> None:
    row = exact.compared(1000, 100, 10, 3.0, (2, 4, 8, 16))
    tried = {bands: exact.of_mechanism(1000, 100, 10, 3.0, "bandmf", bands)[0] for bands in (2, 4, 8)}
    least = min(tried, key=lambda bands: tried[bands])
    assert row["bands"] == least and row["bandmf"] == pytest.approx(tried[least] / row["dp_sgd"])


@pytest.mark.slow
def test_the_bands_that_are_trained_leave_the_least_noise_in_the_last_weights() -> None:
    for epsilon in EPSILONS:
        tried = {
            bands: exact.of_mechanism(EXAMPLES, BATCH, STEPS, epsilon, "bandmf", bands)[1]
            for bands in (2, 4, 8, 12, 23)
        }
        least = min(tried.values())
        assert tried[BANDS[epsilon]] <= 1.01 * least


@pytest.mark.slow
def test_each_kind_of_variant_trains_and_spends_its_epsilon() -> None:
    names = ("adamw_bc dp_sgd floor 1", "adamw bandmf constant", "adamw balls_and_bins")
    for variant in (variant for variant in VARIANTS if variant.name in names):
        row = train(Training(variant, 8.0, 5e-3, SEEDS[0]), 16)
        assert row["variant"] == variant.name and 7.9 < row["epsilon_of_schedule"] <= 8
        assert row["loss"] < row["loss_before"]
    assert privacy_config("bandmf", 8.0).bands == BANDS[8.0]
