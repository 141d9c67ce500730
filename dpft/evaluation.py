"""Figures of records that may be published: means, counts, and a private signal to stop training.

A validation loss or accuracy is a function of people's records, like a gradient: a published figure, a best checkpoint
or a stop that follows from it reveals something of them. Here each record's value is clipped to a range that does not
depend on the data, and noise is added to the sum; the account of the validation records pays before. Values and noise
are whole numbers of small steps (:mod:`dpft.scalar_noise`): the guarantee holds for the numbers that a computer adds.

Protected are the records **whose values are given**, at the account's adjacency and unit, whether or not they are
training records too. Validation people who are not training people have an account of their own, or share one, which
then counts both uses for everybody.
"""

from __future__ import annotations

import math
import os
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from dpft.errors import BudgetExceededError, PrivacyConfigError
from dpft.privacy.account.events import Protects, PureRelease, check_item, in_words
from dpft.privacy.account.payer import Payer
from dpft.privacy.accounting.calibration import calibrate_noise_multiplier
from dpft.privacy.mechanism import Mechanism, UnitName
from dpft.scalar_noise import LARGEST_MULTIPLIER, SOURCE, GridGaussian, discrete_laplace

# Of early stopping's Laplace noise on its threshold, in steps. A value has at most 350 times as many, since epsilon is
# at most 700: less than 2^49, where float64 still has whole numbers.
_SCALE = 1 << 40


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
        noise_multiplier: of the noise over half the range.
        mechanism: what the account paid for.
        paid: the name of the use in the account.
        what: the figure, in words.
        unit: whom the figure protects, in words.
        item: what the values are of: ``example`` (a record) or ``user``.
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
    unit: str = "example"
    item: UnitName = "example"

    def statement(self) -> str:
        """One line for a model card."""
        of = "users" if self.item == "user" else "records"
        return (
            f"{self.what}: {self.value:.4g}, with noise of standard deviation {self.standard_error:.3g}; the mean "
            f"over {self.size} {of} of values clipped to [{self.low:g}, {self.high:g}]; Gaussian mechanism, noise "
            f"multiplier {self.noise_multiplier:.4g}, under {self.mechanism.adjacency}, unit {self.unit}; "
            f"the number of {of} is public; noise: {SOURCE}."
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
    item: UnitName = "example",
) -> PrivateMean:
    """The mean of a value per record, such as a loss or whether an answer was right, with noise: it may be published.

    One record changes the sum of ``value - (low + high) / 2`` by at most half the range, and by the whole range where
    it is replaced by another; NaN counts as the middle of the range, and so contributes nothing. Each value is rounded
    to whole steps of a grid, on which the noise is drawn too: 2^-26 of the noise of the sum at most.

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
        item: of what the values are: of records (``example``), or of a ``user`` each, from all records of one.

    Returns:
        The noisy mean.

    Raises:
        PrivacyConfigError: a bound, the noise, the size or the item out of range.
        BudgetExceededError: the account does not cover it; nothing is released.
        AccountingError: no theorem, under the account's adjacency and unit.
    """
    middle, half = _range(low, high)
    clipped = _clipped(values, middle, half)
    divisor = _divisor(size, len(clipped))
    mechanism = _reads_all(account.protects, divisor, item)
    if (noise_multiplier is None) == (epsilon is None):
        raise PrivacyConfigError(
            f"noise_multiplier={noise_multiplier!r} and epsilon={epsilon!r} of a private mean; give exactly one."
        )
    if noise_multiplier is None:
        assert epsilon is not None
        accountant = "rdp" if mechanism.sampler == "fixed_size" else "pld"
        noise_multiplier = calibrate_noise_multiplier(mechanism, 1, epsilon, account.delta, accountant=accountant)  # type: ignore[arg-type]  # one of the two names
    if not (math.isfinite(noise_multiplier) and 0 < noise_multiplier <= LARGEST_MULTIPLIER):
        raise PrivacyConfigError(
            f"noise_multiplier={noise_multiplier!r} of a private mean; expected a number > 0, at most 2^25."
        )
    mechanism = mechanism.with_noise(float(noise_multiplier))
    noise = GridGaussian(float(noise_multiplier))
    total = noise.round(clipped)
    paid = account.spend([(mechanism, 1)], what, item=item)
    noisy = noise.noised(total) * half
    return PrivateMean(
        value=middle + noisy / divisor,
        standard_error=noise.std * half / divisor,
        low=float(low),
        high=float(high),
        size=divisor,
        noise_multiplier=float(noise_multiplier),
        mechanism=mechanism,
        paid=paid,
        what=what,
        unit=in_words(mechanism.unit if item == "example" else item, mechanism.examples_per_user),
        item=item,
    )


