"""Noise on one whole number, drawn in integer arithmetic: for figures, counts and answers that are published.

A value is first made a whole number of steps, so that what one person changes is a whole number of steps, too; then a
random whole number is added. No floating-point number enters the noise or the sum, so that the results that can occur
do not depend on the data (Mironov 2012), and each has the probability that the proof assumes.

- :class:`GridGaussian`: the Gaussian mechanism, by the sampler of :mod:`dpft.secure_noise` (``docs/design.md``,
  section 4, has its law). A draw has a standard deviation of ``STD`` steps. With a noise multiplier z one unit of
  sensitivity is made ``D = floor(STD / z)`` steps, so that the noise over the sensitivity is at least z.
- :func:`discrete_laplace`: epsilon-DP. P(x) is proportional to exp(-|x| / scale); between two sums that differ by at
  most D steps the probabilities of a result differ by a factor exp(D / scale) at most. Exact, from random bits of the
  operating system: Canonne, Kamath, Steinke 2020 (arXiv 2004.00010), Algorithm 2.
"""

from __future__ import annotations

import math
import secrets
from fractions import Fraction

import numpy as np

from dpft.secure_noise import STD, SecureNoise

SOURCE = "a discrete Gaussian on a grid, drawn in integer arithmetic from ChaCha20 with a key of the operating system"
LARGEST_MULTIPLIER = math.floor(STD)
_LARGEST = 1 << 44  # steps of one value: far below where float64 has no whole numbers any more


class GridGaussian:
    """The Gaussian mechanism on sums of values that are whole numbers of steps.

    Args:
        noise_multiplier: of the noise over one unit of sensitivity, > 0.

    Attributes:
        steps: D, of one unit of sensitivity.
        std: of the noise, in units of sensitivity: ``noise_multiplier``, or a little more.

    Raises:
        ValueError: a multiplier for which a unit would be less than a step.
    """

    def __init__(self, noise_multiplier: float) -> None:
        # Less the rounding of the quotient and of STD.
        steps = min(_LARGEST, math.floor(STD / noise_multiplier * (1 - 2.0**-40)))
        if steps < 1:
            raise ValueError(
                f"noise multiplier {noise_multiplier:g} is above {LARGEST_MULTIPLIER}; take a smaller one"
            )
        self.steps, self.std = steps, STD / steps
        self._source = SecureNoise()  # before anything is paid for: cryptography may not be installed

    def round(self, values: np.ndarray) -> int:
        """The sum of values, each first rounded to whole steps; of those in [-1, 1] each is at most D of them."""
        return sum(int(step) for step in np.rint(np.asarray(values, np.float64) * self.steps))

    def noised(self, total: int) -> float:
        """``total`` steps and a draw, in units of sensitivity."""
        return (total + int(self._source.draw(1)[0])) / self.steps


def discrete_laplace(scale: Fraction) -> int:
    """A draw with P(x) proportional to ``exp(-|x| / scale)``.

    Args:
        scale: > 0.
    """
    top, bottom = scale.numerator, scale.denominator
    while True:
        rest = secrets.randbelow(top)
        if not _coin(Fraction(rest, top)):
            continue
        turns = 0
        while _coin(Fraction(1)):
            turns += 1
        size, negative = (rest + top * turns) // bottom, secrets.randbelow(2)
        if size or not negative:  # 0 once, not twice
            return -size if negative else size


def _coin(exponent: Fraction) -> bool:
    """True with probability ``exp(-exponent)``, exponent in [0, 1]: its series, as a race of coins (Algorithm 1)."""
    number = 1
    while secrets.randbelow(exponent.denominator * number) < exponent.numerator:
        number += 1
    return number % 2 == 1
