"""The cost of correlated noise: against dp_accounting, the analytic Gaussian, and simulated releases."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from dpft.errors import AccountingError, PrivacyConfigError
from dpft.privacy import (
    AdaptiveClip,
    EpsilonMeter,
    Ledger,
    Mechanism,
    PrivacyConfig,
    PrivacySchedule,
    compose_epsilon,
    epsilon,
    max_steps_within,
    privacy_report,
    privacy_statement_markdown,
)
from dpft.privacy.accounting.accountant import of_one_run
from dpft.privacy.correlated.strategy import Strategy
from tests.privacy.test_correlated import banded, blt, dense

pytest.importorskip("dp_accounting")
DELTA = 1e-5
WEIGHTS = (1.0, 0.7, 0.6, 0.5)


def cyclic(sigma: float = 1.0, q: float = 0.05, steps: int = 40, weights: tuple[float, ...] = WEIGHTS) -> Mechanism:
    return Mechanism(sampler="cyclic_poisson", noise_multiplier=sigma, sample_rate=q, strategy=banded(steps, weights))


def fixed(sigma: float = 1.0, steps: int = 40, apart: int = 10) -> Mechanism:
    return Mechanism(
        sampler="fixed_order",
        noise_multiplier=sigma,
        batch_size=10,
        dataset_size=10 * apart,
        strategy=blt(steps, apart, (0.2, 0.3), (0.98, 0.6)),
    )


def poisson(sigma: float = 1.0, q: float = 0.05) -> Mechanism:
    return Mechanism(sampler="poisson", noise_multiplier=sigma, sample_rate=q)


def gaussian_delta(sigma: float, eps: float) -> float:
    """Balle & Wang 2018, Theorem 8, at sensitivity 1."""
    phi = pytest.importorskip("scipy.stats").norm.cdf
    return float(phi(0.5 / sigma - eps * sigma) - math.exp(eps) * phi(-0.5 / sigma - eps * sigma))


# ------------------------------------------------------------------------------------------------ the theorems
def test_bandmf_with_one_band_costs_what_poisson_does() -> None:
    for steps in (1, 7, 40):
        one = cyclic(weights=(1.0,))
        assert epsilon(one, steps, DELTA) == pytest.approx(epsilon(poisson(), steps, DELTA))
        renyi = epsilon(poisson(), steps, DELTA, accountant="rdp")
        assert epsilon(one, steps, DELTA, accountant="rdp") == pytest.approx(renyi)


@pytest.mark.parametrize("steps", [1, 5, 40])
def test_bandmf_is_the_composition_of_one_release_for_each_participation(steps: int) -> None:
    """What jax_privacy's ``amplified_bandmf_event`` hands to dp_accounting: ceil(steps / bands) sampled Gaussians."""
    import dp_accounting

    one = dp_accounting.PoissonSampledDpEvent(0.05, dp_accounting.GaussianDpEvent(1.0))
    event = dp_accounting.SelfComposedDpEvent(one, math.ceil(steps / 4))
    exact = dp_accounting.pld.PLDAccountant(value_discretization_interval=2e-4).compose(event).get_epsilon(DELTA)
    assert exact * 0.999 <= epsilon(cyclic(), steps, DELTA) <= exact * 1.02
    assert epsilon(cyclic(), steps, DELTA) == epsilon(cyclic(), 4 * math.ceil(steps / 4), DELTA)
    renyi = dp_accounting.rdp.RdpAccountant().compose(event).get_epsilon(DELTA)
    assert epsilon(cyclic(), steps, DELTA, accountant="rdp") == pytest.approx(renyi)


@pytest.mark.parametrize("steps", [1, 10, 11, 25, 40])
def test_blt_is_one_gaussian_with_the_sensitivity_of_all_participations(steps: int) -> None:
    mechanism = fixed(1.5)
    assert mechanism.strategy is not None
    columns = dense(mechanism.strategy)[:steps, :steps:10]
    sigma = 1.5 * mechanism.strategy.scale / np.linalg.norm(columns.sum(1))
    spent = epsilon(mechanism, steps, DELTA)
    assert gaussian_delta(sigma, spent) <= DELTA < gaussian_delta(sigma, spent * 0.99)
    assert epsilon(mechanism, steps, DELTA, accountant="rdp") >= spent * 0.999
    if steps == 40:
        assert sigma == pytest.approx(1.5)  # the noise multiplier is that of the whole training


