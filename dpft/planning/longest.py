"""The longest text that fits: plans of several lengths, of which the next is where the margin is predicted to end."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from dpft.planning.memory import OptimizerName
from dpft.planning.predictor import Predictor
from dpft.planning.result import Plan

__all__ = ["STEP", "Longest", "find_longest"]

# T is a multiple of it.
STEP = 1024
_GIB = 2**30


@dataclass(frozen=True)
class Longest:
    """The result of :func:`dpft.longest`.

    Attributes:
        seq_len: T.
        plan: of that T.
        binds: what does not fit of :data:`STEP` tokens more; ``"nothing"`` where no longer text was tried.
    """

    seq_len: int
    plan: Plan
    binds: str

    def to_dict(self) -> dict[str, Any]:
        """All fields, serialisable to JSON."""
        return {"seq_len": self.seq_len, "binds": self.binds, "plan": self.plan.to_dict()}

    def __str__(self) -> str:
        return f"longest text that fits: {self.seq_len:,} tokens; more: {self.binds}\n\n{self.plan}"


def find_longest(
    predictor: Predictor, batch_size: int, most: int, name: str, optimizer: OptimizerName | None
) -> Longest:
    """The largest multiple of :data:`STEP` up to ``most`` that fits.

    Memory grows with T, nearly in proportion: between a length that fits and one that does not, the next one tried is
    where a straight line between their margins is zero, and the middle where that does not help.
    """
    known: dict[int, float] = {}

    made: dict[int, Predictor] = {}

    def at(units: int) -> Predictor:
        if units not in made:
            made[units] = copy.copy(predictor)
            made[units].restart(units * STEP)
        return made[units]

    def margin(units: int) -> float:
        """Fraction of the device's memory that is left; below 0 also where the host has too little."""
        if units not in known:
            known[units] = at(units).margin(batch_size)
        return known[units]

    if margin(1) < 0:
        raise ValueError(f"not even {STEP} tokens fit: {at(1).short(batch_size)}")
    low, high, probe = 1, most // STEP, min(most // STEP, 64)
    if margin(probe) >= 0:
        high = max(probe, min(high, at(probe).host_limit(batch_size, STEP, high)))
    while low < high:
        if margin(probe) >= 0:
            low = probe
        else:
            high = probe - 1
        if low >= high:
            break
        probe = _next(known, low, high, len(known))
    binds = "nothing" if low == most // STEP else at(low + 1).short(batch_size)
    return Longest(low * STEP, at(low).plan(batch_size, name, optimizer), binds)


def _next(known: dict[int, float], low: int, high: int, tried: int) -> int:
    """Between ``low``, which fits, and ``high``, of which it is not known: it is tried next."""
    beyond = min((n for n in known if known[n] < 0), default=None)
    if beyond is None:
        fits = sorted(n for n in known if n <= low)[-2:]
        slope = (known[fits[0]] - known[fits[-1]]) / max(1, fits[-1] - fits[0])
        guess = low + known[low] / slope if slope > 0 else 2.0 * low
        return max(low + 1, min(high, int(guess), 16 * low))
    if tried % 4 == 3:
        return (low + high + 1) // 2
    guess = low + (beyond - low) * known[low] / (known[low] - known[beyond])
    # At a place where the line ends, it is this or the next one.
    return max(low + 1, min(high, int(guess) if int(guess) > low else low + 1))
