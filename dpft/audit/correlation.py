"""Noise that is correlated over the steps, undone: by matrices of the auditor's own, from the claimed strategy.

What an optimiser gets at step t is row t of ``x + C^{-1} z``; from the rows up to t follows row t of ``C x + z``, the
noise of which is independent over the steps. It is divided by its claimed standard deviation: noise multiplier times
clip norm times the most by which one example changes ``C x``, computed here from the whole matrix.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from dpft.audit.statistics import Samples


def strategy_matrix(strategy: Any, steps: int) -> Samples:
    """C of a strategy, lower triangular, ``[steps, steps]``."""
    matrix = np.zeros((steps, steps))
    for lag in range(steps):
        if strategy.kind == "bandmf":
            value = strategy.weights[lag] if lag < len(strategy.weights) else 0.0
        else:
            terms = (
                [w * d ** (lag - 1) for w, d in zip(strategy.weights, strategy.decays, strict=True)] if lag else [1]
            )
            value = math.fsum(terms)
        matrix += np.diag(np.full(steps - lag, value), -lag)
    return matrix


def unit_of_noise(strategy: Any) -> float:
    """Standard deviation of z where noise multiplier and clip norm are 1, as it is claimed.

    ``bandmf``: the norm of one column, as participations are composed; ``blt``: that of the sum of all columns in
    which one example takes part.
    """
    matrix = strategy_matrix(strategy, strategy.steps)
    columns = matrix[:, :1] if strategy.kind == "bandmf" else matrix[:, :: strategy.min_separation]
    return float(np.linalg.norm(columns.sum(axis=1)))


class Uncorrelated:
    """Rows of ``C x`` from rows of x, one after the other.

    Args:
        strategy: of the claim; None: C is the identity.
        steps: rows to come.
    """

    def __init__(self, strategy: Any, steps: int) -> None:
        self._matrix = np.eye(steps) if strategy is None else strategy_matrix(strategy, steps)
        self._rows: list[Tensor] = []

    def row(self, x: Tensor) -> Tensor:
        """The next row of ``C x``, from the next row of x, ``[d]``."""
        self._rows.append(x)
        weights = self._matrix[len(self._rows) - 1]
        found = x.clone()
        for weight, earlier in zip(weights.tolist(), self._rows[:-1], strict=False):
            if weight:
                found.add_(earlier, alpha=weight)
        return found
