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
from dpft.errors import AccountingError, BudgetExceededError, PrivacyConfigError
from dpft.privacy import Mechanism, PureRelease, epsilon
from tests.fixed_draws import fixed_draws

GRID = module.GridGaussian(5.0)


def account(path: Path, **changes: Any) -> dpft.Account:
    return dpft.Account.create(path / "account.jsonl", **{"epsilon": 50.0, "delta": 1e-5, **changes})


def mean(values: Any, payer: dpft.Account, **changes: Any) -> dpft.PrivateMean:
    return dpft.private_mean(values, **{"low": 0.0, "high": 1.0, "account": payer, "noise_multiplier": 5.0, **changes})


# --------------------------------------------------------------------------------------------------- sensitivity
_ANY = st.floats(allow_nan=True, allow_infinity=True)


@hypothesis.given(st.lists(_ANY, max_size=8), _ANY, _ANY)
def test_one_record_moves_the_sum_by_one_unit_at_most(values: list[float], one: float, other: float) -> None:
    """In whole steps, so that "at most" holds to the last bit."""

    def total(records: list[float]) -> int:
        return GRID.round(module._clipped(records, *module._range(-2.0, 6.0)))

    assert abs(total([*values, one]) - total(values)) <= GRID.steps
    assert abs(total([*values, one]) - total([*values, other])) <= 2 * GRID.steps


def test_values_are_clipped_in_any_order_and_type() -> None:
    values = [0.25, -7.0, 9.0, math.nan, math.inf, 0.5]
    for order, back in (
        (values, 1),
        (values[::-1], -1),
        (torch.tensor(values), 1),
        (torch.tensor(values).bfloat16(), 1),
    ):
        assert module._clipped(order, *module._range(0.0, 1.0))[::back].tolist() == [-0.5, -1.0, 1.0, 0.0, 1.0, 0.0]


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
        (
            {"unit": "user", "examples_per_user": 3},
            Mechanism(sampler="poisson", noise_multiplier=5.0, sample_rate=1.0, unit="user", examples_per_user=3),
        ),
    ],
)
def test_the_account_has_what_was_released(
    tmp_path: Path, header: dict[str, Any], releases: Mechanism, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A draw of one standard deviation, which is the noise multiplier times half the range, over the number of records.
    monkeypatch.setattr(module.GridGaussian, "noised", lambda self, total: total / self.steps + self.std)
    payer = account(tmp_path, **header)
    found = mean([0.0, 1.0, 1.0, 1.0], payer, low=-1.0, high=3.0)
    assert payer.uses() == [(releases, 1)] and payer.entries()[0].name == found.paid
    assert found.standard_error == pytest.approx(10.0 / 4, rel=1e-6) and found.size == 4
    assert found.value == pytest.approx(0.75 + 10.0 / 4, abs=1e-6)
    # The epsilon is that of the Gaussian whose sensitivity is what a neighbour moves: k records, or a whole range.
    moves = {"replace_one": 2, "user": 3}.get(header.get("adjacency", header.get("unit", "")), 1)
    alone = Mechanism(sampler="poisson", noise_multiplier=5.0 / moves, sample_rate=1.0)
    accountant = "rdp" if payer.composition == "rdp" else "pld"
    assert payer.spent() == pytest.approx(epsilon(alone, 1, 1e-5, accountant=accountant), rel=1e-3)


def test_the_noise_is_gaussian_of_the_stated_error(tmp_path: Path) -> None:
    payer = account(tmp_path, epsilon=5000.0)
    with fixed_draws(0):
        found = [mean([0.2] * 10, payer, noise_multiplier=3.0) for _ in range(100)]
    z = [(each.value - 0.2) / each.standard_error for each in found]
    assert len(set(z)) == 100 and found[0].standard_error == pytest.approx(0.15)
    assert stats.kstest(z, "norm").pvalue > 1e-4
    assert all(stats.kstest(np.asarray(z) * factor, "norm").pvalue < 1e-2 for factor in (1 / 3, 3.0))


def test_epsilon_of_the_query_alone(tmp_path: Path) -> None:
    for header in ({}, {"adjacency": "replace_one"}):
        (tmp_path / str(header)).mkdir()
        found = mean([0.5] * 4, account(tmp_path / str(header), **header), noise_multiplier=None, epsilon=1.0)
        accountant = "rdp" if header else "pld"
        assert 0.99 < epsilon(found.mechanism, 1, 1e-5, accountant=accountant) <= 1.0


@pytest.mark.parametrize("shape", [(3, 8), (), (2, 1, 2)])
def test_several_values_of_a_record_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Losses of tokens: a record would move the sum by as many units as it has tokens."""
    payer = account(tmp_path)
    with pytest.raises(PrivacyConfigError, match="expected one number for each record"):
        mean(torch.ones(shape), payer)
    assert payer.uses() == [] and mean(torch.ones(3, 1), payer).size == 3


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
    monkeypatch.setattr(module.GridGaussian, "noised", lambda *_: pytest.fail("noise before the account"))
    with pytest.raises(BudgetExceededError):
        mean([0.5], payer, noise_multiplier=0.1)
    assert payer.entries() == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"low": 1.0, "high": 1.0},
        {"low": -math.inf},
        {"high": math.nan},
        {"low": -1e308, "high": 1e308},  # whose width is not finite
        {"noise_multiplier": 0.0},
        {"noise_multiplier": math.inf},
        {"noise_multiplier": 2.0**26},
        {"item": "person"},
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


def test_the_statement_names_the_accounts_unit(tmp_path: Path) -> None:
    """A figure of users protects them, and not their single records: one more moves its user's value by the range."""
    of_users = mean([0.5] * 40, account(tmp_path / "a", unit="user"), item="user")
    assert "unit user" in of_users.statement() and "over 40 users" in of_users.statement()
    of_rows = mean([0.5] * 40, account(tmp_path / "b", unit="user", examples_per_user=3))
    assert "unit user (at most 3 examples each)" in of_rows.statement() and "over 40 records" in of_rows.statement()


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


def test_it_stops_once_and_is_paid_for_when_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    forked = stopper(payer)
    with monkeypatch.context() as patch, pytest.raises(BudgetExceededError, match="inherited"):
        patch.setattr(module.os, "getpid", lambda: 1)
        forked([0.8])
    with pytest.raises(BudgetExceededError):
        stopper(account(tmp_path / "small", epsilon=0.5), epsilon=5.0)
    for bad in ({"threshold": math.nan}, {"epsilon": 0.0}, {"size": 0}, {"low": 2.0}, {"low": 0.0, "high": 5e-324}):
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
    monkeypatch.setattr(module, "discrete_laplace", lambda scale: scales.append(float(scale)) or 0)
    stop = stopper(account(tmp_path, **header), size=10)
    kept = [0.0] * 9

    def total(values: list[float]) -> float:
        """In units of the threshold's scale: a draw is a whole number of 2^-40 of these."""
        return float(np.rint(module._clipped(values, 0.5, 0.5) * stop._steps).sum()) / scales[0]

    assert not stop([*kept, 0.0])
    sums = [total([*kept, x]) for x in (0.0, 1.0)]
    if not header:
        sums[0] = total([*kept, math.nan])  # the record is not there
    moves = sums[1] - sums[0]
    threshold, question = 1.0, scales[1] / scales[0]
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


def test_its_threshold_is_that_of_the_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "discrete_laplace", lambda scale: 0)
    for threshold, low, high in ((0.3, 0.0, 1.0), (-0.2, -1.0, 1.0), (5.0, 0.0, 8.0)):
        for off, answer in ((-1e-6, False), (1e-6, True)):
            stop = stopper(account(tmp_path / f"{threshold}{off}"), threshold=threshold, low=low, high=high, size=4)
            spread = [threshold + off + d * (high - low) / 9 for d in (-1, 1, 0.5, -0.5)]
            assert stop(spread) is answer


