"""Private means and early stopping: sensitivity by neighbours, the law of the noise, and that they are paid before."""

from __future__ import annotations

import math
import pickle
import sys
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from scipy import stats

import dpft
import dpft.evaluation as module
from dpft.errors import BudgetExceededError, PrivacyConfigError
from dpft.privacy import Mechanism, PureRelease, epsilon

GRID = 128 * math.sqrt(1 + 64**2 + 64**4 + 64**6)  # steps of secure noise's grid in a standard deviation


def account(path: Path, **changes: Any) -> dpft.Account:
    return dpft.Account.create(path / "account.jsonl", **{"epsilon": 50.0, "delta": 1e-5, **changes})


def mean(values: Any, payer: dpft.Account, **changes: Any) -> dpft.PrivateMean:
    return dpft.private_mean(values, **{"low": 0.0, "high": 1.0, "account": payer, "noise_multiplier": 5.0, **changes})


# --------------------------------------------------------------------------------------------------- sensitivity
_ANY = st.floats(allow_nan=True, allow_infinity=True)


@hypothesis.given(st.lists(_ANY, max_size=8), _ANY, _ANY)
def test_one_record_moves_the_sum_by_half_the_range_at_most(values: list[float], one: float, other: float) -> None:
    middle, half = module._range(-2.0, 6.0)

    def total(records: list[float]) -> float:
        return module._clipped_sum(records, middle, half)[0]

    assert abs(total([*values, one]) - total(values)) <= half * (1 + 1e-12)
    assert abs(total([*values, one]) - total([*values, other])) <= 2 * half * (1 + 1e-12)


def test_the_sum_is_that_of_the_clipped_values_in_any_order() -> None:
    values = [0.25, -7.0, 9.0, math.nan, math.inf, 0.5]
    middle, half = module._range(0.0, 1.0)
    expected = -0.25 - 0.5 + 0.5 + 0 + 0.5 + 0
    for order in (values, values[::-1], torch.tensor(values), torch.tensor(values, dtype=torch.bfloat16)):
        assert module._clipped_sum(order, middle, half) == (pytest.approx(expected), 6)


@pytest.mark.parametrize(
    ("header", "releases"),
    [
        ({}, Mechanism(sampler="poisson", noise_multiplier=5.0, sample_rate=1.0)),
        ({"adjacency": "zero_out"}, Mechanism(sampler="poisson", noise_multiplier=5.0, sample_rate=1.0)),
        (
            {"adjacency": "replace_one"},
            Mechanism(sampler="fixed_size", noise_multiplier=5.0, batch_size=4, dataset_size=4),
        ),
        (
            {"composition": "pld", "unit": "user", "examples_per_user": 3},
            Mechanism(sampler="poisson", noise_multiplier=5.0, sample_rate=1.0, unit="user", examples_per_user=3),
        ),
    ],
)
def test_the_account_has_what_was_released(
    tmp_path: Path, header: dict[str, Any], releases: Mechanism, monkeypatch: pytest.MonkeyPatch
) -> None:
    stds: list[float] = []
    monkeypatch.setattr(module.GaussianNoise, "add_", lambda self, tensor, std: stds.append(std) or tensor)
    payer = account(tmp_path, **header)
    found = mean([0.0, 1.0, 1.0, 1.0], payer, low=-1.0, high=3.0)
    assert payer.uses() == [(releases, 1)] and payer.entries()[0].name == found.paid
    # The noise multiplier times half the range, and what rounding the sum to the noise's grid adds to its sensitivity.
    assert stds == [pytest.approx(5.0 * 2.0, rel=1e-6)]
    assert stds[0] / (2.0 + stds[0] / GRID) >= 5.0
    assert found.value == 0.75 and found.standard_error == stds[0] / 4 and found.size == 4
    # The epsilon is that of the Gaussian whose sensitivity is what a neighbour moves: k records, or a whole range.
    moves = {"replace_one": 2, "user": 3}.get(header.get("adjacency", header.get("unit", "")), 1)
    alone = Mechanism(sampler="poisson", noise_multiplier=5.0 / moves, sample_rate=1.0)
    accountant = "rdp" if payer.composition == "rdp" else "pld"
    assert payer.spent() == pytest.approx(epsilon(alone, 1, 1e-5, accountant=accountant), rel=1e-3)


def test_the_noise_is_gaussian_of_the_stated_error(tmp_path: Path) -> None:
    payer = account(tmp_path, epsilon=5000.0)
    found = [mean([0.2] * 10, payer, noise_multiplier=3.0) for _ in range(100)]
    z = [(each.value - 0.2) / each.standard_error for each in found]
    assert len(set(z)) == 100 and found[0].standard_error == pytest.approx(0.15)
    assert stats.kstest(z, "norm").pvalue > 1e-4
    assert all(stats.kstest(np.asarray(z) * factor, "norm").pvalue < 1e-2 for factor in (0.5, 2.0))


def test_epsilon_of_the_query_alone(tmp_path: Path) -> None:
    for header in ({}, {"adjacency": "replace_one"}):
        (tmp_path / str(header)).mkdir()
        found = mean([0.5] * 4, account(tmp_path / str(header), **header), noise_multiplier=None, epsilon=1.0)
        accountant = "rdp" if header else "pld"
        assert 0.99 < epsilon(found.mechanism, 1, 1e-5, accountant=accountant) <= 1.0


