"""The inverse of the accountant: the noise multiplier, or the number of steps, that stays within a budget."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

from dpft.errors import AccountingError, PrivacyConfigError
from dpft.privacy.accounting.accountant import Event, compose_cached, compose_epsilon, least_delta, merged
from dpft.privacy.mechanism import AccountantName, Mechanism

_SMALLEST_NOISE, _LARGEST_NOISE = 0.05, 1e5
_MOST_STEPS = 10**9


def calibrate_noise_multiplier(
    mechanism: Mechanism,
    steps: int,
    target_epsilon: float,
    delta: float,
    *,
    accountant: AccountantName = "pld",
    history: Sequence[Event] = (),
    rel_tol: float = 1e-3,
    coarse: bool = False,
) -> float:
    """The smallest noise multiplier, to ``rel_tol``, whose epsilon is at most ``target_epsilon``.

    Args:
        mechanism: its own noise multiplier is ignored.
        steps: number of releases, >= 1.
        target_epsilon: > 0.
        delta: in (0, 1).
        accountant: ``pld`` or ``rdp``.
        history: earlier releases on the same data.
        rel_tol: how far above the smallest noise multiplier the result may be, relative.
        coarse: end with the coarse grid of :func:`dpft.privacy.discretization`, in a tenth of the time: up to some 3 %
            more noise than is needed.

    Returns:
        The noise multiplier; never too small: its :func:`epsilon` is at most the target.

    Raises:
        AccountingError: no noise multiplier meets the target (the history alone may exceed it), or no theorem.
        PrivacyConfigError: ``steps`` or ``target_epsilon`` out of range.
    """
    if not steps >= 1:
        raise PrivacyConfigError(f"steps={steps!r}; expected a whole number >= 1 to calibrate the noise for.")
    if not (math.isfinite(target_epsilon) and target_epsilon > 0):
        raise PrivacyConfigError(f"target_epsilon={target_epsilon!r}; expected a finite number > 0.")
    past, rel_tol = tuple(merged(history)), max(rel_tol, 1e-9)  # a search for less might never end
    return _calibrate(
        mechanism.with_noise(1.0), steps, float(target_epsilon), float(delta), accountant, past, rel_tol, coarse
    )


def max_steps_within(
    mechanism: Mechanism,
    target_epsilon: float,
    delta: float,
    *,
    accountant: AccountantName = "pld",
    history: Sequence[Event] = (),
    limit: int = _MOST_STEPS,
) -> int:
    """The largest number of further releases whose epsilon, with ``history``, stays at most ``target_epsilon``.

    Args:
        mechanism: of the further releases.
        target_epsilon: the budget.
        delta: in (0, 1).
        accountant: ``pld`` or ``rdp``.
        history: earlier releases on the same data.
        limit: largest number that is considered.

    Returns:
        A number in [0, limit]; 0 if the history alone has spent the budget, or without noise. At most so many as PLD
        composes at this delta.

    Raises:
        AccountingError: as :func:`compose_epsilon`.
    """

    history = tuple(history)  # it is read again for each number of steps

    def within(steps: int) -> bool:
        events = merged([*history, (mechanism, steps)])
        if steps > 1 and accountant == "pld" and mechanism.noise_multiplier > 0 and least_delta(events) > delta:
            return False  # more than have a bound
        return compose_epsilon(events, delta, accountant=accountant) <= target_epsilon

    if mechanism.strategy is not None:
        limit = min(limit, mechanism.strategy.steps)  # it has no more
    if limit < 1 or not within(1):
        return 0
    low, high = 1, 2
    while high < limit and within(high):
        low, high = high, high * 4
    if high >= limit:
        if within(limit):
            return limit
        high = limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if within(middle) else (low, middle)
    return low


@functools.lru_cache(maxsize=64)
def _calibrate(
    mechanism: Mechanism,
    steps: int,
    target: float,
    delta: float,
    accountant: AccountantName,
    past: tuple[Event, ...],
    rel_tol: float,
    coarse: bool,
) -> float:
    def excess(sigma: float, on_coarse: bool) -> float:
        """ln(epsilon / target): at most 0 is within the budget."""
        value = compose_cached((*past, (mechanism.with_noise(sigma), steps)), delta, accountant, on_coarse)
        return math.log(value / target) if value > 0 else -math.inf

    # A coarse search first: its epsilon is an upper bound too, so it errs on the safe side, by a few per cent at most.
    low, high = 1.0, 1.0
    while excess(high, True) > 0:
        low, high = high, high * 2
        if high > _LARGEST_NOISE:
            spent = compose_cached(past, delta, accountant)
            raise AccountingError(
                f"no noise multiplier up to {_LARGEST_NOISE:g} keeps {steps} steps within epsilon {target:g} at "
                f"delta {delta:g} (spent before: {spent:.4g}); raise target_epsilon, take fewer steps or a lower rate."
            )
    while low == high or excess(low, True) <= 0:
        low, high = low / 2, low
        if low < _SMALLEST_NOISE:
            # An epsilon in the thousands protects nothing, and its distribution has millions of points.
            raise AccountingError(
                f"target_epsilon={target:g} is met even by a noise multiplier of {high:g}: such an epsilon protects "
                "nothing; lower target_epsilon, or set noise_multiplier yourself."
            )
    high = _narrow(lambda sigma: excess(sigma, True), low, high, 0.02)[1]
    if coarse:
        return high
    low = high / 1.03
    # The fine epsilon is lower or equal, up to discretisation: widen until the bracket holds for it, then narrow.
    while excess(high, False) > 0:
        low, high = high, high * 1.02
    while excess(low, False) <= 0:
        low, high = low / 1.05, low
    return _narrow(lambda sigma: excess(sigma, False), low, high, rel_tol)[1]


def _narrow(excess: Callable[[float], float], low: float, high: float, rel_tol: float) -> tuple[float, float]:
    """Shrinks a bracket (over budget at ``low``, within it at ``high``) until ``high`` is at the root to ``rel_tol``.

    That is known where the bracket is as narrow, or where ``high`` is as near by the slope of the bracket: an
    evaluation takes seconds, and the other side need not be closed to be safe.
    """
    over, under = excess(low), excess(high)
    while high / low > 1 + rel_tol:
        a, b = math.log(low), math.log(high)
        if math.isfinite(under) and -under * (b - a) <= rel_tol * (over - under):
            break
        # Secant in log-log, where epsilon is nearly linear; shifted slightly to the safe side, so that one more step
        # on the other side closes the bracket. Never nearer to an end than a third of the tolerance.
        step = over / (over - under) if math.isfinite(under) and over > under else 0.5
        guess = a + (b - a) * step + rel_tol / 3
        if guess > b - rel_tol / 3:
            guess = b - max(2 * rel_tol / 3, (b - a) / 4)
        guess = min(max(guess, a + rel_tol / 3), b - rel_tol / 3)
        sigma = math.exp(guess)
        value = excess(sigma)
        if value <= 0:
            high, under = sigma, value
        else:
            low, over = sigma, value
    return low, high
