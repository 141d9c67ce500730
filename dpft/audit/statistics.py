"""Bounds and tests of an audit: what a number of right and wrong guesses proves about epsilon, and p-values.

Everything here is plain statistics of counts and samples. It imports nothing of what is audited.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dpft.errors import MissingPackageError

Samples = npt.NDArray[np.float64]

# An audit of a sound mechanism fails with at most this probability, over all of its tests together, and again for the
# bound of epsilon: once in 5,000 audits.
FALSE_ALARM = 1e-4
CONFIDENCE = 0.95  # of the bound that is reported

# Where the sorted scores are cut into "in" and "out", in units of what a member adds. Fixed before the data are seen:
# the bound below pays for their number.
THRESHOLDS = (0.0, 0.25, 0.5, 0.75, 1.0)


def _scipy() -> Any:
    try:
        import scipy.stats
    except ImportError as error:
        raise MissingPackageError("an audit needs scipy, which is not installed: pip install scipy") from error
    return scipy.stats


def proportion_bounds(successes: int, trials: int, confidence: float) -> tuple[float, float]:
    """Exact bounds of a probability, each of them violated with probability at most ``1 - confidence``.

    Args:
        successes: out of ``trials``.
        trials: independent ones.
        confidence: of each bound by itself.

    Returns:
        Lower and upper bound (Clopper & Pearson 1934); (0, 1) without trials.
    """
    if trials == 0:
        return 0.0, 1.0
    beta, alpha = _scipy().beta, 1.0 - confidence
    lower = 0.0 if successes == 0 else float(beta.ppf(alpha, successes, trials - successes + 1))
    upper = 1.0 if successes == trials else float(beta.ppf(1.0 - alpha, successes + 1, trials - successes))
    return lower, upper


def gaussian_mu_lower(outside: Samples, inside: Samples, confidence: float) -> float:
    """Lower bound of the mu for which one release is mu-GDP, from the scores of an attacker.

    For a mechanism that is mu-GDP no attack has a false positive rate alpha and a false negative rate beta with
    ``Phi^-1(1 - alpha) - Phi^-1(beta) > mu`` (Dong, Roth & Su 2019, arXiv 1905.02383). The rates are replaced by their
    Clopper-Pearson upper bounds, at each of :data:`THRESHOLDS` with its share of the error (Nasr et al. 2023,
    arXiv 2302.07956).

    Args:
        outside: scores of releases without the canary, independent; 0 is what is expected.
        inside: scores of releases with it; 1 is what is expected.
        confidence: that the bound is below the true mu.

    Returns:
        mu >= 0.
    """
    normal = _scipy().norm
    share = 1.0 - (1.0 - confidence) / (2 * len(THRESHOLDS))
    best = 0.0
    for threshold in THRESHOLDS:
        positive = proportion_bounds(int((outside > threshold).sum()), len(outside), share)[1]
        negative = proportion_bounds(int((inside <= threshold).sum()), len(inside), share)[1]
        if positive < 1.0 and negative < 1.0:
            best = max(best, float(normal.isf(positive) - normal.ppf(negative)))
    return best


def one_run_epsilon(canaries: int, guesses: int, right: int, delta: float, confidence: float) -> float:
    """Lower bound of epsilon from the guesses of one training (Steinke, Nasr & Jagielski 2023, arXiv 2305.08846).

    Args:
        canaries: m, each included or not by its own fair coin.
        guesses: r of them for which membership was guessed; the others were passed over.
        right: v of the guesses that are right.
        delta: of the claim.
        confidence: that the bound is below the true epsilon.

    Returns:
        epsilon >= 0; inf is never returned, since m is finite.

    Raises:
        ValueError: not ``0 <= right <= guesses <= canaries``.
    """
    if not 0 <= right <= guesses <= canaries:
        raise ValueError(
            f"{right} right of {guesses} guesses of {canaries} canaries; expected right <= guesses <= all"
        )
    binom, significance = _scipy().binom, 1.0 - confidence

    def p_value(epsilon: float) -> float:
        """Theorem 5.2 there: that an (epsilon, delta)-DP training lets so many guesses be right."""
        chance = 1.0 / (1.0 + math.exp(-epsilon))
        tail = float(binom.sf(right - 1, guesses, chance))
        below = np.cumsum(binom.pmf(right - np.arange(1, right + 1), guesses, chance))
        alpha = float((below / np.arange(1, right + 1)).max(initial=0.0))
        return tail + alpha * 2.0 * canaries * delta

    if p_value(0.0) > significance:
        return 0.0
    low, high = 0.0, 1.0
    while high < 64.0 and p_value(high) < significance:
        low, high = high, 2.0 * high
    for _ in range(40):
        middle = (low + high) / 2.0
        low, high = (middle, high) if p_value(middle) < significance else (low, middle)
    return low


@dataclass(frozen=True)
class Check:
    """One test of what is claimed.

    Attributes:
        name: of the test.
        claim: what holds if the mechanism is the claimed one.
        expected: value of the statistic under the claim.
        found: its value.
        p_value: probability of a value at least so far from the expected one under the claim, corrected for the number
            of comparisons that the test makes.
    """

    name: str
    claim: str
    expected: float
    found: float
    p_value: float


def variance_p_value(sum_of_squares: float, degrees: float) -> float:
    """Two-sided: a sum of squares of ``degrees`` independent N(0, 1), or further from what is expected."""
    chi2 = _scipy().chi2
    return float(min(1.0, 2.0 * min(chi2.cdf(sum_of_squares, degrees), chi2.sf(sum_of_squares, degrees))))


def normal_p_value(z: float) -> float:
    """Two-sided: N(0, 1) at least as far from 0 as ``z``."""
    return float(2.0 * _scipy().norm.sf(abs(z)))


def normality_p_value(values: Samples) -> tuple[float, float]:
    """Kolmogorov-Smirnov distance of ``values`` from N(0, 1), and its p-value."""
    found = _scipy().kstest(values, "norm")
    return float(found.statistic), float(found.pvalue)


def correlation_p_value(series: Samples) -> tuple[float, float]:
    """Largest correlation between two of ``series`` ``[T, d]``, and its p-value over all pairs.

    For independent rows of N(0, 1) the correlation of two is N(0, 1 / d) to the precision that matters here.
    """
    rows, width = series.shape
    if rows < 2:
        return 0.0, 1.0
    normed = series / np.linalg.norm(series, axis=1, keepdims=True).clip(1e-300)
    correlations = normed @ normed.T
    np.fill_diagonal(correlations, 0.0)
    largest = float(np.abs(correlations).max())
    return largest, min(1.0, normal_p_value(largest * math.sqrt(width)) * rows * (rows - 1) / 2)


def against_simulation(
    found: Sequence[float], simulate: Callable[[np.random.Generator], Sequence[float]], runs: int = 400
) -> list[tuple[float, float]]:
    """What each statistic is on average in simulations of the claim, and the p-value of the value found.

    The p-value is that of a normal distribution with the simulated mean and deviation. A statistic that is the same
    in all simulations has p-value 0 if another value was found.
    """
    rng = np.random.default_rng(0)
    simulated = np.array([simulate(rng) for _ in range(runs)])
    answers = []
    for value, column in zip(found, simulated.T, strict=True):
        mean, deviation = float(column.mean()), float(column.std(ddof=1))
        if deviation < 1e-12 * max(1.0, abs(mean)):
            answers.append((mean, float(abs(value - mean) <= 1e-9 * max(1.0, abs(mean)))))
        else:
            answers.append((mean, normal_p_value((value - mean) / deviation)))
    return answers