def test_neighbours_move_early_stopping_by_whole_steps(tmp_path: Path) -> None:
    """Which the account paid for: half of epsilon, in scales, at most; for users and replaced records, too."""
    for header, most in (
        ({}, 1),
        ({"adjacency": "replace_one"}, 2),
        ({"unit": "user", "examples_per_user": 3}, 3),
        ({"unit": "user"}, 1),
    ):
        item = "user" if header == {"unit": "user"} else "example"
        for eps in (0.1, 0.7, 20.0):
            stop = stopper(account(tmp_path / f"{header}{eps}", **header), epsilon=eps, item=item)
            assert stop._steps * most <= module._SCALE * eps / 2 < (stop._steps + 1) * most
        assert stopper(account(tmp_path / f"{header}", epsilon=1e3, **header), epsilon=700.0, item=item)._steps < 2**50
    for eps, expected in ((1e-13, "expected at least"), (1e5, r"expected a number in \(0, 700\]")):
        with pytest.raises(PrivacyConfigError, match=expected):
            stopper(account(tmp_path / f"{eps}"), epsilon=eps)


# --------------------------------------------------------------------------------------------------- users
def test_values_of_users_are_paid_for_as_what_they_are(tmp_path: Path) -> None:
    users = account(tmp_path / "users", unit="user")
    both = account(tmp_path / "both", unit="user", examples_per_user=3)
    rows = account(tmp_path / "rows")
    one = Mechanism(sampler="poisson", noise_multiplier=5.0, sample_rate=1.0)
    for payer in (users, both):
        mean([0.5] * 4, payer, item="user")
        assert payer.uses()[-1] == (one, 1) and payer.entries()[-1].item == "user"
    assert "a user is one example" in users.markdown() and "all records of one together" in users.markdown()
    for wrong, item in ((users, "example"), (rows, "user")):
        with pytest.raises(AccountingError, match="account for the unit"):
            mean([0.5] * 4, wrong, item=item)
        with pytest.raises(AccountingError, match="account for the unit"):
            stopper(wrong, item=item)
    assert len(users.entries()) == 1 and rows.entries() == ()


