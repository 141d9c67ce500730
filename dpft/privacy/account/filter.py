"""A privacy filter: it admits releases that are chosen one after the other, by their results, while a budget lasts.

Ordinary composition theorems fix every mechanism, and the number of them, before the first result is seen. Whoever
looks at one training and then decides how much to spend on the next needs a *filter*: Renyi DP of one fixed order
alpha, added up, never above a budget. Then the whole is (alpha, budget)-RDP, however the releases were chosen: Feldman
and Zrnic 2021 (arXiv 2008.11193), Theorem 3.1; approximate zCDP has filters too: Whitehouse et al. 2023 (arXiv
2203.05481). Mechanisms that answer over time (a sparse vector, a training with correlated noise) may be interleaved
with others: Haney et al. 2023 (arXiv 2309.05901) show that every filter extends to the concurrent composition of
interactive mechanisms for RDP of a fixed order. For the best order *afterwards* there is no theorem.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dpft.errors import BudgetExceededError, PrivacyConfigError
from dpft.privacy.account.composition import epsilon_of_rdp, orders, rdp_curve
from dpft.privacy.account.events import Protects, Release, Use, check_use


def check_budget(epsilon: float, delta: float) -> None:
    """Refuse a budget that is none.

    Raises:
        PrivacyConfigError: epsilon or delta out of range.
    """
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise PrivacyConfigError(f"the budget's epsilon is {epsilon!r}; expected a finite number > 0.")
    if not 0 < delta < 1:
        raise PrivacyConfigError(f"the budget's delta is {delta!r}; expected a number in (0, 1), such as 1e-6.")


class PrivacyFilter:
    """Admits releases while an (epsilon, delta) budget lasts, however they are chosen.

    Args:
        epsilon: of the budget, > 0.
        delta: of the budget, in (0, 1).
        order: the Renyi order alpha, fixed here; None: the one at which most releases of ``typical`` fit.
        typical: the release that will be made most often; None: Gaussians without sampling.
        protects: adjacency and unit of all releases.

    Attributes:
        order: alpha.
        budget: the RDP of this order that (epsilon, delta) allows.

    Raises:
        PrivacyConfigError: a value out of range, an order that dp_accounting does not compute, or a budget for which
            the order allows nothing.
    """

    def __init__(
        self,
        epsilon: float,
        delta: float,
        *,
        order: float | None = None,
        typical: Release | None = None,
        protects: Protects = Protects("add_or_remove_one"),  # noqa: B008  # a constant: a tuple
    ) -> None:
        check_budget(epsilon, delta)
        self.epsilon, self.delta, self.protects = float(epsilon), float(delta), protects
        grid = [alpha for alpha in orders() if alpha > 1.01]
        if order is None:
            order = self._best_order(typical)
        elif typical is not None:
            raise PrivacyConfigError(
                f"order={order!r} and a typical release, which chooses the order; give one of them."
            )
        if order not in grid:
            raise PrivacyConfigError(
                f"order={order!r}; expected one of dp_accounting's default orders above 1, such as 4.5, 8.0 or 32."
            )
        self.order, self.budget = float(order), self._allowed(order)
        if self.budget <= 0:
            raise PrivacyConfigError(
                f"order={order!r} leaves nothing of epsilon {epsilon:g} at delta {delta:g}; take a larger order or a "
                "larger budget."
            )
        self._index = orders().index(order)
        self._uses: list[Use] = []

    def _best_order(self, typical: Release | None) -> float:
        """Where most releases fit; for many of them it is nearly the best order afterwards."""
        if typical is None:
            cost = np.asarray(orders())
        else:
            check_use((typical, 1), self.protects, "rdp")
            cost = rdp_curve([(typical, 1)])
        # Below 2, the series of dp_accounting do not converge for every sampled Gaussian.
        return max(
            (alpha for alpha in orders() if alpha >= 2),
            key=lambda alpha: self._allowed(alpha) / float(cost[orders().index(alpha)]),
        )

    def _allowed(self, alpha: float) -> float:
        """The inverse of the conversion: Canonne, Kamath, Steinke 2020 (arXiv 2004.00010), Proposition 12."""
        return self.epsilon - math.log1p(-1 / alpha) + math.log(self.delta * alpha) / (alpha - 1)

    def rdp(self, uses: Sequence[Use]) -> float:
        """RDP of the filter's order of some releases."""
        uses = list(uses)
        for use in uses:
            check_use(use, self.protects, "rdp")
        return float(rdp_curve(uses)[self._index])

    def admits(self, uses: Sequence[Use]) -> bool:
        """Whether these releases fit beside those before them."""
        return self.rdp([*self._uses, *uses]) <= self.budget

    def spend(self, uses: Sequence[Use]) -> None:
        """Count releases; call it *before* they are made.

        Raises:
            BudgetExceededError: they do not fit; nothing is counted, and they must not be made.
            AccountingError: no theorem, or another adjacency or unit.
        """
        uses = list(uses)  # an iterator would be admitted, and then counted as nothing
        if not self.admits(uses):
            left = self.budget - self.rdp(self._uses)
            raise BudgetExceededError(
                f"the filter of epsilon {self.epsilon:g} at delta {self.delta:g} has {left:.4g} of its Renyi budget "
                f"left, and this takes {self.rdp(uses):.4g}; it must not be released. Add more noise, or release less."
            )
        self._uses += uses

    def uses(self) -> list[Use]:
        """What was counted, in order."""
        return list(self._uses)

    def spent(self) -> float:
        """Epsilon at delta of the releases so far, *if they had been fixed beforehand* (at the best order)."""
        return epsilon_of_rdp(rdp_curve(self._uses), self.delta)

    def odometer(self) -> float:
        """A bound on the privacy loss so far that holds at all times at once, with probability 1 - delta.

        The loss is the log of the ratio of the two neighbours' probabilities of all that was released, on the records
        that there are. exp((alpha - 1) (loss - RDP so far)) is a nonnegative supermartingale that begins at 1: given
        the past, a release's RDP bounds the mean of its factor. So by Ville's inequality the loss never exceeds RDP so
        far + ln(1 / delta) / (alpha - 1), except with probability delta. That is an odometer in the sense of Rogers et
        al. 2016 (arXiv 1605.08294), from above; Whitehouse et al. 2023 (arXiv 2203.05481) build theirs from such
        martingales. It is larger than :meth:`spent`, which no such claim holds for.

        Returns:
            Epsilon, >= 0; 0 before the first release.
        """
        total = self.rdp(self._uses)
        return 0.0 if total == 0 else total + math.log(1 / self.delta) / (self.order - 1)
