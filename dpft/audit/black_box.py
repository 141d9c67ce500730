"""The black-box audit: random records, each put into the training data by a coin, and looked for in the final model.

    canaries = draw_canaries(1000, tokens=32, vocabulary=len(tokenizer))
    train on the data and canaries.included; the loss of every canary before and after
    black_box(losses_before, losses_after, canaries.coins, claimed_epsilon=..., delta=...)

One training is enough, since every coin is an experiment of its own (Steinke, Nasr & Jagielski 2023,
arXiv 2305.08846).
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dpft.audit.statistics import one_run_epsilon

# Shares of the canaries for which a membership is guessed, half of them "in". The bound pays for each of them.
GUESSED = (0.05, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class Canaries:
    """Random records, and which of them are trained on. Keep it secret until the audit is done.

    Attributes:
        records: token ids of each.
        coins: whether it is in the training data: independent, with probability 1/2.
    """

    records: tuple[tuple[int, ...], ...]
    coins: tuple[bool, ...]

    @property
    def included(self) -> list[tuple[int, ...]]:
        """The records to train on."""
        return [record for record, coin in zip(self.records, self.coins, strict=True) if coin]

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {"records": [list(record) for record in self.records], "coins": list(self.coins)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Canaries:
        """Inverse of :meth:`to_dict`."""
        records = tuple(tuple(int(token) for token in record) for record in values["records"])
        return cls(records, tuple(bool(coin) for coin in values["coins"]))


def draw_canaries(count: int, *, tokens: int, vocabulary: int) -> Canaries:
    """Random records of uniform tokens, with their coins, from the operating system's generator.

    Args:
        count: of canaries, 1 or more. Their number limits what can be proven: 1,000 right guesses prove epsilon 5.4.
        tokens: of each, 2 or more.
        vocabulary: token ids are below it.

    Raises:
        ValueError: a number out of range.
    """
    if count < 1 or tokens < 2 or vocabulary < 2:
        raise ValueError(
            f"{count} canaries of {tokens} tokens, token ids below {vocabulary}; expected at least 1, 2 and 2"
        )
    rng = np.random.default_rng(secrets.randbits(128))
    records = rng.integers(0, vocabulary, (count, tokens))
    return Canaries(tuple(map(tuple, records.tolist())), tuple((rng.random(count) < 0.5).tolist()))


@dataclass(frozen=True)
class BlackBoxAudit:
    """The result of :func:`black_box`.

    Attributes:
        canaries: m.
        guesses: canaries whose membership was guessed, in the attack that proves most.
        right: how many of those guesses are right.
        epsilon_lower: what they prove, at 95 % confidence over all attacks.
        claimed_epsilon: what is claimed; None if the training is not claimed to be private.
        delta: of both.
        members: score of each canary that was trained on: how far its loss fell. They depend on the data.
        others: scores of the others. They depend on the data.
    """

    canaries: int
    guesses: int
    right: int
    epsilon_lower: float
    claimed_epsilon: float | None
    delta: float
    members: tuple[float, ...] = field(repr=False)
    others: tuple[float, ...] = field(repr=False)

    @property
    def violated(self) -> bool:
        """Whether more is proven than is claimed; by chance in at most 5 % of all audits of a sound training."""
        return self.claimed_epsilon is not None and self.epsilon_lower > self.claimed_epsilon

    @property
    def statement(self) -> str:
        """One sentence for a model card."""
        claimed = (
            "no finite epsilon is claimed" if self.claimed_epsilon is None else f"claimed: {self.claimed_epsilon:.4g}"
        )
        return (
            f"An audit with {self.canaries} random canaries, each trained on with probability 1/2, proves an epsilon "
            f"of at least {self.epsilon_lower:.3g} at delta {self.delta:g} with 95 % confidence ({claimed}). "
            + ("**The claim is refuted.**" if self.violated else "It proves no upper bound.")
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {"violated": self.violated, **dataclasses.asdict(self), "scores_depend_on_the_data": True}


def black_box(
    losses_before: Sequence[float],
    losses_after: Sequence[float],
    coins: Sequence[bool],
    *,
    claimed_epsilon: float | None,
    delta: float,
) -> BlackBoxAudit:
    """Attack a trained model: guess which canaries it was trained on, by how far their losses fell.

    The loss before the training is the reference of the likelihood ratio: what is hard for every model says nothing.

    Args:
        losses_before: of each canary, by the model before the training; nats a token, or summed.
        losses_after: the same, by the model after it.
        coins: whether each was trained on.
        claimed_epsilon: to compare with; None if the training is not private.
        delta: of the claim.

    Raises:
        ValueError: different lengths.
        MissingPackageError: scipy is not installed.
    """
    scores = np.asarray(losses_before, float) - np.asarray(losses_after, float)
    member = np.asarray(coins, bool)
    if not len(losses_before) == len(losses_after) == len(coins):
        raise ValueError(
            f"{len(losses_before)} losses before, {len(losses_after)} after and {len(coins)} coins; expected one of "
            "each for every canary"
        )
    scores = np.nan_to_num(scores, nan=0.0)
    # Equal scores in a random order: the order of the canaries must not be a guess.
    order = np.lexsort((np.random.default_rng(secrets.randbits(128)).random(len(scores)), scores))
    best = (-1.0, 0, 0)
    for share in GUESSED:
        half = int(share * len(scores)) // 2
        right = int((~member[order[:half]]).sum() + member[order[len(scores) - half :]].sum()) if half else 0
        proven = one_run_epsilon(len(scores), 2 * half, right, delta, 1.0 - 0.05 / len(GUESSED))
        best = max(best, (proven, 2 * half, right))
    return BlackBoxAudit(
        canaries=len(scores),
        guesses=best[1],
        right=best[2],
        epsilon_lower=best[0],
        claimed_epsilon=claimed_epsilon,
        delta=delta,
        members=tuple(scores[member].tolist()),
        others=tuple(scores[~member].tolist()),
    )
