"""Bounds from trials in two worlds: below the truth, near it, and with the attacks that find what is planted."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from dpft.audit import plot, two_worlds
from dpft.audit.correlation import Uncorrelated, strategy_matrix, unit_of_noise
from dpft.audit.two_worlds import as_it_is, by_frequency, linear, spread
from dpft.privacy import Strategy

TRUTH = 1.0


def randomised_response(rng: np.random.Generator, bit: int, count: int) -> np.ndarray:
    """(1, 0)-DP, and no less."""
    kept = rng.random(count) < 1 / (1 + math.exp(-TRUTH))
    return np.where(kept, bit, 1 - bit)[:, None].astype(float)


def test_the_bound_is_below_the_truth_of_randomised_response_and_near_it() -> None:
    above = sure = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        worlds = [randomised_response(rng, bit, 6000) for bit in (1, 0)]
        found = two_worlds(*worlds, {"a": as_it_is, "b": by_frequency}, claimed_epsilon=TRUTH, delta=0.0)
        assert found.epsilon_lower > 0.8 * TRUTH and not found.violated
        above += found.epsilon_lower > TRUTH
        sure += found.epsilon_lower_sure > TRUTH
    assert above <= 3 and sure == 0  # 5 % of 20, and one in 10,000


def test_delta_is_taken_off_the_likelier_event() -> None:
    """A release that names its world in 2 of 100 cases is (0, 0.02)-DP."""
    rng = np.random.default_rng(0)
    worlds = [np.where(rng.random((20_000, 1)) < 0.02, sign, 0.0) for sign in (1.0, -1.0)]
    attacks = {"a": by_frequency}
    assert two_worlds(*worlds, attacks, claimed_epsilon=0.1, delta=0.03).epsilon_lower == 0.0
    assert two_worlds(*worlds, attacks, claimed_epsilon=0.1, delta=0.01).violated


def test_both_directions_are_guessed() -> None:
    """What only shows where a person is missing is found as well."""
    rng = np.random.default_rng(0)
    inside, outside = np.zeros((4000, 1)), (rng.random((4000, 1)) < 0.1).astype(float)
    for worlds in ((inside, outside), (outside, inside)):
        assert two_worlds(*worlds, {"a": as_it_is}, claimed_epsilon=2.0, delta=1e-3).epsilon_lower > 2.0


def test_small_noise_in_an_unknown_direction_is_found() -> None:
    """Noise of two coordinates that is nearly the same: their difference has hardly any."""
    rng = np.random.default_rng(0)
    common = rng.normal(size=(2, 3000, 1))
    worlds = common + 0.1 * rng.normal(size=(2, 3000, 2)) + np.array([1.0, 0.0]) * np.array([1, 0])[:, None, None]
    blind = two_worlds(*worlds, {"a": as_it_is}, claimed_epsilon=4.0, delta=1e-2)
    found = two_worlds(*worlds, {"a": as_it_is, "linear": linear}, claimed_epsilon=4.0, delta=1e-2)
    assert not blind.violated and found.violated and found.attack == "linear"
    varied = two_worlds(*worlds, {"spread": spread}, claimed_epsilon=4.0, delta=1e-2)
    assert varied.violated


def test_what_is_learnt_is_not_counted_on_what_it_was_learnt_from() -> None:
    """Many coordinates of nothing: on its own trials the discriminant separates them, on others it must not."""
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(size=(2, 150, 45))
    score = linear(inside[::3], outside[::3])
    assert score(inside[::3]).mean() - score(outside[::3]).mean() > 2 * score(outside[::3]).std()
    assert two_worlds(inside, outside, {"linear": linear}, claimed_epsilon=0.5, delta=0.0).epsilon_lower < 0.5


def test_result(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    found = two_worlds(*rng.normal(size=(2, 900, 1)), {"a": as_it_is}, claimed_epsilon=1.0, delta=1e-5)
    json.dumps(found.to_dict(), allow_nan=False)
    assert "proves no upper bound" in found.statement and "nothing found" in found.describe()
    assert len(found.members) == len(found.others) == 600
    plot(found, tmp_path / "audit.png")
    assert (tmp_path / "audit.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="of both worlds"):
        two_worlds(np.zeros((3, 1)), np.zeros((9, 1)), {"a": as_it_is}, claimed_epsilon=1.0, delta=0.1)


STRATEGIES = [
    Strategy(kind="bandmf", steps=7, min_separation=3, weights=(1.0, 0.5, 0.25)),
    Strategy(kind="blt", steps=7, min_separation=3, weights=(0.4, 0.2), decays=(0.9, 0.3)),
]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy.kind)
def test_correlation_is_undone(strategy: Strategy) -> None:
    """The auditor's matrices have dpft's coefficients and scale, and rows one by one are those of the product."""
    matrix = strategy_matrix(strategy, 7)
    assert np.allclose(matrix[:, 0], strategy.coefficients()) and np.allclose(np.triu(matrix, 1), 0)
    assert unit_of_noise(strategy) == pytest.approx(strategy.scale)
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(7, 5)))
    rows = Uncorrelated(strategy, 7)
    assert torch.allclose(torch.stack([rows.row(row) for row in x]), torch.from_numpy(matrix) @ x)
