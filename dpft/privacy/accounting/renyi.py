"""Renyi divergences of dominating pairs that are mixtures of Gaussians, where dp_accounting has no RDP.

A pair (P, Q) that *dominates* a release bounds every hockey-stick divergence between its outputs on two neighbours.
The Renyi divergence of an order alpha > 1 is an increasing function of an f-divergence, and every f-divergence is a
mixture of hockey-stick divergences with weights >= 0 (Sason, Verdu 2016, arXiv 1508.00335). So
``max(D_alpha(P || Q), D_alpha(Q || P))`` over the pairs of both directions is an RDP bound of the release, from the
very pairs whose privacy loss distribution the PLD accountant composes:

- ``unit="user"``: the sum over j of Binomial(k, q)(j) N(j, sigma^2), and N(0, sigma^2) (Choquette-Choo et al. 2023,
  arXiv 2310.15526);
- ``truncated_poisson``: with probability p (the batch is cut) a pair of sensitivity 2, else Poisson sampling's; the
  bound lets it be seen which (arXiv 2508.15089, as in dp_accounting's PLD). Then ``exp((alpha - 1) D_alpha)`` is the
  mean of those of the two.

The integral of ``P^alpha Q^(1 - alpha)`` is taken by the trapezoidal rule, whose error for such analytic functions
falls exponentially with the number of points: with three times as many the values are the same to 1e-10. Float64's
rounding is bounded and added: many steps of a tiny rate, each of which rounds to nothing, would cost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dpft.privacy.mechanism import Mechanism
from dpft.privacy.packages import import_package as _import

Vector = npt.NDArray[np.float64]
Gaussians = tuple[Sequence[float], Sequence[float]]
"""Their means and probabilities."""

_REACH = 40.0  # standard deviations; a mass of 1e-349 lies beyond
_MOST_POINTS = 4_000_000


def log_moments(upper: Gaussians, lower: Gaussians, sigma: float, orders: Sequence[float]) -> Vector:
    """``(alpha - 1) D_alpha(P || Q)``, that is ``ln of the integral of P^alpha Q^(1 - alpha)``, for each order.

    Args:
        upper: means and probabilities of the Gaussians of P, all of standard deviation sigma.
        lower: of Q.
        sigma: > 0.
        orders: alpha > 1, increasing.

    Returns:
        The values, >= 0; an upper bound, by the largest distance of two means, where the integral would take too
        many points.
    """
    means = [*upper[0], *lower[0]]
    low, span = min(means), max(means) - min(means)
    found, densities, reach = [], None, 0.0
    for alpha in orders:
        # The zeros of P and Q are at least pi sigma^2 / span from the real line, and within half of that even large
        # powers of 1 / Q stay bounded: the error is exp(-pi that / step).
        step = min(sigma / 5, math.pi * sigma**2 / span / 10 if span else math.inf)
        if 2 * (alpha * span + _REACH * sigma) / step > _MOST_POINTS:
            found.append(alpha * (alpha - 1) * span**2 / (2 * sigma**2))  # quasi-convexity of D_alpha in the pair
            continue
        if densities is None or alpha * span > reach:
            reach = 1.5 * alpha * span  # for the next orders too
            x = np.arange(low - reach - _REACH * sigma, low + span + reach + _REACH * sigma, step)
            densities = _log_density(*upper, sigma, x), _log_density(*lower, sigma, x)
        log_p, log_q = densities
        exponent = alpha * log_p + (1 - alpha) * log_q
        highest = float(exponent.max())
        if highest < 100:
            moment = math.log1p(step * float(np.sum(_beyond_one(log_p, log_q, alpha, exponent))))
        else:
            moment = highest + math.log(step * float(np.sum(np.exp(exponent - highest))))
            moment += alpha * float(_rounding(log_p, log_q)[exponent.argmax()])
        found.append(max(0.0, moment))
    return np.array(found)


def _rounding(log_p: Vector, log_q: Vector) -> Vector:
    """Bound of the rounding error of either logarithm, and of their difference."""
    return 4 * np.finfo(np.float64).eps * (1 + np.abs(log_p) + np.abs(log_q))


def _beyond_one(log_p: Vector, log_q: Vector, alpha: float, exponent: Vector) -> Vector:
    """``P^alpha Q^(1 - alpha) - Q - alpha (P - Q)``, >= 0, whose integral is the moment less 1; rounded up.

    Where P and Q are nearly the same, that is a difference of numbers that are nearly the same: there it is computed
    from the logarithm of their ratio.
    """
    p, q, moved = np.exp(log_p), np.exp(log_q), np.exp(exponent)
    loss = np.minimum(log_p - log_q, 1 / alpha)
    value = np.where(
        loss < 1 / alpha,
        q * (np.expm1(alpha * loss) - alpha * np.expm1(loss)),
        moved - q - alpha * (p - q),
    )
    # By the derivative in the loss, and the relative error of the density.
    return np.asarray(value + _rounding(log_p, log_q) * (alpha * np.abs(moved - p) + np.abs(value)))


def _log_density(means: Sequence[float], probabilities: Sequence[float], sigma: float, x: Vector) -> Vector:
    total: Any = None
    for mean, probability in zip(means, probabilities, strict=True):
        if probability > 0:
            part = math.log(probability) - ((x - mean) / sigma) ** 2 / 2
            total = part if total is None else np.logaddexp(total, part)
    return np.asarray(total) - math.log(sigma * math.sqrt(2 * math.pi))


def of_mixture(
    sensitivities: Sequence[float], probabilities: Sequence[float], sigma: float, orders: Sequence[float]
) -> Vector:
    """RDP of N(0, sigma^2) and the mixture of N(s, sigma^2), in both directions."""
    return _of_pair((sensitivities, probabilities), ((0.0,), (1.0,)), sigma, orders) / (np.asarray(orders) - 1)


def _of_pair(one: Gaussians, other: Gaussians, sigma: float, orders: Sequence[float]) -> Vector:
    return np.maximum(log_moments(one, other, sigma, orders), log_moments(other, one, sigma, orders))


def of_truncated(mechanism: Mechanism, orders: Sequence[float]) -> Vector:
    """RDP of ``truncated_poisson``: for N and N + 1 examples, as the neighbour has one more or one less."""
    rate, sigma, n = mechanism.sample_rate, mechanism.noise_multiplier, mechanism.dataset_size
    assert rate is not None and n is not None
    whole = _of_pair(((0.0, 1.0), (1 - rate, rate)), ((0.0,), (1.0,)), sigma, orders)
    found = [_of_truncated(mechanism, whole, n + extra, orders) for extra in (0, 1)]
    return np.maximum(*found) / (np.asarray(orders) - 1)


def _of_truncated(mechanism: Mechanism, whole: Vector, n: int, orders: Sequence[float]) -> Vector:
    rate, most, sigma = mechanism.sample_rate, mechanism.max_batch_size, mechanism.noise_multiplier
    assert rate is not None and most is not None
    binom = _import("scipy.stats").binom
    cut = float(binom.sf(most - 1, n - 1, rate))  # that the batch is cut, where the example is drawn
    if cut == 0:
        return whole
    drawn = float(binom.sf(most, n, rate)) * most / cut / n  # that the example is drawn, where it is cut
    replaced = log_moments(((0.0, 2.0), (1 - drawn, drawn)), ((0.0, -2.0), (1 - drawn, drawn)), sigma, orders)
    small = np.minimum(whole, 30.0), np.minimum(replaced, 30.0)
    exact = np.log1p(cut * np.expm1(small[1]) + (1 - cut) * np.expm1(small[0]))  # exact where both are below 30
    large = np.logaddexp(math.log(cut) + replaced, (math.log1p(-cut) if cut < 1 else -math.inf) + whole)
    return np.where(np.maximum(whole, replaced) < 30, exact, large)