def simulated_delta(matrix: np.ndarray, steps: list[int], q: float, std: float, eps: float, draws: int) -> np.ndarray:
    """Terms whose mean is the delta at ``eps`` of C x + z with the example against C x + z without it.

    By the likelihoods of all participations of the example: nothing of the theorem is used.
    """
    rng = np.random.default_rng(5)
    patterns = np.zeros((2 ** len(steps), len(matrix)))
    patterns[:, steps] = list(itertools.product((0.0, 1.0), repeat=len(steps)))
    count = patterns.sum(1)
    probability = q**count * (1 - q) ** (len(steps) - count)
    means = patterns @ matrix.T
    drawn = means[rng.choice(len(patterns), draws, p=probability)] + rng.normal(0, std, (draws, len(matrix)))
    exponents = (drawn @ means.T - (means**2).sum(1) / 2) / std**2
    losses = np.log(np.exp(exponents) @ probability)
    return np.maximum(0, 1 - np.exp(eps - losses))


def test_simulated_releases_of_bandmf_lie_below_the_epsilon_and_near_it() -> None:
    mechanism, delta = cyclic(0.8, 0.3, steps=12), 0.02
    assert mechanism.strategy is not None
    matrix, std = dense(mechanism.strategy), 0.8 * mechanism.strategy.scale
    bound = epsilon(mechanism, 12, delta)
    terms = simulated_delta(matrix, [0, 4, 8], 0.3, std, bound, 200_000)
    error = 4 * terms.std() / math.sqrt(len(terms))
    assert terms.mean() - error < delta
    assert simulated_delta(matrix, [0, 4, 8], 0.3, std, 0.97 * bound, 200_000).mean() - error > delta  # it is tight
    # An example that is drawn at steps 3 apart breaks what the theorem assumes, and the bound with it.
    wrong = simulated_delta(matrix, [0, 3, 6, 9], 0.3, std, bound, 200_000)
    assert wrong.mean() - error > delta


@pytest.mark.parametrize("make", [cyclic, fixed])
def test_epsilon_is_monotone_in_noise_and_steps_and_has_its_limits(make: Any) -> None:
    at = [[epsilon(make(sigma), steps, DELTA) for steps in (1, 4, 5, 17, 40)] for sigma in (0.8, 1.0, 2.0)]
    assert all(one <= other * (1 + 1e-9) for row in at for one, other in itertools.pairwise(row))
    assert all(one > other for column in zip(*at, strict=True) for one, other in itertools.pairwise(column))
    assert epsilon(make(0.0), 1, DELTA) == math.inf
    assert epsilon(make(1.0), 0, DELTA) == 0.0


def test_epsilon_is_monotone_in_the_rate_up_to_no_sampling() -> None:
    found = [epsilon(cyclic(2.0, q), 40, DELTA) for q in (0.01, 0.1, 0.5, 1.0)]
    assert found == sorted(found)
    # At rate 1 an example is in 10 steps for certain: a Gaussian with 1 / sqrt(10) of the noise.
    assert (
        gaussian_delta(2.0 / math.sqrt(10), found[-1]) <= DELTA < gaussian_delta(2.0 / math.sqrt(10), found[-1] * 0.99)
    )


# ------------------------------------------------------------------------------------------- what is one training
@pytest.mark.parametrize("make", [cyclic, fixed])
def test_starts_of_one_run_are_one_training_and_two_entries_are_two(make: Any) -> None:
    mechanism = make(1.0)
    parts = [(mechanism, 5), (mechanism, 0), (mechanism, 6)]
    assert of_one_run(parts) == [(mechanism, 11)]
    joined, apart = compose_epsilon(of_one_run(parts), DELTA), compose_epsilon(parts, DELTA)
    assert joined == epsilon(mechanism, 11, DELTA) < apart
    history = [(mechanism, 5)]
    meter = EpsilonMeter(mechanism, DELTA, 35, history=history)
    assert meter.exact(6) == joined <= meter.at(6) <= meter.exact(35) == epsilon(mechanism, 40, DELTA)
    shuffle = Mechanism(sampler="shuffle", noise_multiplier=1.0, batch_size=5, dataset_size=10)
    assert of_one_run([(shuffle, 1), (shuffle, 1)]) == [(shuffle, 1), (shuffle, 1)]


