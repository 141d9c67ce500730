"""The accountant against others: Opacus' PRV, RDP from above, and a simulation of the privacy loss from below."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from dpft import PrivacyConfig
from dpft.errors import AccountingError, PrivacyConfigError
from dpft.privacy import Mechanism, epsilon


def poisson(sigma: float, rate: float) -> Mechanism:
    return Mechanism(sampler="poisson", noise_multiplier=sigma, sample_rate=rate)


GRID = list(itertools.product((1e-3, 0.01, 0.2), (0.7, 1.0, 3.0), (1, 100, 2000), (1e-3, 1e-6)))
FEW = [(0.01, 1.0, 100, 1e-6), (0.2, 3.0, 2000, 1e-3)]


def check_against_prv(rate: float, sigma: float, steps: int, delta: float) -> None:
    """Within the error that Opacus allows its own number, and half a per cent for our discretisation; below RDP."""
    from opacus.accountants import PRVAccountant

    ours = epsilon(poisson(sigma, rate), steps, delta)
    assert ours <= epsilon(poisson(sigma, rate), steps, delta, accountant="rdp") * (1 + 1e-9)
    error = 0.01
    prv = PRVAccountant()
    prv.history = [(sigma, rate, steps)]
    theirs = prv.get_epsilon(delta, eps_error=error)
    assert theirs - 2 * error - 0.005 * theirs <= ours <= theirs + 0.005 * theirs + 1e-6


@pytest.mark.parametrize(("rate", "sigma", "steps", "delta"), FEW)
def test_against_prv_and_rdp(rate: float, sigma: float, steps: int, delta: float) -> None:
    check_against_prv(rate, sigma, steps, delta)


@pytest.mark.slow
def test_a_grid_against_prv_and_rdp() -> None:
    for values in GRID:
        if epsilon(poisson(values[1], values[0]), values[2], values[3]) < 50:  # PRV gives up where it is larger
            check_against_prv(*values)


def losses(rng: np.random.Generator, rate: float, sigma: float, steps: int, samples: int, removed: bool) -> np.ndarray:
    """Privacy losses of ``steps`` releases, simulated: of the data with the example against those without, or back."""
    total = np.zeros(samples)
    for _ in range(steps):
        drawn = (rng.random(samples) < rate) if removed else np.zeros(samples, bool)
        x = rng.normal(size=samples) * sigma + drawn
        ratio = np.log1p(rate * np.expm1((2 * x - 1) / (2 * sigma**2)))
        total += ratio if removed else -ratio
    return total


@pytest.mark.parametrize(
    ("rate", "sigma", "steps", "delta"), [(0.05, 1.0, 40, 1e-2), (0.5, 2.0, 20, 1e-2), (1.0, 3.0, 5, 1e-2)]
)
def test_a_simulation_needs_no_more(rate: float, sigma: float, steps: int, delta: float) -> None:
    """delta(epsilon) = E[max(0, 1 - exp(epsilon - L))]: at our epsilon not above delta, at nine tenths of it above."""
    rng, samples = np.random.default_rng(0), 200_000
    ours = epsilon(poisson(sigma, rate), steps, delta)

    def bounds(at: float, removed: bool) -> tuple[float, float]:
        values = np.maximum(0.0, -np.expm1(at - losses(rng, rate, sigma, steps, samples, removed)))
        deviation = 4 * values.std() / math.sqrt(samples)  # once in 30,000
        return float(values.mean() - deviation), float(values.mean() + deviation)

    assert all(bounds(ours, removed)[0] <= delta for removed in (True, False))
    assert max(bounds(0.9 * ours, removed)[0] for removed in (True, False)) > delta, "the bound is not tight"


def gaussian_epsilon(sigma: float, delta: float) -> float:
    """Of one Gaussian mechanism without sampling, in closed form (Balle & Wang 2018, arXiv 1805.06530, Theorem 8)."""

    def excess(at: float) -> float:
        a, b = 1 / (2 * sigma), at * sigma
        return float(norm.cdf(a - b) - math.exp(at) * norm.cdf(-a - b) - delta)

    return float(brentq(excess, 0.0, 50.0))


def test_corners_are_finite_and_ordered() -> None:
    exact = gaussian_epsilon(1.0, 1e-6)
    assert exact <= epsilon(poisson(1.0, 1.0), 1, 1e-6) == pytest.approx(exact, rel=1e-3)
    assert 0 < epsilon(poisson(100.0, 0.01), 1, 1e-6) < 0.01
    assert 10 < epsilon(poisson(0.3, 0.1), 10, 1e-6) < 200
    one_example = PrivacyConfig(target_delta=1e-6, expected_batch_size=1, noise_multiplier=1.0, num_steps=1).resolve(1)
    assert one_example.sample_rate == 1.0 and one_example.epsilon == pytest.approx(exact, rel=1e-3)
    with pytest.raises(PrivacyConfigError, match="larger than the 3 examples"):
        PrivacyConfig(target_delta=1e-6, expected_batch_size=4, noise_multiplier=1.0, num_steps=1).resolve(3)
    with pytest.raises(AccountingError, match="below 1e-12"):
        epsilon(poisson(1.0, 0.01), 10, 1e-15)
    assert math.isfinite(epsilon(poisson(1.0, 0.01), 10, 1e-15, accountant="rdp"))


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_more_of_anything_costs_more(accountant: str) -> None:
    def found(sigma: float = 1.0, rate: float = 0.01, steps: int = 100, delta: float = 1e-6) -> float:
        return epsilon(poisson(sigma, rate), steps, delta, accountant=accountant)  # type: ignore[arg-type]  # two names

    assert found(steps=50) < found() < found(steps=200)
    assert found(sigma=2.0) < found() < found(sigma=0.7)
    assert found(rate=0.005) < found() < found(rate=0.02)
    assert found(delta=1e-5) < found() < found(delta=1e-8)
