"""What is trained: variants of one setting, three values of epsilon, five seeds, and learning rates to tune."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Rows = Iterable[Mapping[str, Any]]

TOKENS, BATCH, STEPS, DELTA, CLIP_NORM = 16, 147, 24, 1e-6, 1.0
EPSILONS = (1.0, 3.0, 8.0)
SEEDS = (0, 1, 2, 3, 4)
TUNED_SEED = 100
DECAYS = (0.5, 0.7, 0.9)

RATES = {"adamw": (5e-3, 1e-2, 2e-2), "adamw_bc": (2.5e-3, 5e-3, 1e-2), "sgd": (0.5, 1.0, 2.0)}
MECHANISMS: dict[str, dict[str, Any]] = {
    "dp_sgd": {},
    "bandmf": {"mechanism": "bandmf", "sampler": "cyclic_poisson"},
    "blt": {"mechanism": "blt", "buffers": 4, "sampler": "fixed_order"},
    "balls_and_bins": {"sampler": "balls_and_bins"},
}
BANDS = {1.0: 2, 3.0: 8, 8.0: 12}
"""Of bandmf: of 2, 4, 8, 12 and 23, the most that the batch allows, those with the least noise in the last weights."""


@dataclass(frozen=True)
class Variant:
    """An optimiser with a mechanism.

    Attributes:
        optimizer: ``sgd``, ``adamw``, or ``adamw_bc``: with the second moment corrected for the noise.
        mechanism: a key of :data:`MECHANISMS`.
        averaged: moving averages of its weights are evaluated, too.
        floor: of ``adamw_bc``.
        constant: the learning rate is, instead of falling in a cosine.
        late: it is trained when all others are.
    """

    optimizer: str
    mechanism: str
    averaged: bool = False
    floor: float | None = None
    constant: bool = False
    late: bool = False

    @property
    def name(self) -> str:
        """In the file of results."""
        words = [self.optimizer, self.mechanism, *([] if self.floor is None else [f"floor {self.floor:g}"])]
        return " ".join([*words, *["constant"] * self.constant])

    @property
    def tuned_as(self) -> str:
        """The variant whose learning rate it takes: that of balls and bins is not tuned by itself."""
        return self.name.replace("balls_and_bins", "dp_sgd")


VARIANTS = (
    Variant("sgd", "dp_sgd"),
    Variant("sgd", "bandmf"),
    Variant("sgd", "blt"),
    Variant("adamw", "dp_sgd", averaged=True),
    Variant("adamw", "bandmf"),
    Variant("adamw", "blt"),
    Variant("adamw_bc", "dp_sgd", floor=0.1),
    Variant("adamw_bc", "dp_sgd", floor=1.0, late=True),
    Variant("adamw", "dp_sgd", averaged=True, constant=True, late=True),
    Variant("adamw", "balls_and_bins", late=True),
    Variant("sgd", "balls_and_bins", late=True),
    Variant("adamw_bc", "dp_sgd", floor=1.0, constant=True, late=True),
    Variant("adamw", "bandmf", constant=True, late=True),
    Variant("adamw", "blt", constant=True, late=True),
    Variant("adamw", "balls_and_bins", constant=True, late=True),
    Variant("sgd", "dp_sgd", constant=True, late=True),
    Variant("sgd", "bandmf", constant=True, late=True),
    Variant("sgd", "blt", constant=True, late=True),
    Variant("sgd", "balls_and_bins", constant=True, late=True),
)


@dataclass(frozen=True)
class Training:
    """One training."""

    variant: Variant
    epsilon: float
    learning_rate: float
    seed: int

    @property
    def key(self) -> tuple[str, float, float, int]:
        """By which a result is found again."""
        return self.variant.name, self.epsilon, self.learning_rate, self.seed


def key_of(row: Mapping[str, Any]) -> tuple[str, float, float, int]:
    """:attr:`Training.key` of a result."""
    return row["variant"], row["epsilon"], row["learning_rate"], row["seed"]


def tuning(rows: Rows) -> list[Training]:
    """The trainings that choose learning rates and have no result yet.

    Three rates for each variant and epsilon; where the best of those tried is the largest or the smallest, twice or
    half as much, too.
    """
    tried = _tried(rows)
    found = []
    for variant, epsilon in itertools.product(VARIANTS, EPSILONS):
        if variant.tuned_as != variant.name:
            continue
        done = tried.get((variant.name, epsilon), {})
        rates = list(RATES[variant.optimizer])
        if done.keys() >= set(rates):
            best = min(done, key=lambda rate: done[rate])
            rates = [best / 2] * (best == min(done)) + [best * 2] * (best == max(done))
        found += [Training(variant, epsilon, rate, TUNED_SEED) for rate in rates if rate not in done]
    return found


def _tried(rows: Rows) -> dict[tuple[str, float], dict[float, float]]:
    """Losses of the tuning trainings by learning rate, of each variant at each epsilon."""
    found: dict[tuple[str, float], dict[float, float]] = defaultdict(dict)
    for row in rows:
        if tunes(row):
            found[row["variant"], row["epsilon"]][row["learning_rate"]] = row["loss"]
    return found


def chosen_rate(rows: Rows, variant: Variant, epsilon: float) -> float:
    """The learning rate with the least loss of the tuning trainings at this epsilon.

    Raises:
        ValueError: there are none.
    """
    tried = _tried(rows).get((variant.tuned_as, epsilon))
    if not tried:
        raise ValueError(
            f"no training tunes the learning rate of {variant.tuned_as!r} at epsilon {epsilon:g}, seed {TUNED_SEED}."
        )
    return min(tried, key=lambda rate: tried[rate])


def chosen_decay(rows: Rows, variant: Variant, epsilon: float) -> str:
    """The decay of a variant's moving average with the least loss, in the tuning training at the chosen rate."""
    rows = list(rows)
    wanted = Training(variant, epsilon, chosen_rate(rows, variant, epsilon), TUNED_SEED).key
    (row,) = (row for row in rows if key_of(row) == wanted)
    return min(row["averaged"], key=lambda decay: row["averaged"][decay])


def tunes(row: Mapping[str, Any]) -> bool:
    """Whether a result chose a learning rate: it is in no table."""
    return bool(row["seed"] == TUNED_SEED)


def measured(rows: Rows) -> list[Training]:
    """The trainings of the tables that have no result yet: seed by seed, so that an early end is balanced."""
    rows = list(rows)
    done = {key_of(row) for row in rows}
    rates = {pair: chosen_rate(rows, *pair) for pair in itertools.product(VARIANTS, EPSILONS)}
    tried = itertools.product((False, True), SEEDS, EPSILONS, VARIANTS)
    found = [Training(v, epsilon, rates[v, epsilon], seed) for late, seed, epsilon, v in tried if v.late == late]
    return [training for training in found if training.key not in done]
