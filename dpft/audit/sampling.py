"""What the drawn batches of a run should look like: simulated here, by code that shares nothing with the samplers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from dpft.audit.statistics import Check, against_simulation
from dpft.privacy import PrivacySchedule


def turn_of(schedule: PrivacySchedule) -> int:
    """Number of steps after which an example can be drawn again; 1: in the next one."""
    return 1 if schedule.sampler != "cyclic_poisson" or schedule.strategy is None else schedule.strategy.min_separation


def draw_all(
    rng: np.random.Generator, schedule: PrivacySchedule, examples: int, steps: int, first: int = 0
) -> list[set[int]]:
    """The drawn examples of each step, as the schedule's sampler claims them.

    Which group an example belongs to, or which place it has in a fixed order, is not told: the statistics below do not
    depend on it.

    Args:
        rng: of the simulation.
        schedule: that is claimed.
        examples: N.
        steps: to draw.
        first: number of the first of them; samplers of correlated noise go on counting over a restart.
    """
    size = int(schedule.expected_batch_size)
    drawn: list[set[int]] = []
    order: list[int] = []
    for step in range(steps):
        if schedule.sampler in ("poisson", "truncated_poisson"):
            batch = np.flatnonzero(rng.random(examples) < schedule.sample_rate)
            if schedule.max_batch_size is not None and len(batch) > schedule.max_batch_size:
                batch = rng.permutation(batch)[: schedule.max_batch_size]
        elif schedule.sampler == "fixed_size":
            batch = rng.permutation(examples)[:size]
        elif schedule.sampler == "shuffle":
            order = order or rng.permutation(examples).tolist()
            batch, order = np.array(order[:size]), order[size:]
        elif schedule.sampler == "balls_and_bins":
            batches = -(-examples // size)
            if step % batches == 0:
                order = rng.integers(batches, size=examples).tolist()  # of each example, its batch of the epoch
            batch = np.flatnonzero(np.array(order) == step % batches)
        elif schedule.sampler == "cyclic_poisson":
            turn = turn_of(schedule)
            group = np.arange((first + step) % turn, examples, turn)
            batch = group[rng.random(len(group)) < schedule.sample_rate]
        elif schedule.sampler == "fixed_order":
            start = (first + step) % -(-examples // size) * size
            batch = np.arange(start, min(start + size, examples))
        else:
            raise ValueError(f"an audit knows no sampler {schedule.sampler!r}")
        drawn.append(set(batch.tolist()))
    return drawn


def statistics_of(drawn: Sequence[set[int]], examples: int) -> tuple[float, float, float, float]:
    """Mean size, variance of the sizes, mean overlap of two steps that follow, variance of the counts per example."""
    sizes = np.array([len(batch) for batch in drawn], float)
    overlaps = [len(one & other) for one, other in itertools.pairwise(drawn)]
    counts = np.zeros(examples)
    for batch in drawn:
        counts[list(batch)] += 1.0
    return float(sizes.mean()), float(sizes.var()), float(np.mean(overlaps or [0])), float(counts.var())


def sampling_checks(segments: Sequence[Sequence[set[int]]], schedule: PrivacySchedule, examples: int) -> list[Check]:
    """Tests of the drawn batches.

    Args:
        segments: for each start of the run, the examples drawn at each of its steps; samplers with epochs
            begin one at each start.
        schedule: that was claimed.
        examples: N.
    """

    def statistics(parts: Sequence[Sequence[set[int]]]) -> list[float]:
        of_parts = [statistics_of(part, examples) for part in parts if part]
        weights = [len(part) for part in parts if part]
        return [float(np.average(column, weights=weights)) for column in zip(*of_parts, strict=True)]

    def simulate(rng: np.random.Generator) -> list[float]:
        firsts = itertools.accumulate([len(part) for part in segments], initial=0)
        return statistics(
            [
                draw_all(rng, schedule, examples, len(part), first)
                for part, first in zip(segments, firsts, strict=False)
            ]
        )

    found = statistics(segments)
    names = ("batch size", "variance of the batch size", "overlap of consecutive batches", "variance of the counts")
    claims = (
        "batches have the expected size on average",
        "the sizes vary as the sampler's do",
        "as many examples are in two batches that follow each other as by independent draws of the sampler",
        "every example is drawn as often as by the sampler",
    )
    found_apart = [] if schedule.strategy is None else [separation_check(segments, schedule.strategy.min_separation)]
    return found_apart + [
        Check(name, f"sampler {schedule.sampler}: {claim}", expected, value, p_value)
        for name, claim, value, (expected, p_value) in zip(
            names, claims, found, against_simulation(found, simulate), strict=True
        )
    ]


def separation_check(segments: Sequence[Sequence[set[int]]], claimed: int) -> Check:
    """Whether two steps that share an example are far enough apart; over the starts of the run, too."""
    last: dict[int, int] = {}
    least = sum(map(len, segments))
    for step, batch in enumerate(itertools.chain(*segments)):
        least = min([least, *(step - last[index] for index in batch if index in last)])
        last |= dict.fromkeys(batch, step)
    claim = "two steps that share an example are at least so far apart"
    return Check("separation", claim, float(claimed), float(least), float(least >= claimed))
