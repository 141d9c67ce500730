"""The best strategy of a form for prefix sums, and the error of a strategy.

The parameters of a model after t steps of plain SGD are the first ones minus the learning rate times the sum of t
releases. So what counts is the noise in the prefix sums of the releases, not in one of them: a strategy is chosen for
the smallest mean, over the steps, of its variance. Momentum and a learning rate that changes are left out: with them
the strategy is as private, and the noise a little larger than it need be.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from dpft.errors import AccountingError, PrivacyConfigError
from dpft.privacy.correlated.strategy import Strategy, Vector, blt_coefficients, blt_inverse, toeplitz_sensitivity
from dpft.privacy.packages import import_package

# Of the parameters. The error is flat at its minimum: rounding costs nothing, and hides the last digits, in which two
# machines differ, from a ledger that compares mechanisms. Then to float32, in which the noise is computed: the matrix
# whose sensitivity is accounted must be the one that makes the noise, and not what float32 makes of it.
_DECIMALS = 6
_MOST_WEIGHT = 1 - 10.0**-_DECIMALS
_MOST_BUFFERS = 10
_TOO_LARGE = 1e100


def noise_coefficients(strategy: Strategy) -> Vector:
    """The first column of C^{-1}, float64 ``[steps]``: the noise of step t is sum_j of them times z_(t-j)."""
    if strategy.kind == "bandmf":
        return _filter([1.0], list(strategy.weights), np.eye(1, strategy.steps)[0])
    return blt_inverse(np.array(strategy.weights), np.array(strategy.decays), strategy.steps)


def squared_errors(strategy: Strategy) -> Vector:
    """Variance of the noise in the sum of the first t + 1 releases, for each t, float64 ``[steps]``.

    In units of (noise multiplier * clip norm)^2. Noise that is independent over the steps has t + 1 where sampling
    amplifies (``bandmf``), and k (t + 1) where k participations are one release (``blt``).
    """
    return np.asarray(np.cumsum(np.cumsum(noise_coefficients(strategy)) ** 2) * strategy.scale**2)


def rms_error(strategy: Strategy) -> float:
    """Root mean square, over the steps, of the noise in the sum of the releases so far: what is optimised.

    Args:
        strategy: of correlated noise.

    Returns:
        In units of noise multiplier times clip norm. Independent noise has sqrt((steps + 1) / 2) where sampling
        amplifies (``bandmf``), and sqrt(k) times as much where k participations are one release (``blt``).
    """
    return float(np.sqrt(squared_errors(strategy).mean()))


def max_error(strategy: Strategy) -> float:
    """Root of the largest of :func:`squared_errors`, which is the last."""
    return float(np.sqrt(squared_errors(strategy)[-1]))


@functools.lru_cache(maxsize=64)
def best_banded(steps: int, bands: int) -> Strategy:
    """The banded Toeplitz strategy with the least rms error of one participation.

    Args:
        steps: n >= 1.
        bands: 1 to n; 1 is independent noise.

    Returns:
        The strategy, for participations that are ``bands`` steps apart. Takes less than a second up to 10,000 steps.

    Raises:
        PrivacyConfigError: ``bands`` out of range.
        MissingPackageError: scipy is not installed.
    """
    if not 1 <= bands <= steps:
        raise PrivacyConfigError(f"bands={bands!r} for {steps} steps; expected 1 to the number of steps.")
    remaining = (steps - np.arange(steps)) / steps  # in how many of the prefix sums a step's noise is, of all

    def loss(free: Vector) -> tuple[float, Vector]:
        """ln(|c|^2 * mean squared error) and its gradient, by the adjoint of the filter."""
        c = np.concatenate([[1.0], free])
        summed = _filter([1.0], c, np.ones(steps))  # C^{-1} 1: the coefficients of the noise of prefix sums
        with np.errstate(over="ignore", invalid="ignore"):
            error = float(remaining @ summed**2)
        if not error < _TOO_LARGE:  # a step too far, where the noise grows without end: the search comes back from it
            return _TOO_LARGE, np.zeros(bands - 1)
        adjoint = _filter([1.0], c, (2 * remaining * summed)[::-1])[::-1]
        slope = np.array([-(adjoint[j:] @ summed[: steps - j]) for j in range(1, bands)])
        return float(np.log(c @ c) + np.log(error)), 2 * free / (c @ c) + slope / error

    start = square_root_coefficients(bands)[1:]
    found = _minimise(loss, start, jac=True) if bands > 1 else start
    weights = (1.0, *_in_float32(np.round(found, _DECIMALS)))
    return Strategy(kind="bandmf", steps=steps, min_separation=bands, weights=weights)


@functools.lru_cache(maxsize=64)
def best_blt(steps: int, min_separation: int, buffers: int, error: str = "rms") -> Strategy:
    """The BLT strategy with the least error under participations that are ``min_separation`` steps apart.

    Args:
        steps: n >= 1.
        min_separation: b >= 1.
        buffers: 1 to 10; 2 to 5 are enough for any number of steps.
        error: ``rms`` or ``max``.

    Returns:
        The strategy. Takes some seconds for 10,000 steps.

    Raises:
        PrivacyConfigError: ``buffers`` out of range.
        MissingPackageError: scipy is not installed.
    """
    if not 1 <= buffers <= _MOST_BUFFERS:
        raise PrivacyConfigError(f"buffers={buffers!r}; expected 1 to {_MOST_BUFFERS}; more do not lower the error.")
    remaining = (steps - np.arange(steps)) / steps if error == "rms" else np.ones(steps)

    def parameters(free: Vector) -> tuple[Vector, Vector]:
        """Any numbers to weights >= 0 with a sum below 1, and decays in (0, 1)."""
        shares = np.exp(np.minimum(free[:buffers], 50))
        return shares / (1 + shares.sum()) * _MOST_WEIGHT, 1 / (1 + np.exp(-np.clip(free[buffers:], -50, 50)))

    def loss(free: Vector) -> float:
        weights, decays = parameters(free)
        sensitivity = toeplitz_sensitivity(blt_coefficients(weights, decays, steps), min_separation)
        summed = np.cumsum(blt_inverse(weights, decays, steps))
        return float(2 * np.log(sensitivity) + np.log(remaining @ summed**2))

    # Starts: decays whose distances to 1 are spread over the scales from 1 to 1 / n, equal weights. From several
    # starts, as the loss has more than one minimum.
    found = []
    for reach, total in ((1.0, 0.5), (0.7, 0.5), (1.0, 0.1)):
        distances = (1.0 + steps) ** (-reach * (np.arange(buffers) + 0.5) / buffers)
        weights = total * distances**0.5 / (distances**0.5).sum()
        start = np.concatenate([np.log(weights / (1 - total)), np.log((1 - distances) / distances)])
        best = _minimise(loss, start)
        found.append((loss(best), best))
    weights, decays = parameters(min(found, key=lambda pair: pair[0])[1])
    order = np.argsort(-decays)
    lists = [_in_float32(np.round(values[order], _DECIMALS + 2)) for values in (weights, decays)]
    return Strategy(kind="blt", steps=steps, min_separation=min_separation, weights=lists[0], decays=lists[1])


def square_root_coefficients(steps: int) -> Vector:
    """First column of the square root of the matrix of prefix sums: 1, 1/2, 3/8, ...

    It has the least largest error of all Toeplitz strategies under one participation (Fichtenberger, Henzinger,
    Upadhyay 2023, arXiv 2202.11205).
    """
    k = np.arange(1, steps)
    return np.cumprod(np.concatenate([[1.0], (2 * k - 1) / (2 * k)]))


def _in_float32(values: Vector) -> tuple[float, ...]:
    """The nearest float32 numbers, below 1 where they were at most that."""
    nearest = values.astype(np.float32)
    below = np.nextafter(np.float32(1), np.float32(0))
    return tuple(float(value) for value in np.where(values <= 1, np.minimum(nearest, below), nearest))


def _minimise(loss: Callable[..., Any], start: Vector, jac: bool | None = None) -> Vector:
    result = import_package("scipy.optimize").minimize(
        loss, start, jac=jac, method="L-BFGS-B", options={"maxiter": 1000, "maxfun": 100_000, "ftol": 1e-13}
    )
    found = np.asarray(result.x)
    if not np.isfinite(found).all() or not np.isfinite(result.fun):
        raise AccountingError("the optimisation of the strategy did not end in finite numbers; take fewer buffers.")
    return found


def _filter(numerator: Any, denominator: Any, values: Vector) -> Vector:
    return np.asarray(import_package("scipy.signal").lfilter(numerator, denominator, values))