# --------------------------------------------------------------------------------------------------- counts
def counts(payer: dpft.Account, values: list[str], **changes: Any) -> dpft.PrivateCounts:
    return dpft.private_counts(values, ["a", "b", "c"], **{"account": payer, "epsilon": 1.0, **changes})


@pytest.mark.parametrize(
    ("header", "more", "most"),
    [
        ({}, {}, 1),
        ({"adjacency": "replace_one"}, {}, 2),
        ({"unit": "user", "examples_per_user": 3}, {}, 3),
        ({"unit": "user"}, {"users": [0, 0, 0, 1, 1], "rows": 2}, 2),
    ],
)
def test_counts_have_the_noise_of_what_one_unit_changes(
    tmp_path: Path, header: dict[str, Any], more: dict[str, Any], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scales: list[float] = []
    payer = account(tmp_path, **header)

    def drawn(scale: Any) -> int:
        assert payer.uses() == [(PureRelease(0.5), 1)]  # paid before
        scales.append(scale)
        return 0

    monkeypatch.setattr(module, "discrete_laplace", drawn)
    found = counts(payer, ["a", "b", "a", "x", "b"], epsilon=0.5, **more)
    assert scales == [2 * most] * 3 and found.sensitivity == most and found.paid == payer.entries()[0].name
    if "users" not in more:
        assert found.counts == {"a": 2, "b": 2, "c": 0}
    assert sum(found.counts.values()) <= 4


def test_a_user_counts_at_most_so_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever else is there; and which of the records count is drawn."""
    monkeypatch.setattr(module, "discrete_laplace", lambda scale: 0)
    payer = account(tmp_path, unit="user")
    owners, values = ["u"] * 6 + ["v"], ["a", "a", "b", "b", "c", "c", "a"]
    seen = [counts(payer, values, users=owners, rows=2, epsilon=0.1).counts for _ in range(20)]
    assert all(sum(found.values()) == 3 for found in seen) and len({str(found) for found in seen}) > 1


@pytest.mark.parametrize(
    "users", [[0.0, math.nan, math.nan], ["u", 1, "1"], [torch.tensor(7)] * 3, [None] * 3], ids=str
)
def test_users_that_would_be_several_are_refused(tmp_path: Path, users: Any) -> None:
    payer = account(tmp_path, unit="user")
    with pytest.raises(PrivacyConfigError, match="a person under two names would be two users"):
        counts(payer, ["a"] * 3, users=users, rows=1)
    assert payer.uses() == []


def test_users_in_a_tensor_are_those_that_they_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "discrete_laplace", lambda scale: 0)
    payer = account(tmp_path, unit="user")
    for users in (torch.tensor([7, 7, 7]), np.array([7, 7, 7])):
        assert counts(payer, ["a"] * 3, users=users, rows=1).counts["a"] == 1


def test_counts_are_noised_by_the_discrete_laplace_law(tmp_path: Path) -> None:
    names = [str(number) for number in range(1500)]
    with fixed_draws(0):
        found = dpft.private_counts(names * 5, names, account=account(tmp_path), epsilon=0.7).counts
    noise = np.array([found[name] - 5 for name in names])
    ratio = math.exp(-0.7)
    law = (1 - ratio) / (1 + ratio) * ratio ** np.abs(np.arange(-6, 7))
    law[[0, -1]] = ratio**6 / (1 + ratio)
    seen = np.bincount(np.clip(noise, -6, 6) + 6, minlength=13)
    assert stats.chisquare(seen, law * len(names)).pvalue > 1e-4


def test_counts_that_are_refused(tmp_path: Path) -> None:
    payer, users = account(tmp_path / "a"), account(tmp_path / "b", unit="user")
    for bad in (
        {"epsilon": 0.0},
        {"rows": 2},
        {"users": ["u"]},
        {"users": ["u"], "rows": 0},
        {"users": [], "rows": 1},
    ):
        with pytest.raises(PrivacyConfigError):
            counts(users, ["a"], **bad)
    for categories in ([], ["a", "a"]):
        with pytest.raises(PrivacyConfigError, match="expected at least one, each once"):
            dpft.private_counts(["a"], categories, account=payer, epsilon=1.0)
    with pytest.raises(AccountingError):
        counts(users, ["a"])
    with pytest.raises(AccountingError):
        counts(payer, ["a"], users=["u"], rows=1)
    with pytest.raises(BudgetExceededError):
        counts(payer, ["a"], epsilon=100.0)
    assert payer.entries() == users.entries() == ()
    for words in ("epsilon 1, delta 0", "3 categories", "add_or_remove_one", "scale 1 / 1"):
        assert words in counts(payer, ["a"]).statement()
