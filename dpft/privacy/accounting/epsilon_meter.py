"""Epsilon after a number of releases, cheap enough for a progress bar."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dpft.privacy.accounting import accountant as accounting
from dpft.privacy.accounting.accountant import Event
from dpft.privacy.mechanism import AccountantName, Mechanism

_GRID = 48


class EpsilonMeter:
    """Epsilon after a number of releases, cheap enough to compute at every step, and never below the exact value.

    :meth:`at` evaluates about 48 step counts only, rounding the steps up to the next of them, with a coarser
    discretisation, whose epsilon is an upper bound too. It is monotone, and equals :meth:`exact` at the horizon.
    *Measured*, q = 0.018, sigma = 0.53, all 120 steps of a training together, on one core: 0.5 s, and at most 2 %
    above the exact values from step 10 on, which take 0.02 s each.

    After a resume, count from there, and pass the earlier releases as ``history``, which the meter adds::

        history, before = ledger.events(), ledger.count
        meter = EpsilonMeter(schedule.mechanism, schedule.target_delta, schedule.num_steps - before, history=history)
        meter.at(ledger.count - before)

    Args:
        mechanism: of one release.
        delta: in (0, 1).
        horizon: the planned number of releases, >= 1.
        accountant: ``pld`` or ``rdp``.
        history: earlier releases on the same data; ``steps`` does not count them. With correlated noise those of
            earlier starts of this training: its noise goes on over them. What another training released, even with
            an equal mechanism, has noise of its own: compose it with :func:`~dpft.privacy.compose_epsilon`.
    """

    def __init__(
        self,
        mechanism: Mechanism,
        delta: float,
        horizon: int,
        *,
        accountant: AccountantName = "pld",
        history: Sequence[Event] = (),
    ) -> None:
        accounting.check_supported(mechanism, accountant)
        self.mechanism, self.delta, self.accountant = mechanism, delta, accountant
        self.horizon = max(1, int(horizon))
        self.history = tuple(history)

    def at(self, steps: int) -> float:
        """An upper bound on :meth:`exact`, and equal to it at the horizon.

        It is a few per cent above under Poisson sampling, and more where epsilon rises in jumps (balls and bins, BLT).

        Args:
            steps: releases so far, >= 0.

        Returns:
            Epsilon; inf without noise.
        """
        if steps <= 0 or steps == self.horizon:
            return self.exact(steps)
        events = tuple(accounting.merged(self._events(self._rounded_up(steps))))
        bound = accounting.compose_cached(events, self.delta, self.accountant, True)
        return min(bound, self.exact(self.horizon)) if steps < self.horizon else max(bound, self.exact(self.horizon))

    def exact(self, steps: int) -> float:
        """The accountant's epsilon after ``steps`` releases; takes up to a second."""
        return accounting.compose_epsilon(self._events(steps), self.delta, accountant=self.accountant)

    def _events(self, steps: int) -> list[Event]:
        return accounting.of_one_run([*self.history, (self.mechanism, steps)])

    def _rounded_up(self, steps: int) -> int:
        if self.horizon <= _GRID:
            return steps
        # Quadratic spacing: epsilon grows about as the square root of the steps, so its increments are equal.
        nth = math.ceil(_GRID * math.sqrt(steps / self.horizon) - 1e-9)
        return max(steps, math.ceil(self.horizon * (nth / _GRID) ** 2))
