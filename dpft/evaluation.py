"""Figures of a validation set that may be published, and a private signal to stop training.

A validation loss or accuracy is a function of people's records, like a gradient: a published figure, a best checkpoint
or a stop that follows from it reveals something of them. Here each record's value is clipped to a range that does not
depend on the data, and noise is added to the sum; the account of the validation records pays before.

Protected are the records **whose values are given**, at the account's adjacency and unit, whether or not they are
training records too. Validation people who are not training people have an account of their own, or share one, which
then counts both uses for everybody.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from dpft.errors import BudgetExceededError, PrivacyConfigError
from dpft.noise import GaussianNoise
from dpft.privacy.account.account import Payer
from dpft.privacy.account.events import Protects, PureRelease
from dpft.privacy.accounting.calibration import calibrate_noise_multiplier
from dpft.privacy.mechanism import Mechanism

NOISE = (
    "cryptographic (ChaCha20, RFC 8439): a discrete Gaussian on a grid of 2^-25 of its standard deviation, to which "
    "the sum is rounded, larger by what rounding adds to the sensitivity"
)


@dataclass(frozen=True)
class PrivateMean:
    """A noisy mean; all of it may be published.

    Attributes:
        value: the mean of the clipped values, plus noise. It is not cut to the range.
        standard_error: standard deviation of the noise in ``value``; the error of sampling is extra. A little more
            than the noise multiplier says, for the rounding to the noise's grid.
        low: the values were clipped to [low, high].
        high: see ``low``.
        size: the number by which the sum was divided.
        noise_multiplier: noise over half the range times the largest number of records of one unit.
        mechanism: what the account paid for.
        paid: the name of the use in the account.
        what: the figure, in words.
    """

    value: float
    standard_error: float
    low: float
    high: float
    size: int
    noise_multiplier: float
    mechanism: Mechanism
    paid: str
    what: str

    def statement(self) -> str:
        """One line for a model card."""
        return (
            f"{self.what}: {self.value:.4g}, with noise of standard deviation {self.standard_error:.3g}; the mean "
            f"over {self.size} records of values clipped to [{self.low:g}, {self.high:g}]; Gaussian mechanism, noise "
            f"multiplier {self.noise_multiplier:.4g}, under {self.mechanism.adjacency}, unit {self.mechanism.unit}; "
            f"the number of records is public; noise: {NOISE}."
        )


def private_mean(
    values: Iterable[float] | torch.Tensor,
    *,
    low: float,
    high: float,
    account: Payer,
    noise_multiplier: float | None = None,
    epsilon: float | None = None,
    size: int | None = None,
    what: str = "validation mean",
) -> PrivateMean:
    """The mean of a value per record, such as a loss or whether an answer was right, with noise: it may be published.

    One record changes the sum of ``value - (low + high) / 2`` by at most half the range, and by the whole range where
    it is replaced by another; NaN counts as the middle of the range, and so contributes nothing.

    Call it in one process, with the values of all records: each call is a release of its own.

    Args:
        values: one for each record, in any order.
        low: values below are raised to it. Choose both bounds without looking at the values.
        high: values above are lowered to it.
        account: of the records whose values these are; it pays before the noise is drawn.
        noise_multiplier: standard deviation of the noise on the sum over half the range. Give it or ``epsilon``.
        epsilon: of this query alone, at the account's delta; the noise is calibrated to it.
        size: the public number of records by which the sum is divided; None: ``len(values)``, which is then public.
        what: the figure, in words, for the account.

    Returns:
        The noisy mean.

    Raises:
        PrivacyConfigError: a bound, the noise or the size out of range.
        BudgetExceededError: the account does not cover it; nothing is released.
        AccountingError: no theorem, under the account's adjacency and unit.
    """
    middle, half = _range(low, high)
    total, count = _clipped_sum(values, middle, half)
    divisor = _divisor(size, count)
    mechanism = _reads_all(account.protects, divisor)
    if (noise_multiplier is None) == (epsilon is None):
        raise PrivacyConfigError(
            f"noise_multiplier={noise_multiplier!r} and epsilon={epsilon!r} of a private mean; give exactly one."
        )
    if noise_multiplier is None:
        assert epsilon is not None
        accountant = "rdp" if mechanism.sampler == "fixed_size" else "pld"
        noise_multiplier = calibrate_noise_multiplier(mechanism, 1, epsilon, account.delta, accountant=accountant)  # type: ignore[arg-type]  # one of the two names
    if not (math.isfinite(noise_multiplier) and noise_multiplier > 0):
        raise PrivacyConfigError(f"noise_multiplier={noise_multiplier!r} of a private mean; expected a number > 0.")
    mechanism = mechanism.with_noise(float(noise_multiplier))
    noise = GaussianNoise(secure=True)
    std = noise.for_release(noise_multiplier * half, half, 1)
    paid = account.spend([(mechanism, 1)], what)
    noisy = float(noise.add_(torch.tensor([total], dtype=torch.float64), std))
    return PrivateMean(
        value=middle + noisy / divisor,
        standard_error=std / divisor,
        low=float(low),
        high=float(high),
        size=divisor,
        noise_multiplier=float(noise_multiplier),
        mechanism=mechanism,
        paid=paid,
        what=what,
    )


class EarlyStop:
    """Says once, privately, that the mean of a value per record has reached a threshold; asking until then is free.

    AboveThreshold: Dwork and Roth 2014 (The Algorithmic Foundations of Differential Privacy): epsilon-DP however many
    times it answers "not yet". ``epsilon`` is paid when it is made, whether or not it ever says yes. Only the
    answers are private: do not publish or act on the values themselves.

    To stop when a loss no longer falls, give each record's loss less its loss at the last evaluation, with ``low=-1``,
    ``high=1`` and a threshold just below 0: the mean reaches it when the loss falls by less.

    Args:
        threshold: of the mean.
        low: values below are raised to it. Choose both bounds without looking at the values.
        high: values above are lowered to it.
        size: the public number of records.
        epsilon: of all answers together, > 0.
        account: of the records whose values are given.
        what: the question, in words, for the account.

    Raises:
        PrivacyConfigError: a value out of range.
        BudgetExceededError: the account does not cover it.
    """

    def __init__(
        self,
        *,
        threshold: float,
        low: float,
        high: float,
        size: int,
        epsilon: float,
        account: Payer,
        what: str = "early stopping",
    ) -> None:
        self._middle, self._half = _range(low, high)
        if not math.isfinite(threshold):
            raise PrivacyConfigError(f"threshold={threshold!r} of early stopping; expected a finite number.")
        self._size = _divisor(size, size)
        release = PureRelease(float(epsilon))
        # Laplace noise in float64 is safe here: only comparisons with it are released, never a sum that contains it.
        self._random = random.SystemRandom()
        sensitivity = self._half * _most_of_one_unit(account.protects) / self._size
        self._scale = 2 * sensitivity / release.epsilon
        self.paid = account.spend([(release, 1)], what)
        # Secret, and the same for all questions: with a fresh one for each, the answers would cost more.
        self._threshold = threshold + self._laplace(self._scale)
        self.stopped = False

    def __call__(self, values: Iterable[float] | torch.Tensor) -> bool:
        """Whether the mean has reached the threshold, up to noise.

        Raises:
            BudgetExceededError: it has said yes before; a new one must be paid for.
        """
        if self.stopped:
            raise BudgetExceededError(
                "early stopping has said stop, and its epsilon is spent; make another EarlyStop to ask again."
            )
        total, _ = _clipped_sum(values, self._middle, self._half)
        mean = self._middle + total / self._size
        self.stopped = mean + self._laplace(2 * self._scale) >= self._threshold
        return self.stopped

    def _laplace(self, scale: float) -> float:
        return scale * (self._random.expovariate(1.0) - self._random.expovariate(1.0))

    def __reduce__(self) -> Any:
        # A copy would answer a second time under the same noisy threshold.
        raise TypeError("EarlyStop cannot be copied or pickled; after a restart, make another, which is paid for anew")


def _range(low: float, high: float) -> tuple[float, float]:
    """Middle and half width."""
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise PrivacyConfigError(f"low={low!r} and high={high!r}; expected two finite numbers, the first one smaller.")
    return (low + high) / 2, (high - low) / 2


def _divisor(size: int | None, count: int) -> int:
    divisor: Any = count if size is None else size
    if isinstance(divisor, bool) or not isinstance(divisor, int) or divisor < 1:
        raise PrivacyConfigError(f"size={divisor!r} of a validation set; expected a whole number >= 1.")
    return int(divisor)


def _clipped_sum(values: Iterable[float] | torch.Tensor, middle: float, half: float) -> tuple[float, int]:
    """The sum of the values less the middle, each in [-half, half], rounded once; and their number."""
    every = values.detach().flatten().tolist() if isinstance(values, torch.Tensor) else [float(v) for v in values]
    clipped = [0.0 if math.isnan(v) else min(half, max(-half, v - middle)) for v in every]
    return math.fsum(clipped), len(clipped)


def _reads_all(protects: Protects, size: int) -> Mechanism:
    """A Gaussian release of a sum over all records, each at most 1, with noise multiplier 1."""
    if protects.adjacency == "replace_one":  # its sensitivity of 2 is the theorem's
        return Mechanism(sampler="fixed_size", noise_multiplier=1.0, batch_size=size, dataset_size=size)
    return Mechanism(
        sampler="poisson",
        noise_multiplier=1.0,
        sample_rate=1.0,
        unit=protects.unit,
        examples_per_user=protects.examples_per_user,
    )


def _most_of_one_unit(protects: Protects) -> int:
    """By how many half ranges one unit changes a sum: its records, twice that where a record is replaced."""
    return (protects.examples_per_user or 1) * (2 if protects.adjacency == "replace_one" else 1)