class EarlyStop:
    """Says once, privately, that the mean of a value per record has reached a threshold; asking until then is free.

    AboveThreshold: Dwork and Roth 2014 (The Algorithmic Foundations of Differential Privacy), Algorithm 1, Theorem
    3.23: epsilon-DP however many times it answers "not yet". ``epsilon`` is paid when it is made, whether or not it
    ever says yes. Only the answers are private: do not publish or act on the values themselves. Values, threshold and
    noise are whole numbers of steps: the proof moves sums by what a record changes, a whole number of steps, and holds
    for the discrete Laplace distribution as for the continuous one.

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
        item: as :func:`private_mean`.

    Raises:
        PrivacyConfigError: a value out of range.
        BudgetExceededError: the account does not cover it.
        AccountingError: the account protects another unit.
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
        item: UnitName = "example",
    ) -> None:
        self._middle, self._half = _range(low, high)
        if not math.isfinite(threshold):
            raise PrivacyConfigError(f"threshold={threshold!r} of early stopping; expected a finite number.")
        self._size = _divisor(size, size)
        release = PureRelease(float(epsilon))
        # A unit moves a sum by at most `most` values of `steps` steps each, which is at most epsilon / 2 scales.
        most = _most_of_one_unit(account.protects, item)
        self._steps = math.floor(_SCALE * Fraction(release.epsilon) / 2 / most)
        if self._steps < 1:
            raise PrivacyConfigError(
                f"epsilon={epsilon!r} of early stopping; expected at least {2 * most / _SCALE:.2g}."
            )
        self.paid = account.spend([(release, 1)], what, item=item)
        # Secret, and the same for all questions: with a fresh one for each, the answers would cost more.
        exact = (Fraction(threshold) - Fraction(self._middle)) / Fraction(self._half) * self._size * self._steps
        self._threshold = round(exact) + discrete_laplace(Fraction(_SCALE))
        self.stopped = False
        self._pid = os.getpid()

    def __call__(self, values: Iterable[float] | torch.Tensor) -> bool:
        """Whether the mean has reached the threshold, up to noise.

        Raises:
            BudgetExceededError: it has said yes before; a new one must be paid for. Or this is a forked process.
        """
        if os.getpid() != self._pid:
            raise BudgetExceededError(
                f"process {os.getpid()} inherited early stopping, which would say stop once in each process, under "
                "one noisy threshold; ask in the process that made it."
            )
        if self.stopped:
            raise BudgetExceededError(
                "early stopping has said stop, and its epsilon is spent; make another EarlyStop to ask again."
            )
        total = sum(int(step) for step in np.rint(_clipped(values, self._middle, self._half) * self._steps))
        self.stopped = total + discrete_laplace(Fraction(2 * _SCALE)) >= self._threshold
        return self.stopped

    def __reduce__(self) -> Any:
        # A copy would answer a second time under the same noisy threshold.
        raise TypeError("EarlyStop cannot be copied or pickled; after a restart, make another, which is paid for anew")


@dataclass(frozen=True)
class PrivateCounts:
    """Noisy numbers of values by category; all of it may be published.

    Attributes:
        counts: of each category, with noise: they may be below 0. Other values are not counted.
        epsilon: of all counts together; their delta is 0.
        sensitivity: how many values one unit has at most; twice that where a unit is replaced.
        adjacency: under which epsilon holds.
        unit: for which epsilon holds.
        paid: the name of the use in the account.
        what: the counts, in words.
    """

    counts: dict[str, int]
    epsilon: float
    sensitivity: int
    adjacency: str
    unit: str
    paid: str
    what: str

    def statement(self) -> str:
        """One line for a card."""
        return (
            f"{self.what}: numbers by {len(self.counts)} categories that were fixed beforehand, with discrete Laplace "
            f"noise of scale {self.sensitivity} / {self.epsilon:g} (one {self.unit} changes their sum by at most "
            f"{self.sensitivity}), drawn in integer arithmetic; epsilon {self.epsilon:g}, delta 0, under "
            f"{self.adjacency}, unit {self.unit}."
        )


def private_counts(
    values: Iterable[str],
    categories: Sequence[str],
    *,
    account: Payer,
    epsilon: float,
    users: Iterable[Any] | None = None,
    rows: int | None = None,
    what: str = "counts",
) -> PrivateCounts:
    """How many values each category has, with noise: a histogram that may be published.

    One record is in one category at most, and changes the counts by 1 in sum: discrete Laplace noise of scale
    1 / epsilon on each makes all of them together epsilon-DP (Dwork and Roth 2014, Theorem 3.6). A user with k records
    changes them by k, a record that is replaced by 2, and the noise grows with that. Call it in one process.

    Args:
        values: the category of each record. Values that are no category are not counted.
        categories: fixed without looking at the values.
        account: of the records; it pays before the noise is drawn.
        epsilon: of all counts together, > 0.
        users: whose each record is, in the same order, where the account protects users: at most ``rows`` records of
            each, drawn at random, are counted; all texts or all whole numbers. None: each value counts, and an account
            for users must bound them.
        rows: of a user that count at most, >= 1; with ``users``.
        what: the counts, in words, for the account.

    Returns:
        The noisy counts.

    Raises:
        PrivacyConfigError: no categories or one twice, epsilon out of range, or users without rows, or of other types.
        BudgetExceededError: the account does not cover it; nothing is released.
        AccountingError: the account protects another unit.
    """
    found = [str(value) for value in values]
    names = [str(name) for name in categories]
    if not names or len(set(names)) != len(names):
        raise PrivacyConfigError(f"categories={names!r} of private counts; expected at least one, each once.")
    release = PureRelease(float(epsilon))
    if (users is None) != (rows is None) or (rows is not None and (type(rows) is not int or rows < 1)):
        raise PrivacyConfigError(
            f"users {'given' if users is not None else 'not given'} and rows={rows!r} of private counts; give the "
            "user of each value and a whole number >= 1 of values that count, or neither."
        )
    item: UnitName = "example"
    if users is not None and rows is not None:
        named: Any = users
        owners = named.tolist() if hasattr(named, "tolist") else list(named)
        if len(owners) != len(found):
            raise PrivacyConfigError(
                f"{len(owners)} users of {len(found)} values to be counted; expected the user of each value."
            )
        kinds = {type(owner) for owner in owners}
        if not (kinds <= {str} or kinds <= {int}):  # tensors and NaN are unequal to themselves: no bound would hold
            raise PrivacyConfigError(
                f"users of the types {', '.join(sorted(kind.__name__ for kind in kinds))}; expected all texts or all "
                "whole numbers: a person under two names would be two users."
            )
        owned: dict[Any, list[str]] = {}
        for user, value in zip(owners, found, strict=True):
            owned.setdefault(user, []).append(value)
        drawn = random.SystemRandom().sample  # for each user apart: nobody's draw depends on who else is there
        found = [value for own in owned.values() for value in (own if len(own) <= rows else drawn(own, rows))]
        item = "user"
    most = _most_of_one_unit(account.protects, item) * (rows or 1)
    numbers = Counter(found)
    paid = account.spend([(release, 1)], what, item=item)
    scale = most / Fraction(release.epsilon)
    return PrivateCounts(
        counts={name: numbers[name] + discrete_laplace(scale) for name in names},
        epsilon=release.epsilon,
        sensitivity=most,
        adjacency=account.protects.adjacency,
        unit=account.protects.unit,
        paid=paid,
        what=what,
    )


def _range(low: float, high: float) -> tuple[float, float]:
    """Middle and half width."""
    middle, half = (low + high) / 2, (high - low) / 2
    if not (math.isfinite(middle) and 0 < half < math.inf):
        raise PrivacyConfigError(f"low={low!r} and high={high!r}; expected two finite numbers, the first one smaller.")
    return middle, half


def _divisor(size: int | None, count: int) -> int:
    divisor: Any = count if size is None else size
    if isinstance(divisor, bool) or not isinstance(divisor, int) or divisor < 1:
        raise PrivacyConfigError(f"size={divisor!r} of a validation set; expected a whole number >= 1.")
    return int(divisor)


def _clipped(values: Iterable[float] | torch.Tensor, middle: float, half: float) -> np.ndarray:
    """``[n]`` float64: the values less the middle, over half the range, each in [-1, 1]; NaN is 0."""
    if isinstance(values, torch.Tensor):
        if values.dim() == 0 or values.numel() != len(values):  # else a record would have several
            raise PrivacyConfigError(
                f"values of shape {list(values.shape)}; expected one number for each record, such as its mean loss."
            )
        every = values.detach().flatten().tolist()
    else:
        every = [float(v) for v in values]
    scaled = (np.asarray(every, np.float64) - middle) / half
    return np.nan_to_num(np.clip(scaled, -1.0, 1.0), nan=0.0)


def _reads_all(protects: Protects, size: int, item: UnitName) -> Mechanism:
    """A Gaussian release of a sum over all values, each at most 1, with noise multiplier 1."""
    if protects.adjacency == "replace_one":  # its sensitivity of 2 is the theorem's
        return Mechanism(sampler="fixed_size", noise_multiplier=1.0, batch_size=size, dataset_size=size)
    several = protects.unit == "user" and item == "example" and protects.examples_per_user is not None
    return Mechanism(
        sampler="poisson",
        noise_multiplier=1.0,
        sample_rate=1.0,
        unit="user" if several else "example",
        examples_per_user=protects.examples_per_user if several else None,
    )


def _most_of_one_unit(protects: Protects, item: UnitName) -> int:
    """By how many half ranges one unit changes a sum: its values, twice that where a unit is replaced."""
    check_item([(_reads_all(protects, 1, item), 1)], protects, item)
    values = protects.examples_per_user or 1 if item == "example" else 1
    return values * (2 if protects.adjacency == "replace_one" else 1)
