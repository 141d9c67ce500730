"""`compare_units`: both ways protect a user; by other computations of the same divergences, and in the limits."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

import dpft
from dpft.errors import AccountingError, PrivacyConfigError
from dpft.privacy import Mechanism, epsilon

COUNTS = [1] * 10 + [2] * 10 + [7] * 20
SETTING: dict[str, Any] = {"rows": 3, "batch": 18.0, "steps": 1, "delta": 1e-3, "noise_multiplier": 1.0}
ROWS = 10 + 20 + 60  # with at most 3 of each user


def compared(counts: Any = COUNTS, **changes: Any) -> dpft.UnitComparison:
    return dpft.compare_units(counts, **(SETTING | changes))


def densities(x: Any, k: int, rate: float, sigma: float) -> tuple[Any, Any]:
    """Of the noise alone, and of the noise with a user of whose k rows each is drawn with this rate."""
    chances = stats.binom.pmf(np.arange(k + 1), k, rate)
    with_user = sum(p * stats.norm.pdf(x, j, sigma) for j, p in enumerate(chances))
    return stats.norm.pdf(x, 0, sigma), with_user


def delta_of_one_step(eps: float, k: int, rate: float, sigma: float) -> float:
    """The larger of both hockey-stick divergences, by quadrature."""
    x = np.linspace(-12 * sigma, k + 12 * sigma, 400_001)
    one, other = densities(x, k, rate, sigma)
    found = [np.maximum(0.0, a - math.exp(eps) * b).sum() for a, b in ((one, other), (other, one))]
    return float(max(found) * (x[1] - x[0]))


def test_one_step_is_what_quadrature_finds() -> None:
    """Both epsilons: Poisson's is that of a user with one row."""
    found = compared()
    assert found.sample_rate == pytest.approx(18 / ROWS) and found.most_rows == 3
    for eps, k, above in ((found.epsilon_users, 1, 1.005), (found.epsilon_rows, 3, 1.02)):
        assert delta_of_one_step(eps, k, 0.2, 1.0) <= 1e-3 * (1 + 1e-6)
        assert delta_of_one_step(eps / above, k, 0.2, 1.0) > 1e-3, "not much above the truth"
    assert found.epsilon_users < found.epsilon_rows


@pytest.mark.slow
def test_the_same_epsilon_by_both_noises() -> None:
    found = compared(target_epsilon=1.0, noise_multiplier=None)
    assert found.epsilon_users <= 1.0 and found.noise_rows > found.noise_users
    assert delta_of_one_step(found.epsilon_users, 1, 0.2, found.noise_users) <= 1e-3 * (1 + 1e-6)
    assert delta_of_one_step(found.epsilon_users, 3, 0.2, found.noise_rows) <= 1e-3 * (1 + 1e-6)
    assert delta_of_one_step(found.epsilon_users, 3, 0.2, found.noise_rows / 1.05) > 1e-3


@pytest.mark.slow
def test_many_steps_lie_above_a_sample_of_their_losses() -> None:
    """Monte Carlo: the losses of 8 steps with the user, and what they say of delta at the stated epsilon."""
    found = compared(steps=8, delta=0.01)
    draw = np.random.Generator(np.random.PCG64(5))
    for k, eps in ((1, found.epsilon_users), (3, found.epsilon_rows)):
        x = draw.normal(size=(200_000, 8)) + draw.binomial(k, 0.2, size=(200_000, 8))
        without, with_user = densities(x, k, 0.2, 1.0)
        loss = np.log(with_user / without).sum(1)
        for stated, least, most in ((eps, 0.0, 0.0107), (0.9 * eps, 0.0115, 1.0)):  # six deviations are 0.0007
            delta = float(np.maximum(0.0, 1 - np.exp(stated - loss)).mean())
            assert least <= delta <= most


