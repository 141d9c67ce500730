"""How much likelier a canary's releases are with it than without, under each sampler; no code of dpft.

``rows``: ``[canaries, steps]``, for each canary its coordinate of the released sums, in units in which the noise is
N(0, 1) and independent over the steps. What one participation adds is ``shift`` or, where noise was correlated, the
participation's column of C times ``shift``.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]


def poisson(rows: Numbers, shift: float, rate: float) -> Numbers:
    """Each step with probability ``rate``: the sum over the steps of log(1 - q + q exp(...)), ``[canaries]``."""
    with_it = np.exp(np.minimum(rows * shift - shift**2 / 2, 600))
    return np.log1p(rate * (with_it - 1)).sum(axis=1)


def balls_and_bins(rows: Numbers, shift: float, batches: int) -> Numbers:
    """One unknown step of each epoch: the log of the mean over its steps, summed over the epochs."""
    canaries, steps = rows.shape
    exponents = (rows * shift - shift**2 / 2).reshape(canaries, steps // batches, batches)
    largest = exponents.max(axis=2, keepdims=True)
    return (largest[:, :, 0] + np.log(np.exp(exponents - largest).mean(axis=2))).sum(axis=1)


def binomial(rows: Numbers, shift: float, rate: float, count: int) -> Numbers:
    """``count`` rows of a user, each with probability ``rate`` at each step: a mixture of Gaussians."""
    from scipy.stats import binom

    terms = [
        binom.pmf(j, count, rate) * np.exp(np.minimum(rows * (j * shift) - (j * shift) ** 2 / 2, 600))
        for j in range(count + 1)
    ]
    return np.log(np.sum(terms, axis=0)).sum(axis=1)


def cyclic(
    rows: Numbers, shift: float, rate: float, groups: npt.NDArray[np.int64], matrix: Numbers, cycle: int
) -> Numbers:
    """The steps of a canary's group, each with probability ``rate``; a participation adds its column of C.

    Columns of one canary do not overlap, so that the participations are independent of each other.
    """
    squares = np.square(matrix).sum(axis=0)
    projected = rows @ matrix  # onto each column
    terms = np.log1p(rate * (np.exp(np.minimum(projected * shift - squares * shift**2 / 2, 600)) - 1))
    steps = np.arange(rows.shape[1])
    return np.where(steps[None, :] % cycle == groups[:, None], terms, 0.0).sum(axis=1)


def known_steps(rows: Numbers, shift: float, taking_part: Numbers, matrix: Numbers) -> Numbers:
    """Participations ``[canaries, steps]`` that the attacker knows: the projection onto what they add."""
    mean = taking_part @ matrix.T * shift
    return (rows * mean).sum(axis=1) - np.square(mean).sum(axis=1) / 2
