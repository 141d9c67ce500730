"""An audit by many independent trials: outputs with a person's data and without, and what telling them apart proves.

    observations of both worlds --> a third of the trials: learn scores, choose score, threshold, direction
                                --> the others: count both kinds of errors of that one guess: epsilon is at least ...

Nothing is assumed about what made the outputs: no law of the noise, no theorem, no accountant. If the output is
(epsilon, delta)-DP, then every event has ``P(event | with) <= exp(epsilon) P(event | without) + delta``, and the same
the other way round (Kairouz, Oh, Viswanath 2015, arXiv 1311.0776; as an audit: Jagielski, Ullman, Oprea 2020, arXiv
2006.07709). Both probabilities are replaced by exact bounds (Clopper and Pearson).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from dpft.audit.statistics import CONFIDENCE, FALSE_ALARM, Samples, proportion_bounds

Score = Callable[[Samples], Samples]
"""Observations ``[n, k]`` -> scores ``[n]``, larger where the person's data are rather there."""
Learner = Callable[[Samples, Samples], Score]
"""Observations with and without a person's data, ``[n, k]`` each, -> a score."""

_THRESHOLDS = 200


@dataclass(frozen=True)
class TwoWorldsAudit:
    """The result of :func:`two_worlds`.

    Attributes:
        claimed_epsilon: what is claimed.
        delta: of claim and bound.
        epsilon_lower: what the guesses prove at 95 % confidence.
        epsilon_lower_sure: the same at 99.99 %, for the verdict.
        attack: name of the score that proved it.
        members: scores of the trials with the person's data that were counted. They depend on the data.
        others: scores of those without. They depend on the data.
    """

    claimed_epsilon: float
    delta: float
    epsilon_lower: float
    epsilon_lower_sure: float
    attack: str
    members: tuple[float, ...] = field(repr=False)
    others: tuple[float, ...] = field(repr=False)

    @property
    def violated(self) -> bool:
        """Whether more is proven than is claimed; of a sound mechanism, by chance in one audit of 10,000."""
        return self.epsilon_lower_sure > self.claimed_epsilon

    @property
    def statement(self) -> str:
        """One sentence."""
        return (
            f"{len(self.members)} trials with a person's data and {len(self.others)} without prove an epsilon of at "
            f"least {self.epsilon_lower:.3g} at delta {self.delta:g} with 95 % confidence (claimed: "
            f"{self.claimed_epsilon:.4g}). "
            + ("**The claim is refuted.**" if self.violated else "It proves no upper bound.")
        )

    def describe(self) -> str:
        """A summary in several lines."""
        return "\n".join(
            [
                f"claimed            epsilon {self.claimed_epsilon:.4g} at delta {self.delta:g}",
                f"audited            epsilon at least {self.epsilon_lower:.4g} (95 % confidence), "
                f"{self.epsilon_lower_sure:.4g} (99.99 %), from {len(self.members)} trials with and "
                f"{len(self.others)} without, by {self.attack}",
                "VIOLATED: the mechanism is not the claimed one" if self.violated else "nothing found",
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {"violated": self.violated, **dataclasses.asdict(self), "scores_depend_on_the_data": True}


def two_worlds(
    members: Samples,
    others: Samples,
    attacks: dict[str, Learner],
    *,
    claimed_epsilon: float,
    delta: float,
) -> TwoWorldsAudit:
    """Prove a lower bound of epsilon from independent trials in two neighbouring worlds.

    Args:
        members: what was released in trials with the person's data, ``[n, k]``.
        others: the same of trials without.
        attacks: names and learners; each makes its score of every third trial, and the others are counted.
        claimed_epsilon: to compare with.
        delta: of the claim.

    Raises:
        ValueError: fewer than 4 trials of a world, or other shapes.
        MissingPackageError: scipy is not installed.
    """
    inside, outside = np.asarray(members, float), np.asarray(others, float)
    if (
        inside.ndim != 2
        or outside.ndim != 2
        or inside.shape[1] != outside.shape[1]
        or min(map(len, (inside, outside))) < 4
    ):
        raise ValueError(
            f"observations of shapes {inside.shape} and {outside.shape}; expected [n, k] of both worlds, n at least 4"
        )
    third = [np.arange(len(observed)) % 3 == 0 for observed in (inside, outside)]
    shown, kept = (inside[third[0]], outside[third[1]]), (inside[~third[0]], outside[~third[1]])
    learnt = {name: learner(*shown) for name, learner in attacks.items()}
    found = {}
    for confidence in (CONFIDENCE, 1.0 - FALSE_ALARM):
        guesses = [
            (*_best(score(shown[0]), score(shown[1]), delta, confidence), name) for name, score in learnt.items()
        ]
        _, guess, name = max(guesses, key=lambda found: found[0])
        counted = (learnt[name](kept[0]), learnt[name](kept[1]))
        found[confidence] = (guess.proven(*counted, delta, confidence), name, counted)
    proven, name, counted = found[CONFIDENCE]
    return TwoWorldsAudit(
        claimed_epsilon=claimed_epsilon,
        delta=delta,
        epsilon_lower=proven,
        epsilon_lower_sure=found[1.0 - FALSE_ALARM][0],
        attack=name,
        members=tuple(counted[0].tolist()),
        others=tuple(counted[1].tolist()),
    )


@dataclass(frozen=True)
class _Guess:
    """An event of the scores, and the world in which it is said to be likelier."""

    threshold: float
    above: bool
    with_it: bool

    def proven(self, inside: Samples, outside: Samples, delta: float, confidence: float) -> float:
        """Lower bound of epsilon from how often the event occurs."""
        counts = [int(((scores > self.threshold) == self.above).sum()) for scores in (inside, outside)]
        (often, of), (rare, among) = zip(counts, (len(inside), len(outside)), strict=True)
        if not self.with_it:
            often, of, rare, among = rare, among, often, of
        share = 1.0 - (1.0 - confidence) / 2.0
        likely, unlikely = proportion_bounds(often, of, share)[0], proportion_bounds(rare, among, share)[1]
        return max(0.0, math.log((likely - delta) / unlikely)) if likely > delta else 0.0


def _best(inside: Samples, outside: Samples, delta: float, confidence: float) -> tuple[float, _Guess]:
    """The guess that would prove most on twice as many of these scores, by Wilson's bounds: near the exact ones."""
    shares = 1 / (1 + np.exp(-np.linspace(-9, 9, _THRESHOLDS)))  # dense at both ends: a rare event proves most
    values = np.unique(np.quantile(np.concatenate([inside, outside]), shares))
    thresholds = (values[1:] + values[:-1]) / 2 if len(values) > 1 else values
    z = NormalDist().inv_cdf(1.0 - (1.0 - confidence) / 2.0)
    found = [(0.0, _Guess(float(thresholds[0]), True, True))]
    for above in (True, False):
        counts = []
        for scores in (inside, outside):
            up_to = np.searchsorted(np.sort(scores), thresholds, "right")
            counts.append((2.0 * (len(scores) - up_to if above else up_to), 2.0 * len(scores)))
        for with_it in (True, False):
            (often, of), (rare, among) = counts if with_it else counts[::-1]
            likely, unlikely = _wilson(often, of, -z) - delta, _wilson(rare, among, z)
            proven = np.log(np.maximum(likely, 1e-300) / unlikely)
            place = int(proven.argmax())
            found.append((float(proven[place]), _Guess(float(thresholds[place]), above, with_it)))
    return max(found, key=lambda one: one[0])


def _wilson(count: npt.NDArray[Any], of: float, z: float) -> npt.NDArray[Any]:
    """Approximate bound of a probability: the upper one for z > 0."""
    return (count + z**2 / 2 + z * np.sqrt(count * (1 - count / of) + z**2 / 4)) / (of + z**2)


# --------------------------------------------------------------------------------------------------- attacks
def as_it_is(inside: Samples, outside: Samples) -> Score:
    """The first number of an observation is the score."""
    return lambda observed: observed[:, 0]


def linear(inside: Samples, outside: Samples) -> Score:
    """Fisher's discriminant: the direction in which the means differ most, over the covariance that was seen.

    Noise that is smaller in some direction, for whatever reason, is found there: nothing is told about it.
    """
    shift = inside.mean(0) - outside.mean(0)
    covariance = np.atleast_2d((np.cov(inside, rowvar=False) + np.cov(outside, rowvar=False)) / 2)
    floor = 1e-9 * float(np.trace(covariance)) / len(covariance) + 1e-300
    direction = np.linalg.solve(covariance + floor * np.eye(len(covariance)), shift)
    return lambda observed: observed @ direction


def spread(inside: Samples, outside: Samples) -> Score:
    """How much the numbers of an observation vary; it finds noise that is the same in all of them."""
    return lambda observed: observed.std(axis=1)


def by_frequency(inside: Samples, outside: Samples) -> Score:
    """For outputs of few values: the ratio of how often each was seen."""
    values = np.unique(np.concatenate([inside[:, 0], outside[:, 0]]))
    counts = [
        (np.searchsorted(np.sort(seen), values, "right") - np.searchsorted(np.sort(seen), values)) + 0.5
        for seen in (inside[:, 0], outside[:, 0])
    ]
    ratios = np.log(counts[0] / len(inside)) - np.log(counts[1] / len(outside))

    def score(observed: Samples) -> Samples:
        place = np.clip(np.searchsorted(values, observed[:, 0]), 0, len(values) - 1)
        return np.where(values[place] == observed[:, 0], ratios[place], 0.0)

    return score