def test_more_steps_than_planned_have_no_epsilon() -> None:
    for mechanism in (cyclic(), fixed()):
        with pytest.raises(AccountingError, match="41 steps with correlated noise that was made for 40"):
            epsilon(mechanism, 41, DELTA)
        assert max_steps_within(mechanism, 1e6, DELTA) == 40


def test_other_mechanisms_on_the_same_data_compose() -> None:
    both = compose_epsilon([(cyclic(), 40), (poisson(), 100)], DELTA)
    assert both > max(epsilon(cyclic(), 40, DELTA), epsilon(poisson(), 100, DELTA))
    with pytest.raises(AccountingError, match="different adjacencies"):
        compose_epsilon(
            [(cyclic(), 1), (Mechanism(sampler="fixed_size", noise_multiplier=1.0, batch_size=1, dataset_size=9), 1)],
            DELTA,
            accountant="rdp",
        )


# --------------------------------------------------------------------------------------------------- mechanisms
@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"sampler": "cyclic_poisson", "sample_rate": 0.1}, PrivacyConfigError, "needs strategy"),
        ({"sampler": "poisson", "sample_rate": 0.1, "strategy": banded(4, (1.0,))}, PrivacyConfigError, "no strategy"),
        (
            {"sampler": "cyclic_poisson", "sample_rate": 0.1, "strategy": blt(9, 3, (0.1,), (0.5,))},
            AccountingError,
            "expected 'bandmf'",
        ),
        (
            {"sampler": "fixed_order", "batch_size": 4, "dataset_size": 9, "strategy": blt(9, 4, (0.1,), (0.5,))},
            AccountingError,
            "come round every 3 steps",
        ),
        (
            {
                **{"sampler": "cyclic_poisson", "sample_rate": 0.1, "strategy": banded(4, (1.0,))},
                **{"unit": "user", "examples_per_user": 2},
            },
            AccountingError,
            "unit='user'",
        ),
    ],
)
def test_mechanisms_without_a_theorem_are_refused(fields: Any, error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        Mechanism(noise_multiplier=1.0, **fields)


def test_mechanism_as_data() -> None:
    for mechanism in (cyclic(), fixed()):
        assert Mechanism.from_dict(json.loads(json.dumps(mechanism.to_dict()))) == mechanism
        assert mechanism.adjacency == "zero_out"
    assert "strategy" not in poisson().to_dict()
    assert cyclic().sensitivity == f"{math.sqrt(1 + 0.49 + 0.36 + 0.25):.6g} C in C x for each participation, " + (
        "which are 4 steps apart"
    )


# ----------------------------------------------------------------------------------------- configuration, report
BANDMF: Any = {"mechanism": "bandmf", "bands": 4, "sampler": "cyclic_poisson"}
BLT: Any = {"mechanism": "blt", "buffers": 2, "sampler": "fixed_order"}


def config(**fields: Any) -> PrivacyConfig:
    base: dict[str, Any] = {"target_delta": 1e-5, "expected_batch_size": 20, "num_steps": 60}
    if "target_epsilon" not in fields:
        base["noise_multiplier"] = 1.0
    return PrivacyConfig(**{**base, **fields})


@pytest.mark.parametrize("fields", [BANDMF, BLT], ids=["bandmf", "blt"])
def test_resolving(fields: Any) -> None:
    schedule = config(target_epsilon=2.0, **fields).resolve(410)
    assert 1.99 < schedule.epsilon <= 2.0
    assert schedule.epsilon == epsilon(schedule.mechanism, 60, 1e-5)
    strategy = schedule.strategy
    assert strategy is not None and schedule.mechanism.strategy == strategy and strategy.steps == 60
    assert strategy.min_separation == (4 if fields is BANDMF else 21)
    assert strategy.memory == (3 if fields is BANDMF else 2)
    assert schedule.sample_rate == pytest.approx(4 * 20 / 410 if fields is BANDMF else 20 / 410)
    assert schedule.dataset_size == 410
    assert PrivacySchedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule
    assert f"keeps {strategy.memory} vectors" in schedule.describe()
    again = PrivacyConfig.from_dict(json.loads(json.dumps(config(target_epsilon=2.0, **fields).to_dict())))
    assert again.fingerprint() == schedule.config_fingerprint


def test_without_correlated_noise_nothing_new_is_written() -> None:
    assert not {"mechanism", "bands", "buffers", "item"} & set(config().to_dict())
    assert "strategy" not in config().resolve(410).to_dict()


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"mechanism": "tree"}, "expected one of dp_sgd, bandmf, blt"),
        ({"mechanism": "bandmf", "sampler": "cyclic_poisson"}, "give bands exactly"),
        ({"bands": 4}, "give bands exactly"),
        ({"mechanism": "blt", "sampler": "fixed_order"}, "give buffers exactly"),
        ({**BLT, "bands": 4}, "give bands exactly"),
        ({**BANDMF, "sampler": "poisson"}, "expected bandmf with cyclic_poisson"),
        ({**BANDMF, "sampler": "fixed_order"}, "expected bandmf with cyclic_poisson"),
        ({"sampler": "cyclic_poisson"}, "dp_sgd with another sampler"),
        ({**BANDMF, "sample_rate": 0.1}, "Leave sample_rate out"),
        ({**BLT, "sample_rate": 0.1}, "Leave sample_rate out"),
        ({**BLT, "expected_batch_size": 2.5}, "expected a whole number"),
        ({**BANDMF, "secure_rng": True}, "Leave one of them out"),
        ({**BANDMF, "bands": 0}, "bands=0"),
        ({**BLT, "buffers": 2.0}, "buffers=2.0"),
    ],
    ids=str,
)
def test_configurations_that_contradict_themselves(fields: Any, match: str) -> None:
    with pytest.raises(PrivacyConfigError, match=match):
        config(**fields)


