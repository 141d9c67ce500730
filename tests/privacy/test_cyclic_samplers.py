"""The samplers of correlated noise: every example keeps the distance between its steps that the accounting assumes."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from dpft.errors import PrivacyConfigError
from dpft.privacy import PrivacyConfig, make_sampler
from dpft.privacy.samplers.cyclic_samplers import CyclicPoissonSampler, FixedOrderSampler, spread_order


def steps_of(batches: list[np.ndarray], examples: int) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in range(examples)]
    for step, batch in enumerate(batches):
        assert len(set(batch.tolist())) == len(batch)
        for index in batch:
            found[index].append(step)
    return found


def test_order_is_a_permutation_that_never_changes() -> None:
    assert sorted(spread_order(1000)) == list(range(1000))
    assert spread_order(8).tolist() == ORDER_OF_8
    order = spread_order(100_000)
    assert abs(np.corrcoef(order, np.arange(100_000))[0, 1]) < 0.01  # 3 standard deviations
    assert abs(np.corrcoef(order[1:] % 8, order[:-1] % 8)[0, 1]) < 0.01
    assert order.dtype == np.int64


# SplitMix64 from seed 0 begins e220a8397b1dcdaf 6e789e6aa1b965f4 06c45d188009454f f88bb8a8724c81ec 1b39896a51a8749b
# 53cb9f0c747ea2ea 2c829abe1f4532e1 c584133ac916ab3c (published test vector): sorted, these are
ORDER_OF_8 = [2, 4, 6, 5, 1, 7, 0, 3]


@pytest.mark.parametrize(("examples", "cycle"), [(50, 1), (50, 7), (53, 8), (5, 5)])
def test_cyclic_poisson_draws_an_example_at_every_cycle_th_step_only(examples: int, cycle: int) -> None:
    """Over two starts and two numbers of processes: the groups stay."""
    first = CyclicPoissonSampler(examples, 0.6, cycle)
    second = [CyclicPoissonSampler(examples, 0.6, cycle, rank=rank, world_size=2) for rank in range(2)]
    batches = [first.draw(step) for step in range(41)]
    for step in range(41, 90):
        parts = [sampler.draw(step) for sampler in second]
        assert all((part % 2 == rank).all() for rank, part in enumerate(parts))
        batches.append(np.concatenate(parts))
    drawn = steps_of(batches, examples)
    assert all(len({step % cycle for step in steps}) <= 1 for steps in drawn)
    assert all(steps for steps in drawn)
    sizes = np.bincount([steps[0] % cycle for steps in drawn], minlength=cycle)
    assert sizes.max() - sizes.min() <= 1


def test_cyclic_poisson_includes_each_example_independently_with_the_rate() -> None:
    sampler = CyclicPoissonSampler(40, 0.3, 4, test_seed=1)
    rounds = 2000
    inside = np.zeros((rounds, 40))
    for number in range(rounds):
        for step in range(4):
            inside[number, sampler.draw(4 * number + step)] = 1
    limit = 4.5 * np.sqrt(0.3 * 0.7 / rounds)
    assert np.abs(inside.mean(0) - 0.3).max() < limit
    correlation = np.corrcoef(inside.T) - np.eye(40)
    assert np.abs(correlation).max() < 5 / np.sqrt(rounds)
    repeated = (inside[1:] * inside[:-1]).mean(0)
    assert np.abs(repeated - 0.09).max() < 4.5 * np.sqrt(0.09 * 0.91 / rounds)


def test_cyclic_poisson_draws_afresh() -> None:
    sampler = CyclicPoissonSampler(400, 0.5, 4)
    assert sampler.draw(0).tolist() != sampler.draw(0).tolist()
    assert CyclicPoissonSampler(400, 0.5, 4).draw(0).tolist() != CyclicPoissonSampler(400, 0.5, 4).draw(0).tolist()


@pytest.mark.parametrize(("examples", "batch", "world"), [(20, 5, 1), (23, 5, 1), (23, 5, 3), (3, 3, 1)])
def test_fixed_order_has_each_example_once_per_epoch_at_the_same_place(examples: int, batch: int, world: int) -> None:
    samplers = [FixedOrderSampler(examples, batch, rank=rank, world_size=world) for rank in range(world)]
    apart = -(-examples // batch)
    batches = [np.concatenate([sampler.draw(step) for sampler in samplers]) for step in range(3 * apart)]
    drawn = steps_of(batches, examples)
    assert all(len(steps) == 3 for steps in drawn)
    assert all(after - before == apart for steps in drawn for before, after in itertools.pairwise(steps))
    assert max(map(len, batches)) <= batch
    again = FixedOrderSampler(examples, batch)  # after a resume, on one process
    assert sorted(again.draw(apart + 1)) == sorted(batches[1 % apart])


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: CyclicPoissonSampler(10, 0.0, 2), "sample_rate"),
        (lambda: CyclicPoissonSampler(10, 1.1, 2), "sample_rate"),
        (lambda: CyclicPoissonSampler(10, 0.5, 11), "cycle"),
        (lambda: CyclicPoissonSampler(10, 0.5, 0), "cycle"),
        (lambda: FixedOrderSampler(10, 11), "batch_size"),
        (lambda: FixedOrderSampler(10, 0), "batch_size"),
    ],
)
def test_what_cannot_be_drawn(make: Any, match: str) -> None:
    with pytest.raises(PrivacyConfigError, match=match):
        make()


def test_sampler_of_a_schedule() -> None:
    base: dict[str, Any] = {"target_delta": 1e-3, "expected_batch_size": 6, "num_steps": 12, "noise_multiplier": 1.0}
    bandmf = PrivacyConfig(mechanism="bandmf", bands=4, sampler="cyclic_poisson", **base).resolve(50)
    sampler = make_sampler(bandmf, 50)
    assert isinstance(sampler, CyclicPoissonSampler)
    assert sampler.cycle == 4 and sampler.sample_rate == pytest.approx(24 / 50)
    blt = PrivacyConfig(mechanism="blt", buffers=1, sampler="fixed_order", **base).resolve(50)
    order = make_sampler(blt, 50)
    assert isinstance(order, FixedOrderSampler) and blt.strategy is not None
    assert order.steps_per_epoch == blt.strategy.min_separation == 9
    with pytest.raises(PrivacyConfigError, match="resolve the configuration again"):
        make_sampler(blt, 51)
    with pytest.raises(PrivacyConfigError, match="resolve the configuration again"):
        make_sampler(bandmf, 51)
