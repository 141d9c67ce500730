"""Clip functions: from per-example norms to the factors that bound each example's contribution.

===========  ==========================  =======================  =================================================
clip         factor                      sensitivity (add/remove) source
===========  ==========================  =======================  =================================================
abadi        ``min(1, C / norm)``        C                        Abadi et al. 2016, arXiv 1607.00133, algorithm 1
automatic    ``C / (norm + gamma)``      C (strictly below)       Bu et al. 2023, arXiv 2206.07136, AUTO-S
===========  ==========================  =======================  =================================================

Under ``automatic`` a gradient of norm n contributes ``C n / (n + gamma)``: below C for every n. Float32 keeps that
only while factor and norm are in its range: gamma must be at least 2^-60, and the largest factor, C / gamma, at most
2^60. Under both C must be at least 2^-40, as :func:`dpft.wrap` checks: a group's share of it may be less.

======================  ===============================================================
norm or weight          factor
======================  ===============================================================
norm 0                  abadi 1, automatic ``C / gamma``; the contribution is zero anyway
norm NaN, or > 2^60     0, and the example's contribution is masked to exactly zero: of gradients that large products
                        in float32 overflow, and the clipped one would be NaN
example_weight 0        0, and masked likewise: a padding row
example_weight NaN      0
======================  ===============================================================
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

LARGEST_NORM = 2.0**60  # its square is far below float32's largest number
# Of C. Squares of entries below 2^-75 are 0 in float32, so that a norm may be too small by 2^-75 of each entry: for a
# billion of them, together 2^-20 of this.
SMALLEST_BOUND = 2.0**-40
ClipFunction = Literal["abadi", "automatic"]


def row_weights(weights: Tensor) -> Tensor:
    """``[B]`` float64 multipliers of the rows: example weights in [0, 1], NaN as 0."""
    return torch.nan_to_num(weights.double(), nan=0.0).clamp(0.0, 1.0)


@dataclass(frozen=True)
class ClipRule:
    """A clip function with its constants.

    Args:
        max_grad_norm: C > 0, the bound on one example's contribution in L2 norm.
        function: ``"abadi"`` or ``"automatic"``.
        gamma: stability constant > 0 of ``"automatic"``, in units of the norm.

    Raises:
        ValueError: a value out of range.
    """

    max_grad_norm: float
    function: ClipFunction = "abadi"
    gamma: float = 0.01

    def __post_init__(self) -> None:
        if not (math.isfinite(self.max_grad_norm) and self.max_grad_norm > 0):
            raise ValueError(f"max_grad_norm is {self.max_grad_norm!r}; expected a finite number above 0")
        if self.function not in ("abadi", "automatic"):
            raise ValueError(f"clip_function is {self.function!r}; expected 'abadi' or 'automatic'")
        if not (math.isfinite(self.gamma) and self.gamma > 0):
            raise ValueError(f"clip_gamma is {self.gamma!r}; expected a finite number above 0")
        if self.function == "automatic" and self.gamma < max(1.0, self.max_grad_norm) / LARGEST_NORM:
            raise ValueError(
                f"clip_gamma is {self.gamma!r} at max_grad_norm {self.max_grad_norm:g}; expected at least 2^-60, and "
                "max_grad_norm / 2^60: factors of small gradients would leave float32's range. Use 0.01."
            )

    def factors(self, sq_norms: Tensor, weights: Tensor | None = None) -> Tensor:
        """Clip factors from squared norms.

        Args:
            sq_norms: ``[B]`` float64.
            weights: ``[B]``, 0 for a padding row, 1 for an example; clamped to [0, 1]. None means all 1.

        Returns:
            ``[B]`` float64, in [0, 1] for abadi; 0 where the norm is NaN or above :data:`LARGEST_NORM`.
        """
        norms = sq_norms.sqrt()
        if self.function == "abadi":
            factors = (self.max_grad_norm / norms).clamp(max=1.0)
        else:
            factors = self.max_grad_norm / (norms + self.gamma)
        factors = torch.where(norms <= LARGEST_NORM, factors, 0.0)  # false for NaN
        if weights is not None:
            factors = factors * row_weights(weights)
        return factors


class ClipCount:
    """Of the examples of one logical batch, those whose norm is at most C, minus the others.

    It depends on private data: only with noise may it leave the process. An example counts 1 or -1, also if its norm
    is NaN; a row of weight 0 or NaN counts 0.
    """

    def __init__(self) -> None:
        self._total: Tensor | None = None

    def add(self, sq_norms: Tensor, weights: Tensor, max_grad_norm: float) -> None:
        """Count rows with squared norms ``[B]`` float64 and example weights ``[B]``; nothing waits for the device."""
        votes = torch.where(sq_norms.sqrt() <= max_grad_norm, 1, -1)
        count = torch.where(row_weights(weights) > 0, votes, 0).sum()
        self._total = count if self._total is None else self._total + count.to(self._total.device)

    def take(self) -> int:
        """The count, which begins again at 0."""
        total = 0 if self._total is None else int(self._total.item())
        self._total = None
        return total
