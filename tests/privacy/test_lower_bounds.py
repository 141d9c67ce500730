"""Lower bounds of delta for what a resumed run really draws, and exactly where the case is small: none above a claim.

Nothing of the accountants is used: in which steps one example is follows a law that is written out here, and that the
samplers are tested against; given these patterns, the likelihoods of all releases are computed in full.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from dpft.privacy import Mechanism, PrivacyConfig, PrivacySchedule, compose_epsilon, epsilon, make_sampler
from dpft.privacy.accounting.accountant import of_one_run

pytest.importorskip("dp_accounting")
stats = pytest.importorskip("scipy.stats")
Floats = npt.NDArray[np.float64]
Pattern = tuple[int, ...]  # the steps that an example is in
EXAMPLES, STEPS, RESUMED, EPOCH = 6, 8, 4, 3  # the seam is in the middle of an epoch, and of a cycle
DELTA = 0.02
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "shuffle": {"sampler": "shuffle"},
    "balls_and_bins": {"sampler": "balls_and_bins"},
    "cyclic_poisson": {"sampler": "cyclic_poisson", "mechanism": "bandmf", "bands": EPOCH, "expected_batch_size": 1},
    "fixed_order": {"sampler": "fixed_order", "mechanism": "blt", "buffers": 2},
}


def schedule_of(name: str) -> PrivacySchedule:
    fields = {"target_delta": DELTA, "expected_batch_size": 2, "noise_multiplier": 1.0, "num_steps": STEPS}
    return PrivacyConfig(**{**fields, **CONFIGURATIONS[name]}).resolve(EXAMPLES)


def claimed(schedule: PrivacySchedule, steps: int = STEPS) -> float:
    """Epsilon at DELTA of a run that was resumed once, as the ledger has it."""
    return compose_epsilon(
        of_one_run([(schedule.mechanism, min(RESUMED, steps)), (schedule.mechanism, max(0, steps - RESUMED))]), DELTA
    )


def one_of_each(blocks: list[range]) -> dict[Pattern, float]:
    """One step of each block, uniformly; those beyond the end of their start are not made."""
    choices = [[(step,) if step < end else () for step in block] for block, end in blocks_with_ends(blocks)]
    law: Counter[Pattern] = Counter()
    for steps in itertools.product(*choices):
        law[sum(steps, ())] += 1 / math.prod(map(len, choices))
    return dict(law)


def blocks_with_ends(blocks: list[range]) -> list[tuple[range, int]]:
    return [(block, RESUMED if block.start < RESUMED else STEPS) for block in blocks]


def law(schedule: PrivacySchedule) -> list[dict[Pattern, float]]:
    """The laws that an example can have: in which steps it is, with which probability."""
    if schedule.sampler in ("shuffle", "balls_and_bins"):
        starts = (*range(0, RESUMED, EPOCH), *range(RESUMED, STEPS, EPOCH))  # an epoch begins at the resume
        return [one_of_each([range(start, start + EPOCH) for start in starts])]
    groups = [range(group, STEPS, EPOCH) for group in range(EPOCH)]
    if schedule.sampler == "fixed_order":
        return [{tuple(group): 1.0} for group in groups]
    q = EPOCH * 1 / EXAMPLES
    return [
        {
            steps: q ** len(steps) * (1 - q) ** (len(group) - len(steps))
            for size in range(len(group) + 1)
            for steps in itertools.combinations(group, size)
        }
        for group in groups
    ]


def drawn(schedule: PrivacySchedule, run: int) -> list[Pattern]:
    """For each example its steps in one run that is resumed."""
    batches = []
    for first, end in ((0, RESUMED), (RESUMED, STEPS)):
        sampler = make_sampler(schedule, EXAMPLES, first_step=first, test_seed=2 * run + (first > 0))
        batches += [set(sampler.draw(step).tolist()) for step in range(first, end)]
    return [tuple(step for step, batch in enumerate(batches) if index in batch) for index in range(EXAMPLES)]


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_an_example_is_in_the_steps_that_the_law_says(name: str) -> None:
    schedule, runs = schedule_of(name), 600
    found = list(zip(*(drawn(schedule, run) for run in range(runs)), strict=True))
    laws = law(schedule)
    for patterns in found:
        fitting = [one for one in laws if set(patterns) <= set(one)]
        assert fitting
        if len(patterns) > 1 and len(fitting[0]) > 1:
            counts = Counter(patterns)
            common = [p for p, share in fitting[0].items() if share * runs >= 5]
            expected = np.array([fitting[0][p] * runs for p in common])
            observed = np.array([counts[p] for p in common], float)
            chi2 = ((observed - expected) ** 2 / expected).sum()
            assert stats.chi2.sf(chi2, len(common)) > 1e-6


def inverse_covariance(schedule: PrivacySchedule) -> Floats:
    """Of the noise in the releases over the clip norm, C^T C / std^2, from the matrix in full."""
    matrix, std = np.eye(STEPS), schedule.noise_multiplier
    if schedule.strategy is not None:
        c = schedule.strategy.coefficients()
        matrix = np.array([[c[i - j] if i >= j else 0.0 for j in range(STEPS)] for i in range(STEPS)])
        std *= schedule.strategy.scale
    return matrix.T @ matrix / std**2


def as_rows(patterns: Any) -> Floats:
    return np.array([[float(step in pattern) for step in range(STEPS)] for pattern in patterns])


def sampled_deltas(one: dict[Pattern, float], precision: Floats, eps: float) -> list[tuple[float, float]]:
    """Delta at ``eps`` and its error: the releases with the example against those without it, and the other way."""
    rng, draws, share = np.random.default_rng(4), 100_000, np.array(list(one.values()))
    rows = as_rows(one)
    z = rng.standard_normal((draws, STEPS)) @ np.linalg.cholesky(np.linalg.inv(precision)).T
    energies = np.einsum("ps,st,pt->p", rows, precision, rows) / 2

    def ratio(y: Floats) -> Floats:
        return np.exp(y @ precision @ rows.T - energies) @ share

    given = z + rows[rng.choice(len(rows), draws, p=share)]
    terms = np.maximum(0, 1 - math.exp(eps) / ratio(given)), np.maximum(0, 1 - math.exp(eps) * ratio(z))
    return [(float(each.mean()), float(each.std()) / math.sqrt(draws)) for each in terms]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["balls_and_bins", "cyclic_poisson"])
def test_a_resumed_run_costs_no_more_than_its_ledger_says(name: str) -> None:
    schedule = schedule_of(name)
    precision, cheaper = inverse_covariance(schedule), []
    for one in law(schedule):
        for delta, error in sampled_deltas(one, precision, claimed(schedule)):
            assert delta - 5 * error <= DELTA
        found = sampled_deltas(one, precision, claimed(schedule, RESUMED))
        cheaper += [delta - 5 * error for delta, error in found]
    assert max(cheaper) > DELTA  # a claim that forgot the second start would be too low, and is seen to be


@pytest.mark.slow
@pytest.mark.parametrize("k", [2, 3])
def test_k_of_all_steps_cost_no_more_than_k_epochs(k: int) -> None:
    """As docs/samplers.md says of random allocation: k epochs of floor(T / k) batches bound it, in both directions."""
    batches = STEPS // k
    epochs = Mechanism(sampler="balls_and_bins", noise_multiplier=1.0, batch_size=1, dataset_size=batches)
    spent = epsilon(epochs, k * batches, DELTA)
    patterns = list(itertools.combinations(range(STEPS), k))
    uniform = dict.fromkeys(patterns, 1 / len(patterns))
    for delta, error in sampled_deltas(uniform, np.eye(STEPS), spent):
        assert delta - 5 * error <= DELTA
    fewer = epsilon(epochs, batches, DELTA)
    assert max(delta - 5 * error for delta, error in sampled_deltas(uniform, np.eye(STEPS), fewer)) > DELTA


@pytest.mark.parametrize("name", ["shuffle", "fixed_order"])
def test_a_resumed_run_whose_order_is_known_costs_no_more_than_its_ledger_says(name: str) -> None:
    """Exactly: one Gaussian for each pattern. The most that one costs is the claim."""
    schedule = schedule_of(name)
    precision, spent = inverse_covariance(schedule), claimed(schedule)

    def delta(row: Floats, eps: float) -> float:
        mu = math.sqrt(row @ precision @ row)
        return float(stats.norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * stats.norm.cdf(-mu / 2 - eps / mu))

    patterns = as_rows([pattern for one in law(schedule) for pattern in one])
    assert max(delta(row, spent) for row in patterns) <= DELTA < max(delta(row, spent * 0.995) for row in patterns)


# ------------------------------------------------------------------------------------- truncated Poisson, exactly
def truncated_sum(others: int, q: float, cap: int, there: bool) -> dict[int, float]:
    """Law of the sum of a cut batch: the example has gradient 1 if it is ``there``, ``others`` have -1."""
    found: Counter[int] = Counter()
    for count in range(others + 1):
        odds = math.comb(others, count) * q**count * (1 - q) ** (others - count)
        found[-min(count, cap)] += odds * (1 - q if there else 1.0)
        if there and count < cap:
            found[1 - count] += odds * q
        elif there:  # of count + 1 examples cap are kept: the example with probability cap / (count + 1)
            kept = cap / (count + 1)
            found[2 - cap] += odds * q * kept
            found[-cap] += odds * q * (1 - kept)
    return dict(found)


@pytest.mark.slow
@pytest.mark.parametrize(("examples", "q", "cap", "sigma"), [(4, 0.5, 1, 1.0), (6, 0.4, 2, 0.8), (6, 0.3, 5, 1.0)])
def test_truncated_poisson_is_above_the_worst_that_others_can_do(
    examples: int, q: float, cap: int, sigma: float
) -> None:
    """One release, by quadrature, in both directions, with N and with N + 1 for the number that is declared."""
    y, step = np.linspace(-cap - 12, 13, 40_001, retstep=True)

    def density(law: dict[int, float]) -> Floats:
        return np.sum([odds * stats.norm.pdf(y, at, sigma) for at, odds in law.items()], axis=0)

    mechanism = Mechanism(
        sampler="truncated_poisson", noise_multiplier=sigma, sample_rate=q, max_batch_size=cap, dataset_size=examples
    )
    for eps in (0.1, 0.5, 1.0, 2.0):
        found = []
        for others in (examples - 1, examples):
            p, without = (density(truncated_sum(others, q, cap, there)) for there in (True, False))
            for one, other in ((p, without), (without, p)):
                found.append(float(np.maximum(0, one - math.exp(eps) * other).sum() * step))
        for delta in found:
            if delta > 1e-9:
                assert epsilon(mechanism, 1, delta) >= eps * (1 - 1e-6)
        if max(found) > 1e-4:  # and not of another order: the bound knows nothing of the others' gradients
            assert epsilon(mechanism, 1, max(found)) <= 4 * eps + 0.5
