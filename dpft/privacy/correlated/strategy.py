"""The strategy matrix C of correlated noise: its coefficients, its sensitivity, and the error it leaves.

A matrix mechanism releases, for the clipped sums x_0, ..., x_{n-1} of n steps, ``C x + z`` with independent Gaussian
z; what the optimiser gets at step t is row t of ``C^{-1} (C x + z) = x + C^{-1} z``: the sum plus noise that is
correlated over the steps, so that part of what one step added is taken back by later ones. C is lower triangular and
Toeplitz here, with first column c and c_0 = 1, in one of two forms:

- ``bandmf`` (Choquette-Choo et al. 2023, arXiv 2306.08153): c_0, ..., c_{b-1} are free, the others are 0;
- ``blt`` (buffered linear Toeplitz; Dvijotham et al. 2024, arXiv 2404.16706; McMahan, Xu, Zhang 2024, arXiv
  2408.08868): c_j = sum_i w_i d_i^(j-1) for j >= 1, with as many terms as there are buffers.

**Sensitivity.** An example takes part in at most k steps, which are at least b apart, and changes each of these sums
by a vector of norm at most 1 (in units of the clip norm). Then ``C x`` changes by at most, in Frobenius norm,

- ``bandmf``, with at most b bands: the columns of one example do not overlap, so it is at most ``|c| sqrt(k)``, and
  ``|c|`` for one participation, which is what amplification by sampling needs;
- ``blt``: C has entries >= 0, which makes parallel changes the worst (Choquette-Choo et al. 2022, arXiv 2211.06530),
  and c does not increase, which makes steps 0, b, 2 b, ... the worst (Kalinin & Lampert 2024, arXiv 2405.13763,
  Theorem 2): the norm of the sum of these columns. Both conditions are checked on the parameters.

The first t rows of C x + z depend on the first t columns alone: stopping early is post-processing, and the sensitivity
after t steps is that of the leading t x t block.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from dpft.errors import AccountingError, PrivacyConfigError

StrategyKind = Literal["bandmf", "blt"]
Vector = npt.NDArray[np.float64]

_KINDS: tuple[str, ...] = get_args(StrategyKind)


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """A strategy matrix C for ``steps`` steps, and the participation that it was made for.

    Attributes:
        kind: ``bandmf`` or ``blt``.
        steps: n, the number of steps; more are refused.
        min_separation: b: two steps in which one example takes part are at least so far apart; 1: they may follow each
            other.
        weights: ``bandmf``: c_0 = 1, ..., c_{bands-1}; ``blt``: w_i >= 0, one for each buffer, sum at most 1.
        decays: ``blt``: d_i in [0, 1), one for each buffer; ``bandmf``: empty.

    Raises:
        PrivacyConfigError: parameters for which the sensitivity is not known.
    """

    kind: StrategyKind
    steps: int
    min_separation: int
    weights: tuple[float, ...]
    decays: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise PrivacyConfigError(f"strategy kind={self.kind!r}; expected one of {', '.join(_KINDS)}.")
        for name in ("steps", "min_separation"):
            value: Any = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise PrivacyConfigError(f"strategy {name}={value!r}; expected a whole number >= 1.")
        if not all(math.isfinite(value) for value in (*self.weights, *self.decays)):
            raise PrivacyConfigError("the strategy has parameters that are not finite; expected finite numbers.")
        if self.kind == "bandmf":
            if self.decays or not 1 <= len(self.weights) <= self.min_separation or self.weights[0] != 1.0:
                raise PrivacyConfigError(
                    f"a banded strategy with {len(self.weights)} bands beginning with {self.weights[:1]}, "
                    f"{len(self.decays)} decays and min_separation={self.min_separation}; expected bands that begin "
                    "with 1, at most min_separation of them, and no decays: else the columns of one example overlap."
                )
        elif (
            not self.weights
            or len(self.weights) != len(self.decays)
            or min(self.weights) < 0
            or sum(self.weights) > 1
            or not all(0 <= decay < 1 for decay in self.decays)
        ):
            raise PrivacyConfigError(
                f"a BLT strategy with weights {self.weights} and decays {self.decays}; expected as many of each, "
                "weights >= 0 whose sum is at most 1, and decays in [0, 1): the coefficients must be >= 0 and must "
                "not increase, or their sensitivity is not known."
            )

    @property
    def participations(self) -> int:
        """k: the most steps in which one example takes part."""
        return self.participations_within(self.steps)

    def participations_within(self, steps: int) -> int:
        """The most of the first ``steps`` steps in which one example takes part."""
        return -(-steps // self.min_separation)

    @property
    def memory(self) -> int:
        """Vectors of the size of the parameters that the noise of a step needs of the steps before it."""
        return len(self.weights) - 1 if self.kind == "bandmf" else len(self.weights)

    def coefficients(self, steps: int | None = None) -> Vector:
        """The first column c of the matrix of ``steps`` steps, float64 ``[steps]``."""
        count = self.steps if steps is None else steps
        if self.kind == "blt":
            return blt_coefficients(np.array(self.weights), np.array(self.decays), count)
        return np.array((self.weights + (0.0,) * max(0, count - len(self.weights)))[:count])

    @property
    def column_norm(self) -> float:
        """The norm |c|: the sensitivity of one participation, in units of the clip norm."""
        return float(np.linalg.norm(self.coefficients()))

    @property
    def scale(self) -> float:
        """The standard deviation of z where the noise multiplier and the clip norm are 1.

        It is the sensitivity that the accounting composes in units of: ``bandmf`` composes participations, so that of
        one; ``blt`` is one release of all steps.
        """
        return self.column_norm if self.kind == "bandmf" else self.sensitivity()

    def sensitivity(self, steps: int | None = None) -> float:
        """The most by which one example changes the first ``steps`` rows of C x, in units of the clip norm.

        Args:
            steps: 0 to :attr:`steps`; None: all of them.

        Raises:
            AccountingError: more steps than the matrix has.
        """
        count = self.steps if steps is None else steps
        if count > self.steps:
            raise AccountingError(
                f"{count} steps with correlated noise that was made for {self.steps}: neither its sensitivity nor its "
                "error is known beyond them; plan the larger number of steps for a new run."
            )
        return _sensitivity(self, count) if count else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {**dataclasses.asdict(self), "weights": list(self.weights), "decays": list(self.decays)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Strategy:
        """Inverse of :meth:`to_dict`.

        Raises:
            PrivacyConfigError: not the dictionary of a strategy.
        """
        try:
            lists = {name: tuple(float(value) for value in values[name]) for name in ("weights", "decays")}
            return cls(**{**values, **lists})
        except (KeyError, TypeError, ValueError) as error:
            raise PrivacyConfigError(f"not a strategy: {error!r}; expected what to_dict gave.") from error


def toeplitz_sensitivity(coefficients: Vector, min_separation: int) -> float:
    """Norm of the sum of the columns 0, b, 2 b, ... of a lower triangular Toeplitz matrix, b = ``min_separation``.

    That is the sensitivity where the coefficients are >= 0 and do not increase, or where at most b of them are not 0.

    Args:
        coefficients: the first column, ``[n]``.
        min_separation: b >= 1.

    Raises:
        AccountingError: neither condition holds.
    """
    n = len(coefficients)
    banded = not coefficients[min_separation:].any()
    if not banded and (coefficients.min() < 0 or (np.diff(coefficients) > 0).any()):
        raise AccountingError(
            "the coefficients of the strategy are negative or increase: its sensitivity under several participations "
            "is not known; expected coefficients >= 0 that do not increase."
        )
    total = np.zeros(n)
    for start in range(0, n, min_separation):
        total[start:] += coefficients[: n - start]
    return float(np.linalg.norm(total))


def blt_inverse(weights: Vector, decays: Vector, steps: int) -> Vector:
    """The first column of C^{-1} of a BLT, float64 ``[steps]``.

    The buffers of C^{-1} go from one step to the next by A = diag(d) - 1 w^T, which is similar to the symmetric matrix
    diag(d) - sqrt(w) sqrt(w)^T. So its eigenvalues lambda_i are real, below 1, and at least -sum(w) >= -1: the noise
    never grows. With u_i the products of sqrt(w) and the eigenvectors, the column is 1 and then
    -sum_i u_i^2 lambda_i^(j-1).
    """
    root = np.sqrt(weights)
    values, vectors = np.linalg.eigh(np.diag(decays) - np.outer(root, root))
    return blt_coefficients(-((root @ vectors) ** 2), values, steps)


def blt_coefficients(weights: Vector, decays: Vector, steps: int) -> Vector:
    """1, and then sum_i w_i d_i^(j-1) for j = 1, ..., steps - 1, float64 ``[steps]``."""
    found = np.zeros(steps)
    for weight, decay in zip(weights, decays, strict=True):
        powers = np.full(max(0, steps - 1), decay)
        powers[:1] = 1.0
        found[1:] += weight * np.cumprod(powers)  # products by a factor below 1 do not increase, rounding included
    found[:1] = 1.0
    return found


@functools.lru_cache(maxsize=4096)
def _sensitivity(strategy: Strategy, steps: int) -> float:
    return toeplitz_sensitivity(strategy.coefficients(steps), strategy.min_separation)
