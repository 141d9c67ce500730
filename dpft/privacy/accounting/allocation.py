"""The privacy loss of an epoch in which each example is in one batch, drawn at random: balls and bins.

**What is computed.** Of T batches of an epoch, an example is in one, uniformly, independently of the others; each
release has noise of standard deviation sigma C. Let Q be the law of the epoch's releases where the example's gradient
is zero, P where it is not. Then ``P / Q = (1 / T) sum_t exp((<v_t, y_t - m_t> - |v_t|^2 / 2) / sigma^2)``, m_t the
mean of release t without the example and v_t its clipped gradient over C; both may depend on the earlier releases.

*Worst case.* The hockey-stick divergence, in both directions, is the mean under Q of a convex function of P / Q.
Given the past, the exponential of step t has mean 1 and grows in the convex order with ``|v_t| <= 1``. Going backwards
from the last step, the divergence is therefore largest where all ``|v_t| = 1``, and then P / Q is
``L = (Y_1 + ... + Y_T) / T`` with independent ``Y_t = exp(z_t / sigma - 1 / (2 sigma^2))``, z_t standard normal. That
is the pair of Chua et al. 2024 (arXiv 2412.16802), N(0, sigma^2 I) and the mixture of N(e_t, sigma^2 I). Divergences
that dominate for one epoch, whatever came before it, do so for the composition (Zhu, Dong, Wang 2022, Theorem 10).

*An upper bound.* A value is replaced by its two neighbours on a grid, with weights that keep the mean. That is larger
in the convex order, and stays so when independent values are added: each divergence can only grow. The grid is
geometric, so that tails keep their relative precision; sums are formed by doubling. Feldman and Shenfeld 2026 (arXiv
2602.17284) compute the same distribution on a geometric grid, with bounds of another kind.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dpft.privacy.packages import import_package as late

Floats = npt.NDArray[np.floating[Any]]

_REACH = 9.5  # deviations of z beyond which a mass (2e-21) is counted as an infinite loss
_FINENESS = 16  # points of the grid in a standard deviation of the loss
_MOST_POINTS = 1 << 14
_NEGLIGIBLE = 1e-19  # masses at the two ends below this are counted as infinite losses
_LEAST_SIGMA = 0.05  # below it exponentials of losses leave the range of float64


class Law(NamedTuple):
    """Probabilities ``mass[i]`` of the values ``exp(step * (low + i))``; what is missing to 1 was cut off."""

    step: float
    low: int
    mass: Floats

    @property
    def logs(self) -> Floats:
        """The logarithms of the values."""
        return self.step * (self.low + np.arange(len(self.mass)))

    def refined(self) -> Law:
        """The same on a grid of half the step."""
        mass = np.zeros(2 * len(self.mass) - 1)
        mass[::2] = self.mass
        return Law(self.step / 2, 2 * self.low, mass)

    def trimmed(self) -> Law:
        """Without what is negligible at the low end by its mass, and at the high end by its share of the mean."""
        low = int(np.searchsorted(np.cumsum(self.mass), _NEGLIGIBLE))
        share = np.cumsum((self.mass * np.exp(self.logs - self.logs[-1]))[::-1])
        high = len(self.mass) - int(np.searchsorted(share, share[-1] * _NEGLIGIBLE))
        return Law(self.step, self.low + low, self.mass[low:high])


def deviation(sigma: float, batches: int) -> float:
    """Standard deviation of L, at most 1 / sigma, that of a loss with one batch."""
    return min(math.sqrt(math.expm1(min(1 / sigma**2, 700.0)) / batches), 1 / sigma)


def one_batch(sigma: float, step: float) -> Law:
    """Y on a grid, spread so that the mean stays 1, and cut at ``_REACH`` deviations under Q and under P."""
    ndtr = late("scipy.special").ndtr
    low = math.floor((-_REACH / sigma - 1 / (2 * sigma**2)) / step)
    high = math.ceil((_REACH / sigma + 1 / (2 * sigma**2)) / step)
    edges = step * np.arange(low, high + 1)
    z = sigma * edges + 1 / (2 * sigma)

    def between(z: Floats) -> Floats:
        upper = z[:-1] > 0  # the tail that is smaller, so that the difference is precise
        return np.where(upper, ndtr(-z[:-1]) - ndtr(-z[1:]), ndtr(z[1:]) - ndtr(z[:-1]))

    mass, mean = between(z), between(z - 1 / sigma) * np.exp(-edges[:-1])  # the mean in units of the lower edge
    above = np.clip((mean - mass) / math.expm1(step), 0.0, mass)
    spread = np.zeros(len(edges))
    spread[:-1] += mass - above
    spread[1:] += above
    return Law(step, low, spread)


def added(a: Law, b: Law) -> Law:
    """The law of the sum of two independent values on grids of one step, spread over the grid again."""
    assert a.step == b.step
    if len(a.mass) < len(b.mass):
        a, b = b, a
    low, high = min(a.low, b.low), max(a.low + len(a.mass), b.low + len(b.mass))
    out = np.zeros(high - low + math.ceil(math.log(2) / a.step) + 2)
    first, last = b.low - (a.low + len(a.mass) - 1), b.low + len(b.mass) - 1 - a.low
    for lag in range(first, last + 1):  # the second value is exp(step lag) times the first
        start, stop = max(a.low, b.low - lag), min(a.low + len(a.mass), b.low + len(b.mass) - lag)
        product = a.mass[start - a.low : stop - a.low] * b.mass[start + lag - b.low : stop + lag - b.low]
        smaller = math.exp(-a.step * abs(lag))
        base = math.floor(math.log1p(smaller) / a.step)
        # Between the grid's values exp(step base) and exp(step (base + 1)), in units of the larger summand.
        part = (smaller - math.expm1(a.step * base)) / (math.exp(a.step * base) * math.expm1(a.step))
        part = min(max(part, 0.0), 1.0)
        at = start + max(lag, 0) + base - low
        above = product * part
        out[at : at + len(product)] += product - above
        out[at + 1 : at + 1 + len(product)] += above
    return Law(a.step, low, out).trimmed()


@functools.lru_cache(maxsize=16)
def likelihood_ratio(sigma: float, batches: int) -> Law:
    """The law under Q of ``T L = Y_1 + ... + Y_T``, spread over a grid.

    Grids are coarser for sums of fewer values, whose errors average out: 2^l values take a step of the order of
    ``sqrt(T / 2^l)`` times the last one.
    """
    last = deviation(sigma, batches) / _FINENESS
    widest = (2 * _REACH / sigma + 1 / sigma**2) / _MOST_POINTS
    last = max(last, widest)
    halvings = min(math.floor(math.log2(batches) / 2), max(0, math.floor(math.log2(2.0 / (_FINENESS * sigma * last)))))
    power, total, count = one_batch(sigma, last * 2**halvings).trimmed(), None, 1
    left = batches
    while True:
        if left & 1:
            if total is not None:
                while total.step > power.step:
                    total = total.refined()
                total = added(total, power)
            else:
                total = power
        left >>= 1
        if not left:
            break
        power, count = added(power, power), 2 * count
        while power.step > last * math.sqrt(batches / count) * 1.001 and power.step > last * 1.001:
            power = power.refined()
    assert total is not None
    return total


def epoch_pld(sigma: float, batches: int, interval: float) -> Any:
    """The privacy loss distribution of one epoch, in both directions, as dp_accounting's.

    With a sigma below 0.05, where no draw hides anything, that of the Gaussian mechanism: whoever is told the batch
    besides, which does not depend on the gradients, learns as much as from that.

    Args:
        sigma: noise multiplier, > 0.
        batches: T >= 1.
        interval: of the losses' grid, to which each atom is moved by the same spreading (connect the dots).
    """
    distributions = late("dp_accounting.pld.privacy_loss_distribution")
    if sigma < _LEAST_SIGMA:
        return distributions.from_gaussian_mechanism(sigma, value_discretization_interval=interval)
    law = likelihood_ratio(sigma, batches)
    loss = law.logs - math.log(batches)
    with_example = law.mass * np.exp(loss)
    pmf = late("dp_accounting.pld.pld_pmf")
    removed = _on_grid(loss, with_example, interval)
    added_ = _on_grid(-loss[::-1], law.mass[::-1], interval)
    # What was trimmed is too little to be found as the difference to 1, as are the errors of that difference.
    cut = 1e-15 + 4 * batches * _NEGLIGIBLE
    return distributions.PrivacyLossDistribution(
        *(
            pmf.DensePLDPmf(interval, low, mass, max(0.0, 1.0 - float(mass.sum())) + cut, pessimistic_estimate=True)
            for low, mass in (removed, added_)
        )
    )


def _on_grid(loss: Floats, mass: Floats, interval: float) -> tuple[int, Floats]:
    """Atoms at ascending losses, spread over multiples of the interval so that both laws keep their mass."""
    below = np.floor(loss / interval).astype(np.int64)
    above = mass * np.clip(np.expm1(-(loss - below * interval)) / math.expm1(-interval), 0.0, 1.0)
    low = int(below[0])
    out = np.zeros(int(below[-1]) - low + 2)
    np.add.at(out, below - low, mass - above)
    np.add.at(out, below - low + 1, above)
    return low, out
