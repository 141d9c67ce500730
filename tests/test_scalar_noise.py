"""Noise on whole numbers: its law, exactly, and that one unit of sensitivity is a whole number of steps."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from dpft import scalar_noise
from dpft.scalar_noise import LARGEST_MULTIPLIER, STD, GridGaussian, discrete_laplace
from tests.fixed_draws import fixed_draws

LEVEL = 1e-4


@pytest.fixture(autouse=True)
def _same_draws() -> Iterator[None]:
    """A right law is refused once in ten thousand tests, and a wrong one is not always seen: the same on every run."""
    with fixed_draws(0):
        yield


def laplace_law(scale: float, largest: int) -> np.ndarray:
    """Probabilities of -largest, ..., largest; the two ends with all that is beyond."""
    ratio = math.exp(-1 / scale)
    law = (1 - ratio) / (1 + ratio) * ratio ** np.abs(np.arange(-largest, largest + 1))
    law[[0, -1]] = ratio**largest / (1 + ratio)
    return law


@pytest.mark.parametrize("scale", [Fraction(1, 2), Fraction(7, 3), Fraction(12), 1 / Fraction(0.4)])
def test_discrete_laplace_has_its_law(scale: Fraction) -> None:
    largest, number = max(2, math.ceil(3 * scale)), 2500
    drawn = Counter(max(-largest, min(largest, discrete_laplace(scale))) for _ in range(number))
    counts = [drawn[x] for x in range(-largest, largest + 1)]
    law = laplace_law(float(scale), largest)
    assert law.sum() == pytest.approx(1.0)
    assert stats.chisquare(counts, law * number).pvalue > LEVEL
    twice_zero = law.copy()
    twice_zero[largest] *= 2  # what comes of it if -0 counts as well as 0
    if scale < 4:
        assert stats.chisquare(counts, twice_zero / twice_zero.sum() * number).pvalue < LEVEL
    assert stats.chisquare(counts, laplace_law(1.4 * float(scale), largest) * number).pvalue < LEVEL


def test_its_law_is_epsilon_private() -> None:
    """Shifted by the sensitivity, the ratio of two probabilities is e^epsilon at most, and reaches it."""
    epsilon, moves = Fraction(3, 4), 3
    law = laplace_law(float(moves / epsilon), 400)[1:-1]
    ratio = law[moves:] / law[:-moves]
    assert max(ratio.max(), (1 / ratio).max()) == pytest.approx(math.exp(epsilon))


@pytest.mark.parametrize("exponent", [Fraction(0), Fraction(1, 3), Fraction(1)])
def test_coins(exponent: Fraction) -> None:
    heads = sum(scalar_noise._coin(exponent) for _ in range(3000))
    assert stats.binomtest(heads, 3000, math.exp(-exponent)).pvalue > LEVEL
    if exponent:
        assert stats.binomtest(heads, 3000, 1 - float(exponent)).pvalue < LEVEL  # the first two terms of the series


@pytest.mark.parametrize("z", [1e-9, 0.3, 1.0, 20.0, 1e4, 2.0**20 + 0.5, LARGEST_MULTIPLIER])
def test_the_noise_over_one_unit_is_the_multiplier_or_more(z: float) -> None:
    grid = GridGaussian(z)
    assert isinstance(grid.steps, int) and STD / grid.steps >= z
    if 1e-5 < z < 1e4:
        assert STD / grid.steps <= z * 1.001
    assert grid.std == STD / grid.steps


def test_a_unit_is_less_than_a_step() -> None:
    with pytest.raises(ValueError, match="take a smaller one"):
        GridGaussian(2.0**26)


def test_sums_are_exact_whole_numbers_in_any_order() -> None:
    grid = GridGaussian(0.7)
    values = np.random.default_rng(0).uniform(-1, 1, 2000)
    total = grid.round(values)
    assert total == grid.round(values[::-1]) == sum(grid.round(values[[i]]) for i in range(2000))
    for one in (1.0, -1.0, 0.123456789):  # what one value adds does not depend on the others
        assert grid.round(np.append(values, one)) - total == grid.round(np.array([one]))
        assert abs(grid.round(np.array([one]))) <= grid.steps


def test_the_noise_is_gaussian_of_its_deviation() -> None:
    grid = GridGaussian(3.0)
    noise = np.array([grid.noised(5 * grid.steps) - 5 for _ in range(2000)])
    assert stats.kstest(noise / grid.std, "norm").pvalue > LEVEL
    assert stats.kstest(noise / grid.std * 1.3, "norm").pvalue < LEVEL
    steps = noise * grid.steps
    assert np.abs(steps - np.rint(steps)).max() < 1e-6 and len(set(np.rint(steps) % 2)) == 2
    assert GridGaussian(3.0).noised(0) != GridGaussian(3.0).noised(0)
