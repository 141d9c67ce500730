"""Users or their rows as examples: what each costs on given data, under the same guarantee for the user.

===========  ================================================  =======================================================
examples     a step draws                                      what one user changes in the clipped sum
===========  ================================================  =======================================================
users        each user with probability q, and of each one     C with probability q: Poisson sampling
             at most k rows, afresh; clips a user's gradient
rows         each row with probability q, of data in which     j C with the probability that j of k rows are drawn,
             nobody has more than k; clips a row's gradient    Binomial(k, q): mixture of Gaussians
===========  ================================================  =======================================================

The theorems are those of :mod:`dpft.privacy.mechanism`. With n users that have m_u rows after the cap k, both read
``q * sum_u m_u`` rows in a step, so that they cost the same. At the same noise users have the smaller epsilon. But
they also have the smaller signal: q n gradients of length C at most, and not q sum_u m_u. Averaging a user's rows
before they are clipped makes up for it in part, by a factor that depends on the rows. If the gradients are longer than
C, and what they have in common is the same for all rows, it is the length of a row's gradient over that of the mean of
the user's rows: 1 if the rows are alike, sqrt(m) if what is different in them is much longer than what is common.
Charles et al. 2024 (arXiv 2407.07737) compare the two ways on language models, by trainings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dpft.errors import PrivacyConfigError
from dpft.privacy.accounting.accountant import compose_cached, epsilon, rounded_up
from dpft.privacy.accounting.calibration import calibrate_noise_multiplier
from dpft.privacy.config_checks import number
from dpft.privacy.mechanism import Mechanism


@dataclass(frozen=True, kw_only=True)
class UnitComparison:
    """What users as examples cost, and rows as examples. See :func:`compare_units`; ``print`` it.

    Everything in it but ``rows``, ``steps``, ``delta`` and ``target_epsilon`` is computed from private counts: for
    whoever trains, **not for publication**.

    Attributes:
        users: n.
        rows: k, of a user, at most.
        most_rows: that any user has after this cap; k unless all have fewer.
        examples: rows of all users after the cap.
        unused: rows beyond the cap: never used if rows are the examples, and in turn if users are.
        batch: expected rows in a step.
        users_per_step: expected users in a step, q n: the ``expected_batch_size`` where users are the examples.
        sample_rate: q of both.
        steps: T.
        delta: of both.
        target_epsilon: the budget; None where the noise was given.
        epsilon_users: of a user, where users are sampled, with ``noise_users``.
        epsilon_rows: of a user, where rows are sampled, with the same noise; an upper bound, up to 2 % too large.
        noise_users: noise multiplier where users are sampled.
        noise_rows: where rows are sampled, for the same epsilon, ``epsilon_users``; up to 3 % too large.
        gain_needed: so many times as much of the signal must a user's clipped mean have as a row's, on average, that
            users are the better choice at the same epsilon; up to 3 % too small.
        gain_possible: that is at most so much: the mean of sqrt(rows of a user).
    """

    users: int
    rows: int
    most_rows: int
    examples: int
    unused: int
    batch: float
    users_per_step: float
    sample_rate: float
    steps: int
    delta: float
    target_epsilon: float | None
    epsilon_users: float
    epsilon_rows: float
    noise_users: float
    noise_rows: float
    gain_needed: float
    gain_possible: float

    @property
    def better(self) -> Literal["users", "rows", "either"]:
        """As what to sample: ``users`` or ``rows`` whatever the rows say; ``either``: it depends on them."""
        if self.gain_needed <= 1:
            return "users"
        return "rows" if self.gain_needed >= self.gain_possible else "either"

    def to_dict(self) -> dict[str, Any]:
        """All fields and ``better``, serialisable to JSON. Not for publication."""
        return {**dataclasses.asdict(self), "better": self.better}

    def __str__(self) -> str:
        needed, at_most = f"{self.gain_needed:.2f}", f"{self.gain_possible:.2f}"
        why = {
            "users": "users, whatever their rows are: even if those of a user are all alike",
            "rows": f"rows, whatever they are: users would need a gain of {needed}, and have at most {at_most}",
            "either": f"users, if rows' gradients are typically {needed} times as long as their mean over a user, or "
            f"longer\n(1: all alike; {at_most}: hardly anything in common); else rows. Measure it on public data",
        }[self.better]
        lines = [
            "NOT FOR PUBLICATION: computed from how many rows each user has",
            f"{self.users:,} users with {self.examples:,} rows, at most {self.rows} of each; {self.unused:,} rows are "
            "beyond that",
            f"{self.batch:g} rows expected in each of {self.steps:,} steps, rate {self.sample_rate:.4g}, "
            f"delta {self.delta:g}",
        ]
        spent = rounded_up(self.epsilon_users)
        table = [
            ("", "users sampled", "rows sampled"),
            ("expected_batch_size", f"{self.users_per_step:,.1f}", f"{self.batch:,.1f}"),
            (f"epsilon of a user at noise {self.noise_users:.3f}", spent, rounded_up(self.epsilon_rows)),
            (f"noise multiplier at epsilon {spent}", f"{self.noise_users:.3f}", f"{self.noise_rows:.3f}"),
        ]
        lines += [f"{name:36}{users:>15}{rows:>15}" for name, users, rows in table]
        return "\n".join([*lines, f"better: {why}"])


def compare_units(
    counts: Sequence[int] | npt.NDArray[np.integer[Any]],
    *,
    rows: int,
    batch: float,
    steps: int,
    delta: float,
    target_epsilon: float | None = None,
    noise_multiplier: float | None = None,
) -> UnitComparison:
    """Compare users as examples (:func:`dpft.by_user`) with rows as examples (``unit="user"``), before any training.

    Both protect a user. Both read the same number of rows in a step, in expectation, with the same rate. Takes 3 to 15
    seconds of one core, as rows need mixtures of Gaussians.

    Args:
        counts: how many rows each user has, >= 1. Private, and so is what follows from them.
        rows: k: rows of a user in a step, at most; where rows are sampled, in the data.
        batch: expected rows in a step.
        steps: T.
        delta: of the user's guarantee.
        target_epsilon: of it; or give the noise:
        noise_multiplier: noise over the clip norm C.

    Returns:
        The comparison.

    Raises:
        PrivacyConfigError: an argument out of range.
        AccountingError: no noise meets the target.
        MissingPackageError: the accountant's packages are not installed.
    """
    owned = np.asarray(counts)
    if owned.ndim != 1 or owned.dtype.kind not in "iu" or not len(owned) or owned.min() < 1:
        raise PrivacyConfigError(
            f"counts of type {owned.dtype} and shape {list(owned.shape)}; expected for each user a whole number >= 1 "
            "of rows."
        )
    if (target_epsilon is None) == (noise_multiplier is None):
        raise PrivacyConfigError(
            f"target_epsilon={target_epsilon!r} and noise_multiplier={noise_multiplier!r}; give exactly one of them "
            "to compare units."
        )
    k, steps = number("rows", rows, whole=True), number("steps", steps, whole=True)
    batch, delta = number("batch", batch, whole=False), number("delta", delta, whole=False)
    used = np.minimum(owned, k)
    examples, most = int(used.sum()), int(used.max())
    if batch > examples:
        raise PrivacyConfigError(
            f"batch={batch:g} rows a step, of {examples} that are there with at most {k} of each user; lower batch."
        )
    rate = batch / examples
    of_users = Mechanism(sampler="poisson", noise_multiplier=1.0, sample_rate=rate)
    if noise_multiplier is None:
        assert target_epsilon is not None
        noise = calibrate_noise_multiplier(of_users, steps, target_epsilon, delta)
    else:
        noise = number("noise_multiplier", noise_multiplier, whole=False)
        if noise == 0:
            raise PrivacyConfigError("noise_multiplier=0 has no epsilon to compare; expected a number > 0.")
    spent = epsilon(of_users.with_noise(noise), steps, delta)
    if most == 1:  # nobody has two rows: the two are the same
        spent_rows, noise_rows = spent, noise
    else:
        of_rows = dataclasses.replace(of_users, unit="user", examples_per_user=most)
        spent_rows = compose_cached(((of_rows.with_noise(noise), steps),), delta, "pld", True)
        noise_rows = calibrate_noise_multiplier(of_rows, steps, spent, delta, coarse=True)
    return UnitComparison(
        users=len(owned),
        rows=k,
        most_rows=most,
        examples=examples,
        unused=int(owned.sum()) - examples,
        batch=batch,
        users_per_step=rate * len(owned),
        sample_rate=rate,
        steps=steps,
        delta=delta,
        target_epsilon=target_epsilon,
        epsilon_users=spent,
        epsilon_rows=spent_rows,
        noise_users=noise,
        noise_rows=noise_rows,
        gain_needed=(examples / noise_rows) / (len(owned) / noise),
        gain_possible=float(np.sqrt(used).mean()),
    )
