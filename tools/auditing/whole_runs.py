"""Audits of whole trainings: every mechanism and sampler, by thousands of canaries in one run or two.

The bound is of everything together, from the draws to the composition: dpft's accountant gives the claim, and has no
part in the bound. The attacker sees all releases, and knows the mechanism and what is public of it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import dpft
from dpft.audit import TwoWorldsAudit, two_worlds
from dpft.audit.correlation import strategy_matrix, unit_of_noise
from dpft.audit.two_worlds import as_it_is, linear, spread
from dpft.privacy import CyclicPoissonSampler, FixedOrderSampler
from tools.auditing import likelihood
from tools.auditing.trainings import Numbers, Released, train

DELTA = 0.01  # large: what happens less often cannot be counted, and the theorems hold for every delta
CANARIES = 120_000
USER_ROWS = 3  # of a user where rows are examples, as it is claimed
ROWS_THERE = USER_ROWS  # as it is
NAMES = 1  # of a user in by_user


def claimed(steps: int, batch: float, noise: float, **changes: Any) -> dpft.PrivacyConfig:
    """A configuration with this number of canaries per step, on average."""
    return dpft.PrivacyConfig(
        target_delta=DELTA, expected_batch_size=batch, noise_multiplier=noise, num_steps=steps, **changes
    )


def concluded(score: Numbers, rows: Numbers, released: Released, epsilon: float | None = None) -> TwoWorldsAudit:
    """The audit of canaries with one likelihood ratio each, and their rows for what is learnt."""
    observed = np.column_stack([score, rows])

    def of_rows(learner: Any) -> Any:
        def learn(inside: Numbers, outside: Numbers) -> Any:
            score = learner(inside[:, 1:], outside[:, 1:])
            return lambda found: score(found[:, 1:])

        return learn

    return two_worlds(
        observed[released.present],
        observed[~released.present],
        {"likelihood ratio": as_it_is, "linear discriminant": of_rows(linear), "spread over steps": of_rows(spread)},
        claimed_epsilon=released.schedule.epsilon if epsilon is None else epsilon,
        delta=DELTA,
    )


def _poisson(seed: int, train_options: dict[str, Any], **changes: Any) -> TwoWorldsAudit:
    noise, rate = 1.0, 0.25
    batch = CANARIES * rate
    released = train(claimed(8, batch, noise, **changes), CANARIES, seed, **train_options)
    rows = released.rows / noise
    return concluded(likelihood.poisson(rows, 1 / noise, rate), rows, released)


def poisson(seed: int) -> TwoWorldsAudit:
    """Poisson sampling, independent noise."""
    return _poisson(seed, {})


def secure(seed: int) -> TwoWorldsAudit:
    """The same, with noise on a grid from a cryptographic generator."""
    return _poisson(seed, {}, secure_rng=True)


def groups(seed: int) -> TwoWorldsAudit:
    """Two groups of parameters clipped apart; a canary has a gradient in both."""
    return _poisson(seed, {"tables": 2}, clip_groups={"parts.0": 1.0, "parts.1": 1.0})


def by_user(seed: int) -> TwoWorldsAudit:
    """A user with four rows, of which two are drawn afresh at each participation, is one example."""
    return _poisson(seed, {"rows": 4, "users": NAMES})


def user_rows(seed: int) -> TwoWorldsAudit:
    """Rows are examples, and the unit is a user with three of them."""
    noise, rate, steps = 2.0, 0.25, 6
    batch = CANARIES * ROWS_THERE * rate
    privacy = claimed(steps, batch, noise, unit="user", examples_per_user=USER_ROWS, sample_rate=rate)
    released = train(privacy, CANARIES, seed, rows=ROWS_THERE)
    rows = released.rows / noise
    return concluded(likelihood.binomial(rows, 1 / noise, rate, ROWS_THERE), rows, released)


def balls_and_bins(seed: int) -> TwoWorldsAudit:
    """Each example in one of four batches of an epoch; two epochs."""
    noise, batches = 1.0, 4
    released = train(claimed(8, CANARIES // batches, noise, sampler="balls_and_bins"), CANARIES, seed)
    rows = released.rows / noise
    return concluded(likelihood.balls_and_bins(rows, 1 / noise, batches), rows, released)


def bandmf(seed: int) -> TwoWorldsAudit:
    """Twelve bands, and an example of the step's group drawn with probability 3/4; two turns of the groups."""
    bands, rate, steps, noise = 12, 0.75, 24, 1.0
    batch = CANARIES * rate / bands
    privacy = claimed(steps, batch, noise, mechanism="bandmf", bands=bands, sampler="cyclic_poisson")
    released = train(privacy, CANARIES, seed)
    strategy = released.schedule.strategy
    places = _places(CyclicPoissonSampler(CANARIES, 1.0, bands), bands)
    matrix = strategy_matrix(strategy, steps)
    unit = noise * unit_of_noise(strategy)
    rows = released.rows @ matrix.T / unit
    score = likelihood.cyclic(rows, 1 / unit, rate, places, matrix, bands)
    return concluded(score, _from_the_first(rows, places), released)


def blt(seed: int) -> TwoWorldsAudit:
    """Three buffers; each example in every fourth step, as everybody knows."""
    apart, steps, noise = 4, 16, 1.0
    privacy = claimed(steps, CANARIES // apart, noise, mechanism="blt", buffers=3, sampler="fixed_order")
    released = train(privacy, CANARIES, seed)
    strategy = released.schedule.strategy
    places = _places(FixedOrderSampler(CANARIES, CANARIES // apart), apart)
    matrix = strategy_matrix(strategy, steps)
    unit = noise * unit_of_noise(strategy)
    rows = released.rows @ matrix.T / unit
    taking_part = (np.arange(steps)[None, :] % apart == places[:, None]).astype(float)
    score = likelihood.known_steps(rows, 1 / unit, taking_part, matrix)
    return concluded(score, _from_the_first(rows, places), released)


def account(seed: int) -> TwoWorldsAudit:
    """Two trainings on the same records that pay from one account; the claim is the account's."""
    with tempfile.TemporaryDirectory(prefix="dpft-audit-") as scratch:
        payer = dpft.Account.create(Path(scratch) / "account", epsilon=50, delta=DELTA, composition="pld")
        score, rows = np.zeros(CANARIES), []
        for noise, rate, steps in ((1.0, 0.25, 6), (1.5, 0.5, 4)):
            privacy = claimed(steps, CANARIES * rate, noise, sample_rate=rate)
            released = train(privacy, CANARIES, seed, account=payer)
            rows.append(released.rows / noise)
            score += likelihood.poisson(rows[-1], 1 / noise, rate)
        return concluded(score, np.column_stack(rows), released, payer.spent())


def _places(sampler: Any, turn: int) -> npt.NDArray[np.int64]:
    """The step of a turn in which each example can be drawn, which is public."""
    places = np.zeros(sampler.dataset_size, np.int64)
    for step in reversed(range(turn)):
        places[sampler.draw(step)] = step
    return places


def _from_the_first(rows: Numbers, places: npt.NDArray[np.int64]) -> Numbers:
    """Rows that begin with a canary's first step; those before it come last."""
    return np.take_along_axis(rows, (np.arange(rows.shape[1])[None, :] + places[:, None]) % rows.shape[1], axis=1)
