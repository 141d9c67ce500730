"""Trainings of canaries and the likelihoods that look for them: what is released is what the mechanism says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import dpft
from tests.fixed_draws import fixed_draws
from tools.auditing import likelihood
from tools.auditing.trainings import train

CANARIES, NOISE = 400, 0.1


def released(steps: int = 6, noise: float = NOISE, rows: int = 1, **changes: Any) -> Any:
    options = {name: changes.pop(name) for name in ("tables", "users") if name in changes}
    privacy = dpft.PrivacyConfig(
        target_delta=1e-3, noise_multiplier=noise, num_steps=steps, **{"expected_batch_size": 100, **changes}
    )
    with fixed_draws(0):
        return train(privacy, CANARIES, 0, rows=rows, **options)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tables": 2, "clip_groups": {"parts.0": 1.0, "parts.1": 1.0}},
        {"rows": 4, "users": 1},
        {"sampler": "balls_and_bins"},
        {"secure_rng": True},
    ],
    ids=["poisson", "groups", "users", "balls_and_bins", "secure"],
)
def test_a_participation_adds_one_and_the_noise_is_the_claimed(changes: dict[str, Any]) -> None:
    found = released(**changes)
    taking_part = np.round(found.rows)
    assert set(np.unique(taking_part)) == {0.0, 1.0}
    assert not taking_part[~found.present].any()
    assert NOISE * 0.9 < (found.rows - taking_part).std() < NOISE * 1.1
    assert 0.2 < taking_part[found.present].mean() < 0.3
    if "sampler" in changes:
        assert (taking_part[found.present][:, :4].sum(axis=1) == 1).all()


def test_likelihoods_are_those_of_their_samplers() -> None:
    """Under the law without the canary the likelihood ratio has mean 1, and with it more."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(200_000, 4))
    shift, rate = 0.5, 0.25
    matrix = np.eye(4) + np.diag([0.5] * 3, -1)
    places = rng.integers(2, size=len(noise))
    ratios = {
        "poisson": likelihood.poisson(noise, shift, rate),
        "balls_and_bins": likelihood.balls_and_bins(noise, shift, 2),
        "binomial": likelihood.binomial(noise, shift, rate, 3),
        "cyclic": likelihood.cyclic(noise, shift, rate, places, matrix, 2),
        "known": likelihood.known_steps(noise, shift, np.array([[1.0, 0, 1, 0]] * len(noise)), matrix),
    }
    for name, found in ratios.items():
        assert np.exp(found).mean() == pytest.approx(1.0, abs=0.02), name
        assert found.mean() < 0, name
    assert np.allclose(likelihood.binomial(noise[:9], shift, rate, 1), likelihood.poisson(noise[:9], shift, rate))