def test_size_is_a_public_constant(tmp_path: Path) -> None:
    payer = account(tmp_path)
    found = mean([1.0] * 3, payer, size=1000)
    assert found.standard_error == pytest.approx(2.5 / 1000) and abs(found.value - 0.5 - 1.5 / 1000) < 0.1


def test_noise_that_cannot_be_drawn_is_not_paid_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    payer = account(tmp_path)
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers", None)  # not installed
    with pytest.raises(ImportError):
        mean([0.5], payer)
    assert payer.entries() == ()


def test_nothing_is_drawn_that_is_not_paid_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    payer = account(tmp_path, epsilon=0.5)
    monkeypatch.setattr(module.GaussianNoise, "add_", lambda *_: pytest.fail("noise before the account"))
    with pytest.raises(BudgetExceededError):
        mean([0.5], payer, noise_multiplier=0.1)
    assert payer.entries() == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"low": 1.0, "high": 1.0},
        {"low": -math.inf},
        {"high": math.nan},
        {"noise_multiplier": 0.0},
        {"noise_multiplier": math.inf},
        {"noise_multiplier": None},
        {"epsilon": 1.0},
        {"size": 0},
        {"size": True},
    ],
)
def test_settings_that_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    payer = account(tmp_path)
    with pytest.raises(PrivacyConfigError):
        mean([0.5], payer, **changes)
    assert payer.entries() == ()


def test_the_statement_can_stand_in_a_card(tmp_path: Path) -> None:
    said = mean([0.5] * 40, account(tmp_path), what="accuracy").statement()
    for words in (
        "accuracy:",
        "clipped to [0, 1]",
        "noise multiplier 5",
        "add_or_remove_one",
        "40 records",
        "ChaCha20",
    ):
        assert words in said


# --------------------------------------------------------------------------------------------------- early stopping
def stopper(payer: dpft.Account, **changes: Any) -> dpft.EarlyStop:
    values: dict[str, Any] = {"threshold": 0.5, "low": 0.0, "high": 1.0, "size": 100, "epsilon": 1.0, **changes}
    return dpft.EarlyStop(account=payer, **values)


def test_it_stops_once_and_is_paid_for_when_made(tmp_path: Path) -> None:
    payer = account(tmp_path)
    stop = stopper(payer, size=100_000)
    assert payer.uses() == [(PureRelease(1.0), 1)]
    assert not any(stop([0.2] * 100_000) for _ in range(3))
    assert stop([0.8] * 100_000) and stop.stopped
    with pytest.raises(BudgetExceededError, match="has said stop"):
        stop([0.8] * 100_000)
    assert len(payer.entries()) == 1
    with pytest.raises(TypeError, match="paid for anew"):
        pickle.dumps(stop)
    with pytest.raises(BudgetExceededError):
        stopper(account(tmp_path / "small", epsilon=0.5), epsilon=5.0)
    for bad in ({"threshold": math.nan}, {"epsilon": 0.0}, {"size": 0}, {"low": 2.0}):
        with pytest.raises(PrivacyConfigError):
            stopper(payer, **bad)


@pytest.mark.parametrize("header", [{}, {"adjacency": "replace_one"}])
def test_its_answers_cost_epsilon_at_most(
    tmp_path: Path, header: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two neighbours, the worst answers: exact probabilities by integration, with the scales that it really uses.

    The neighbour's mean is higher by the sensitivity in the first questions, and lower in the last: what the theorem
    bounds. The ratio must stay below e^epsilon, and come near: a smaller noise would exceed it.
    """
    scales: list[float] = []

    def noted(self: dpft.EarlyStop, scale: float) -> float:
        scales.append(scale)
        return 0.0

    monkeypatch.setattr(dpft.EarlyStop, "_laplace", noted)
    stop = stopper(account(tmp_path, **header), size=10)
    kept = [0.0] * 9
    means = [module._clipped_sum([*kept, x], 0.5, 0.5)[0] / 10 for x in (0.0, 1.0)]
    if not header:
        means[0] = module._clipped_sum([*kept, math.nan], 0.5, 0.5)[0] / 10  # the record is not there
    moves = means[1] - means[0]
    assert not stop([*kept, 0.0])
    threshold, question = scales
    t = np.linspace(-60 * threshold, 60 * threshold, 40_001)
    weight = stats.laplace.pdf(t, scale=threshold)

    def probability(first: float, last: float, questions: int = 60) -> float:
        below = stats.laplace.cdf(t - first, scale=question) ** questions
        return float(np.trapezoid(weight * below * stats.laplace.sf(t - last, scale=question), t))

    ratios = [
        probability(base, base + gap) / probability(base + moves, base + gap - moves)
        for base in (-3.0, -1.0, -0.5, 0.0)
        for gap in (0.0, moves, 1.0, 5.0)
    ]
    assert 0.8 < math.log(max(ratios)) <= 1.0 + 1e-6


def test_laplace_noise(tmp_path: Path) -> None:
    stop = stopper(account(tmp_path))
    draws = [stop._laplace(2.0) for _ in range(3000)]
    assert stats.kstest(draws, "laplace", args=(0, 2.0)).pvalue > 1e-4
    assert stats.kstest(draws, "laplace", args=(0, 1.7)).pvalue < 1e-3
