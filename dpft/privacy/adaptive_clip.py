"""A clip norm that follows a quantile of the gradients' norms, estimated under the same budget.

Andrew, Thakkar, McMahan, Ramaswamy 2021 (arXiv 1905.03871), per example instead of per user. Besides the sum of the
clipped gradients each release has a noised count: with ``b_i = 1`` where an example's norm is at most C, else 0, it is
``sum_i (b_i - 1/2) + N(0, count_noise^2)`` over the sampled examples. The clip norm of the next release is
``C exp(-learning_rate (fraction - quantile))``, with ``fraction = 1/2 + count / expected_batch_size``.

**Privacy: one Gaussian mechanism.** Each example adds one vector to the release, ``(clipped gradient, b - 1/2)``.
Divide its parts by the standard deviations of their noise, ``z_sum C`` and ``count_noise``: the noise is then N(0, I),
and the example's vector has a norm of at most ``sqrt(z_sum^-2 + (2 count_noise)^-2)``, as ``|b - 1/2| = 1/2``. With ::

    z_sum = (z^-2 - (2 count_noise)^-2)^(-1/2)

that is 1 / z (their Theorem 1): a release is the Gaussian mechanism of noise multiplier z on vectors of one dimension
more. Every theorem of :mod:`dpft.privacy.mechanism` that asks of an example only that its vector is bounded holds
for it unchanged, with noise multiplier z, also where one example replaces another (both vectors are bounded). C
depends on earlier releases alone, as adaptive composition allows.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dpft.errors import PrivacyConfigError

THEOREM = "sum and count are one Gaussian mechanism (Andrew et al. 2021, arXiv 1905.03871, Theorem 1)"

# Of 1/z^2 the count takes at most a hundredth by default, for which the sum gets at most 0.51 % more noise.
_DEFAULT_IN_SIGMAS = 5.0
_SMALLEST, _LARGEST = 2.0**-40, 2.0**40  # of a clip norm: far from where float32 sums under- or overflow


@dataclass(frozen=True, kw_only=True)
class AdaptiveClip:
    """Follow a quantile of the norms, starting from ``max_grad_norm``; ``PrivacyConfig(adaptive_clip=...)``.

    Attributes:
        quantile: share of the examples whose gradients are to stay unclipped, in (0, 1).
        learning_rate: of the geometric update, > 0; 0.2 moves C by at most about 20 % per release.
        count_noise: standard deviation of the noise on the count, > 0, in examples; must exceed half of the noise
            multiplier. None: a twentieth of ``expected_batch_size``, as in the paper, or five noise multipliers if
            that is more; the sum then gets at most 0.51 % more noise.

    Raises:
        PrivacyConfigError: a value out of range.
    """

    quantile: float = 0.5
    learning_rate: float = 0.2
    count_noise: float | None = None

    def __post_init__(self) -> None:
        for name in ("quantile", "learning_rate", "count_noise"):
            value = getattr(self, name)
            if name == "count_noise" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < float(value) < math.inf:
                raise PrivacyConfigError(f"AdaptiveClip: {name}={value!r}; expected a finite number > 0.")
            object.__setattr__(self, name, float(value))
        if self.quantile >= 1:
            raise PrivacyConfigError(
                f"AdaptiveClip: quantile={self.quantile!r}; expected a share in (0, 1), such as 0.5."
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AdaptiveClip:
        """Inverse of ``dataclasses.asdict``.

        Raises:
            PrivacyConfigError: an unknown field, or as the constructor.
        """
        try:
            return cls(**values)
        except TypeError as error:
            raise PrivacyConfigError(f"not an AdaptiveClip: {dict(values)!r} ({error}).") from error

    def count_std(self, noise_multiplier: float, expected_batch_size: float) -> float:
        """Standard deviation of the noise on the count, in examples."""
        if self.count_noise is not None:
            return self.count_noise
        return max(expected_batch_size / 20, _DEFAULT_IN_SIGMAS * noise_multiplier)

    def sum_noise_multiplier(self, noise_multiplier: float, expected_batch_size: float) -> float:
        """Noise multiplier of the sum, with which sum and count together have ``noise_multiplier``; 0 for 0.

        Raises:
            PrivacyConfigError: the count alone spends more.
        """
        std = self.count_std(noise_multiplier, expected_batch_size)
        if noise_multiplier == 0:
            return 0.0
        if noise_multiplier >= 2 * std:
            raise PrivacyConfigError(
                f"AdaptiveClip: count_noise={std:g} is not above half of the noise multiplier {noise_multiplier:.4g}: "
                "the count alone would spend the budget. Raise count_noise, or leave it out."
            )
        return float((noise_multiplier**-2 - (2 * std) ** -2) ** -0.5)

    def next_clip_norm(self, clip_norm: float, noised_count: float, expected_batch_size: float) -> float:
        """The clip norm after a release.

        Args:
            clip_norm: C of that release.
            noised_count: ``sum_i (b_i - 1/2)`` with its noise, in examples.
            expected_batch_size: b.
        """
        fraction = 0.5 + noised_count / expected_batch_size
        exponent = -self.learning_rate * (fraction - self.quantile)
        log = min(max(math.log(clip_norm) + exponent, math.log(_SMALLEST)), math.log(_LARGEST))
        return math.exp(log)