def test_both_read_the_same_rows() -> None:
    found = compared()
    assert (found.users, found.examples, found.unused) == (40, ROWS, 20 * 4)
    assert found.users_per_step * ROWS / 40 == pytest.approx(found.batch) == 18
    assert found.gain_possible == pytest.approx((10 + 10 * math.sqrt(2) + 20 * math.sqrt(3)) / 40)
    assert found.gain_needed == pytest.approx((ROWS / found.noise_rows) / (40 / found.noise_users))


def test_where_nobody_has_two_rows_they_are_the_same() -> None:
    for found in (compared(rows=1, batch=8.0), compared([1] * 40, batch=8.0)):
        assert found.epsilon_rows == found.epsilon_users and found.noise_rows == found.noise_users
        assert found.better == "users" and found.gain_needed == found.gain_possible == 1


def test_a_rate_of_one_is_a_gaussian() -> None:
    """All k rows are there: k times the sensitivity."""
    found = compared(batch=float(ROWS))
    third = Mechanism(sampler="poisson", noise_multiplier=1 / 3, sample_rate=1.0)
    assert found.epsilon_rows == pytest.approx(epsilon(third, 1, 1e-3), rel=0.02)
    assert found.noise_rows == pytest.approx(3.0, rel=0.03)


@pytest.mark.slow  # the fine grid of a mixture
@pytest.mark.parametrize(("rows", "steps", "sigma"), [(2, 100, 1.0), (3, 10, 2.0)])
def test_the_coarse_grid_is_a_little_above_the_fine_one(rows: int, steps: int, sigma: float) -> None:
    found = compared(rows=rows, steps=steps, noise_multiplier=sigma, batch=9.0)
    fine = Mechanism(
        sampler="poisson",
        noise_multiplier=sigma,
        sample_rate=found.sample_rate,
        unit="user",
        examples_per_user=rows,
    )
    exact = epsilon(fine, steps, 1e-3)
    assert exact <= found.epsilon_rows <= 1.02 * exact
    more = compared(rows=rows, steps=steps, noise_multiplier=1.2 * sigma, batch=9.0)
    assert more.epsilon_rows < found.epsilon_rows and more.epsilon_users < found.epsilon_users
    longer = compared(rows=rows, steps=2 * steps, noise_multiplier=sigma, batch=9.0)
    assert longer.epsilon_rows > found.epsilon_rows and longer.epsilon_users > found.epsilon_users


def test_the_verdict_and_how_it_prints() -> None:
    found = compared()
    values = {name: value for name, value in found.to_dict().items() if name != "better"}
    for needed, better in ((1.0, "users"), (1.2, "either"), (1.5, "rows")):
        other = dpft.UnitComparison(**{**values, "gain_needed": needed, "gain_possible": 1.5})
        assert other.better == better
        assert (
            f"\nbetter: {'users' if better == 'either' else better}, {'if' if better == 'either' else 'whatever'} "
            in str(other)
        )
    text = str(found)
    assert text.startswith("NOT FOR PUBLICATION") and max(map(len, text.splitlines())) <= 119
    assert "users sampled" in text and "80 rows are beyond that" in text
    assert json.loads(json.dumps(found.to_dict()))["better"] == found.better


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counts": [3, 0]}, "for each user a whole number >= 1"),
        ({"counts": [1.5]}, "counts of type float64"),
        ({"counts": []}, "counts of type"),
        ({"counts": [[1, 2]]}, "and shape"),
        ({"rows": 0}, "rows=0"),
        ({"batch": 91}, "batch=91 rows a step, of 90 that are there"),
        ({"steps": 1.5}, "steps=1.5"),
        ({"target_epsilon": 1.0}, "give exactly one of them to compare units"),
        ({"noise_multiplier": None}, "give exactly one of them to compare units"),
        ({"noise_multiplier": 0.0}, "has no epsilon to compare"),
    ],
)
def test_what_cannot_be_compared_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PrivacyConfigError, match=message):
        compared(changes.pop("counts", COUNTS), **changes)


def test_a_delta_of_one_is_refused() -> None:
    with pytest.raises(AccountingError, match="strictly between 0 and 1"):
        compared(delta=1.0)