def test_more_bands_than_the_data_allow() -> None:
    assert config(**{**BANDMF, "bands": 20}).resolve(410).mechanism.sample_rate == pytest.approx(400 / 410)
    assert 9 / 7 / 9 * 7 > 1  # whole groups: rounded, their rate is above 1
    whole = config(**{**BANDMF, "bands": 7, "expected_batch_size": 9 / 7}).resolve(9)
    assert whole.mechanism.sample_rate == 1.0
    with pytest.raises(PrivacyConfigError, match="expected at most 20 bands"):
        config(**{**BANDMF, "bands": 21}).resolve(410)
    with pytest.raises(PrivacyConfigError, match="1 to the number of steps"):
        config(**{**BANDMF, "num_steps": 3}).resolve(410)


@pytest.mark.parametrize("fields", [BANDMF, BLT], ids=["bandmf", "blt"])
def test_ledger_and_statement_of_an_interrupted_run(fields: Any, tmp_path: Path) -> None:
    """Stopped after 30 of 60 steps, in two starts: the statement is that of 30 steps of one training."""
    schedule = config(**fields).resolve(410)
    starts: list[tuple[Literal["new", "resume"], int]] = [("new", 13), ("resume", 17)]
    for mode, count in starts:
        with Ledger.open(tmp_path / "ledger", mode, mechanism=schedule.mechanism) as ledger:
            for _ in range(count):
                ledger.record()
    assert ledger.events() == [(schedule.mechanism, 30)]
    content = Ledger.read(tmp_path / "ledger")
    assert content.events == ((schedule.mechanism, 13), (schedule.mechanism, 17))
    report = json.loads(json.dumps(privacy_report(schedule, content, clipping="flash")))
    assert report["epsilon_spent"] == epsilon(schedule.mechanism, 30, 1e-5) < report["epsilon_planned"]
    assert report["steps_released"] == 30 and report["neighbours"] == "the gradient of one example is replaced by zero"
    text = privacy_statement_markdown(report)
    assert "matrix factorisation" in text and "60 x 60, lower triangular Toeplitz" in text
    # An outsider computes the scale of the noise from the numbers in the statement alone.
    strategy = Strategy.from_dict(report["strategy"])
    columns = dense(strategy)[:, :: 60 if fields is BANDMF else 21]
    assert f"noise multiplier x {np.linalg.norm(columns.sum(1)):.10g} x C" in text


@pytest.mark.parametrize("fields", [{}, {"adaptive_clip": AdaptiveClip(count_noise=2.0)}, BANDMF, BLT])
def test_noise_in_the_sums_is_that_of_the_matrices(fields: Any) -> None:
    schedule = config(**fields).resolve(410)
    steps, sigma = schedule.num_steps, schedule.sum_noise_multiplier
    inverse = np.eye(steps)
    if schedule.strategy is not None:
        inverse = np.linalg.inv(dense(schedule.strategy)) * schedule.strategy.scale
    rows = np.tril(np.ones((steps, steps))) @ inverse * sigma
    assert schedule.noise_in_sums == pytest.approx(math.sqrt((rows**2).sum(1).mean()))
