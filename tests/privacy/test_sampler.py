"""The samplers draw from the distributions that the accountant assumes, and physical batches lose nothing."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch.utils.data import DataLoader

from dpft.errors import PrivacyConfigError
from dpft.privacy import (
    BallsAndBinsSampler,
    FixedSizeSampler,
    LogicalBatchSampler,
    PhysicalBatchSampler,
    PoissonSampler,
    PrivacyConfig,
    ShuffleSampler,
    TruncatedPoissonSampler,
    draw_seed,
    make_sampler,
    physical_batches,
)

MAKERS: dict[str, Callable[..., LogicalBatchSampler]] = {
    "poisson": lambda n, **ranks: PoissonSampler(n, 0.3, **ranks),
    "truncated": lambda n, **ranks: TruncatedPoissonSampler(n, 0.3, max(1, n // 3), **ranks),
    "fixed": lambda n, **ranks: FixedSizeSampler(n, max(1, n // 3), **ranks),
    "shuffle": lambda n, **ranks: ShuffleSampler(n, max(1, n // 3), **ranks),
    "bins": lambda n, **ranks: BallsAndBinsSampler(n, max(1, n // 3), **ranks),
}
# One-in-a-million tests with fixed seeds: they hold or fail for ever, and a biased sampler misses them by far.
TINY = 1e-6


def membership(sampler: LogicalBatchSampler, steps: int) -> np.ndarray:
    """[steps, N] bool: who was in which batch."""
    table = np.zeros((steps, sampler.dataset_size), bool)
    for step in range(steps):
        table[step, sampler.draw(step)] = True
    return table


# --------------------------------------------------------------------------------------------- distributions
def test_poisson_sizes_are_binomial() -> None:
    sizes = membership(PoissonSampler(40, 0.15, test_seed=1), 20_000).sum(1)
    observed = np.bincount(np.clip(sizes, 1, 13), minlength=14)[1:]
    law = stats.binom(40, 0.15)
    expected = 20_000 * np.array([law.cdf(1), *law.pmf(np.arange(2, 13)), law.sf(12)])
    assert stats.chisquare(observed, expected).pvalue > TINY


def test_poisson_includes_each_equally_and_independently() -> None:
    steps, q = 20_000, 0.15
    table = membership(PoissonSampler(40, q, test_seed=2), steps)
    deviations = (table.mean(0) - q) / np.sqrt(q * (1 - q) / steps)
    assert np.abs(deviations).max() < 5 and 0.5 < deviations.std() < 1.5
    # Between examples, and between one step and the next: all correlations are those of independent draws.
    between = np.corrcoef(table.T)[np.triu_indices(40, 1)] * np.sqrt(steps)
    assert np.abs(between).max() < 5.5 and 0.9 < between.std() < 1.1
    in_time = [np.corrcoef(table[:-1, i], table[1:, j])[0, 1] * np.sqrt(steps) for i in range(40) for j in (i, 39 - i)]
    assert np.abs(in_time).max() < 5


def test_truncated_is_poisson_below_the_cap_and_uniform_at_it() -> None:
    table = membership(TruncatedPoissonSampler(40, 0.15, 7, test_seed=3), 20_000)
    sizes = table.sum(1)
    law = stats.binom(40, 0.15)
    expected = 20_000 * np.array([*law.pmf(np.arange(0, 7)), law.sf(6)])
    assert stats.chisquare(np.bincount(sizes, minlength=8), expected).pvalue > TINY
    cut = table[sizes == 7].sum(0)
    assert stats.chisquare(cut).pvalue > TINY  # conservative: draws without replacement vary less


def test_fixed_size_is_uniform_without_replacement() -> None:
    table = membership(FixedSizeSampler(6, 3, test_seed=4), 20_000)
    assert (table.sum(1) == 3).all()
    subsets = np.unique(table @ (1 << np.arange(6)), return_counts=True)[1]
    assert len(subsets) == 20 and stats.chisquare(subsets).pvalue > TINY


def test_shuffle_takes_each_once_an_epoch_in_a_fresh_order() -> None:
    sampler = ShuffleSampler(10, 4, test_seed=5)
    epochs = [[tuple(sampler.draw(3 * e + s)) for s in range(3)] for e in range(200)]
    for epoch in epochs:
        assert [len(batch) for batch in epoch] == [4, 4, 2]
        assert sorted(i for batch in epoch for i in batch) == list(range(10))
    assert len({tuple(epoch) for epoch in epochs}) > 190
    assert stats.chisquare(np.bincount([i for e in epochs for i in e[0]], minlength=10)).pvalue > TINY


def test_shuffle_has_the_batch_of_a_step_laid_down() -> None:
    """Else a batch that was drawn ahead and never released would let an example take part twice in an epoch."""
    sampler = ShuffleSampler(10, 3, first_step=7, test_seed=5)
    first = {step: sampler.draw(step).tolist() for step in range(7, 20)}
    assert [sampler.draw(step).tolist() for step in (19, 8, 12)] == [first[19], first[8], first[12]]
    assert sorted(i for step in range(7, 11) for i in first[step]) == list(range(10))
    with pytest.raises(PrivacyConfigError, match="before this sampler began"):
        sampler.draw(6)


def test_balls_and_bins_puts_each_in_one_batch_uniformly_and_independently() -> None:
    epochs, n = 4000, 12
    sampler = BallsAndBinsSampler(n, 3, test_seed=8)
    table = membership(sampler, 4 * epochs).reshape(epochs, 4, n)
    assert (table.sum(1) == 1).all()
    bins = table.argmax(1)
    for example in range(n):
        assert stats.chisquare(np.bincount(bins[:, example], minlength=4)).pvalue > TINY
    # Independent of another example, of which a fixed-size batch would take the place, and of the epoch before.
    for a, b in ((bins[:, 0], bins[:, 1]), (bins[:, 2], bins[:, 11]), (bins[1:, 0], bins[:-1, 0])):
        assert stats.chisquare(np.bincount(4 * a + b, minlength=16)).pvalue > TINY
    sizes = np.bincount(table.sum(2).ravel(), minlength=n + 1)
    law = 4 * epochs * stats.binom(n, 1 / 4).pmf(np.arange(n + 1))
    assert stats.chisquare([*sizes[:7], sizes[7:].sum()], [*law[:7], law[7:].sum()]).pvalue > TINY


def test_balls_and_bins_has_its_epoch_laid_down() -> None:
    sampler = BallsAndBinsSampler(20, 7, first_step=5, test_seed=5)
    first = {step: sampler.draw(step).tolist() for step in range(5, 14)}
    assert [sampler.draw(step).tolist() for step in (13, 6, 9)] == [first[13], first[6], first[9]]
    assert sorted(i for step in range(5, 8) for i in first[step]) == list(range(20))
    with pytest.raises(PrivacyConfigError, match="before this sampler began"):
        sampler.draw(4)


def test_rate_one_takes_all() -> None:
    assert PoissonSampler(7, 1.0).draw(0).tolist() == list(range(7))


# --------------------------------------------------------------------------------------------------- ranks
@pytest.mark.parametrize("kind", MAKERS)
@given(n=st.integers(1, 40), world=st.integers(1, 6), seed=st.integers(0, 99))
def test_ranks_partition_the_logical_batch(kind: str, n: int, world: int, seed: int) -> None:
    ranks = [MAKERS[kind](n, rank=r, world_size=world, test_seed=seed) for r in range(world)]
    alone = MAKERS[kind](n, test_seed=seed)
    assert sum(sampler.owned for sampler in ranks) == n
    for step in range(3):
        parts = [sampler.draw(step) for sampler in ranks]
        for rank, part in enumerate(parts):
            assert part.dtype == np.int64
            assert (part % world == rank).all() and (np.diff(part) > 0).all() and ((part >= 0) & (part < n)).all()
        if kind != "poisson":  # drawn globally: together exactly what one process would draw
            assert sorted(np.concatenate(parts)) == alone.draw(step).tolist()


def test_poisson_ranks_are_independent_and_complete() -> None:
    # 42 examples: all own 14, so that ranks with one seed would draw the same positions.
    tables = [membership(PoissonSampler(42, 0.15, rank=r, world_size=3, test_seed=6), 20_000) for r in range(3)]
    assert not (tables[0] & tables[1]).any() and not (tables[1] & tables[2]).any()
    together = tables[0] | tables[1] | tables[2]
    deviations = (together.mean(0) - 0.15) / np.sqrt(0.15 * 0.85 / 20_000)
    assert np.abs(deviations).max() < 5
    sizes = [table.sum(1) for table in tables]
    assert abs(np.corrcoef(sizes[0], sizes[1])[0, 1]) * np.sqrt(20_000) < 5
    assert abs(np.corrcoef(tables[0][:, 0], tables[1][:, 1])[0, 1]) * np.sqrt(20_000) < 5


@pytest.mark.parametrize("kind", ["truncated", "fixed", "shuffle", "bins"])
def test_global_draws_need_a_shared_seed(kind: str) -> None:
    with pytest.raises(PrivacyConfigError, match="draw_seed"):
        MAKERS[kind](20, rank=0, world_size=2)
    seed = draw_seed()
    # The seed is a fresh one: of 100 examples none at all is drawn with a chance of 0.7^100 = 3e-16.
    parts = [MAKERS[kind](100, rank=r, world_size=2, shared_seed=seed).draw(0) for r in (0, 1)]
    assert 1 <= len(np.concatenate(parts)) <= 33
    assert not MAKERS[kind](20, shared_seed=seed).seed_is_known


# --------------------------------------------------------------------------------------------------- seeds
@pytest.mark.parametrize("kind", MAKERS)
def test_global_seeds_have_no_say(kind: str) -> None:
    drawn = []
    for _ in range(2):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        drawn.append([MAKERS[kind](1_000).draw(0).tolist(), draw_seed()])
    assert drawn[0][0] != drawn[1][0] and drawn[0][1] != drawn[1][1]
    assert MAKERS[kind](9, test_seed=0).seed_is_known and not MAKERS[kind](9).seed_is_known


@pytest.mark.parametrize("kind", MAKERS)
def test_samplers_cannot_be_copied(kind: str) -> None:
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="copied or pickled"):
            duplicate(MAKERS[kind](9))


@pytest.mark.parametrize("kind", ["poisson", "truncated", "fixed"])
def test_drawing_a_step_again_draws_afresh(kind: str) -> None:
    sampler = MAKERS[kind](1_000, test_seed=0)
    assert sampler.draw(0).tolist() != sampler.draw(0).tolist()


def test_bad_arguments() -> None:
    bad: list[Callable[[], Any]] = [
        lambda: PoissonSampler(0, 0.1),
        lambda: PoissonSampler(9, 0.0),
        lambda: PoissonSampler(9, 1.5),
        lambda: PoissonSampler(9, float("nan")),
        lambda: PoissonSampler(9, 0.1, rank=2, world_size=2),
        lambda: PoissonSampler(9, 0.1, rank=-1, world_size=2),
        lambda: FixedSizeSampler(9, 10),
        lambda: ShuffleSampler(9, 0),
    ]
    for make in bad:
        with pytest.raises(PrivacyConfigError):
            make()


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, PoissonSampler),
        ({"sampler": "truncated_poisson", "max_batch_size": 30}, TruncatedPoissonSampler),
        ({"sampler": "fixed_size", "accountant": "rdp"}, FixedSizeSampler),
        ({"sampler": "shuffle"}, ShuffleSampler),
        ({"sampler": "balls_and_bins"}, BallsAndBinsSampler),
    ],
)
def test_a_plan_gets_the_sampler_it_was_accounted_for(changes: Any, kind: type) -> None:
    config = PrivacyConfig(target_delta=1e-6, noise_multiplier=1, num_steps=5, expected_batch_size=20, **changes)
    schedule = config.resolve(100)
    sampler = make_sampler(schedule, 100, test_seed=0)
    assert type(sampler) is kind
    assert 10 <= np.mean([len(sampler.draw(step)) for step in range(5)]) <= 30
    with pytest.raises(PrivacyConfigError, match="resolved for 100 examples"):
        make_sampler(schedule, 101)


# ------------------------------------------------------------------------------------------ physical batches
@given(size=st.integers(0, 60), rows=st.integers(1, 9), extra=st.integers(0, 4))
def test_physical_batches_hold_all_once_in_equal_rows(size: int, rows: int, extra: int) -> None:
    indices = list(range(100, 100 + size))
    needed = max(1, -(-size // rows))
    for count in (None, needed + extra):
        batches = physical_batches(indices, rows, count, step=3)
        assert len(batches) == (needed if count is None else count)
        assert [i for batch in batches for i in batch.indices] == indices
        assert all(batch.num_rows == rows and batch.num_padding >= 0 and batch.step == 3 for batch in batches)
        assert [batch.is_last for batch in batches] == [False] * (len(batches) - 1) + [True]
    if needed > 1:
        with pytest.raises(PrivacyConfigError, match=f"at least {needed}"):
            physical_batches(indices, rows, needed - 1)


def test_an_empty_logical_batch_is_one_of_padding() -> None:
    (only,) = physical_batches([], 4)
    assert (only.indices, only.num_padding, only.is_last) == ([], 4, True)
    with pytest.raises(PrivacyConfigError):
        physical_batches([], 0)


@pytest.mark.parametrize("kind", MAKERS)
def test_batch_sampler_is_the_logical_batches_cut(kind: str) -> None:
    logical = [MAKERS[kind](30, test_seed=8) for _ in range(2)]
    batches = list(PhysicalBatchSampler(logical[0], 4, num_steps=9, first_step=2))
    assert sum(batch.is_last for batch in batches) == 7
    for step in range(2, 9):
        together = [i for batch in batches if batch.step == step for i in batch.indices]
        assert together == logical[1].draw(step).tolist()


def test_ranks_make_the_same_number_of_passes() -> None:
    seen: list[list[int]] = []
    for rank in range(3):
        sampler = PoissonSampler(31, 0.3, rank=rank, world_size=3, test_seed=9)
        asked: list[int] = []

        def agree(count: int, asked: list[int] = asked) -> int:
            asked.append(count)
            return max(count, 5)

        batches = list(PhysicalBatchSampler(sampler, 2, num_steps=6, agree=agree))
        assert len(asked) == 6 and all(asked)
        seen.append([batch.step for batch in batches])
    assert seen[0] == seen[1] == seen[2] == [step for step in range(6) for _ in range(5)]


@pytest.mark.parametrize("kind", MAKERS)
@given(data=st.data(), world=st.integers(1, 3), rows=st.integers(1, 7))
def test_lengths_change_the_order_within_a_logical_batch_only(
    kind: str, data: st.DataObject, world: int, rows: int
) -> None:
    """On each rank the examples that it draws anyway, in as many physical batches; longest first, ties by index."""
    lengths = data.draw(st.lists(st.integers(0, 9), min_size=30, max_size=30))
    for rank in range(world):
        drawn = MAKERS[kind](30, rank=rank, world_size=world, test_seed=8)
        plain, by_length = (
            list(
                PhysicalBatchSampler(
                    MAKERS[kind](30, rank=rank, world_size=world, test_seed=8),
                    rows,
                    num_steps=7,
                    first_step=2,
                    agree=lambda count: max(count, 3),
                    lengths=given,
                )
            )
            for given in (None, lengths)
        )
        assert [(b.step, b.is_last, b.num_padding) for b in plain] == [
            (b.step, b.is_last, b.num_padding) for b in by_length
        ]
        for step in range(2, 7):
            mine = [i for batch in by_length if batch.step == step for i in batch.indices]
            assert mine == sorted(drawn.draw(step).tolist(), key=lambda i: (-lengths[i], i))


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor, lambda some: np.array(some, np.uint8)])
def test_lengths_of_any_kind_of_sequence(make: Callable[[list[int]], Any]) -> None:
    sampler = PhysicalBatchSampler(PoissonSampler(4, 1.0), 2, num_steps=1, lengths=make([3, 1, 200, 0]))
    assert [batch.indices for batch in sampler] == [[2, 0], [1, 3]]


@pytest.mark.parametrize(
    ("lengths", "found"),
    [
        ([1, 2, 3], r"of shape \[3\].*each of 4 examples"),
        ([], r"of shape \[0\]"),
        (7, r"of shape \[\]"),
        ([[1], [2], [3], [4]], r"of shape \[4, 1\]"),
        ([[1], [2], [3], [4, 5]], "is lists"),
        ([1, 2, -3, 4], r"lengths\[2\] is -3"),
        (np.array([1, 2, 3, 2**63], np.uint64), r"lengths\[3\] is -"),
        ([1.0, 2.0, 3.0, 4.0], "is float64"),
        ([True, False, True, True], "is bool"),
        (["a", "b", "c", "d"], "is <U1"),
        ([1, None, 2, 3], "is object"),
    ],
)
def test_wrong_lengths_are_refused(lengths: Any, found: str) -> None:
    with pytest.raises(PrivacyConfigError, match=found):
        PhysicalBatchSampler(PoissonSampler(4, 0.5), 2, num_steps=1, lengths=lengths)


def test_iteration_begins_where_the_ledger_stands_and_ends_at_the_schedule() -> None:
    released = [0]
    sampler = PhysicalBatchSampler(
        PoissonSampler(30, 0.2, test_seed=1), 4, num_steps=5, first_step=lambda: released[0]
    )
    for batch in sampler:
        released[0] += batch.is_last
        if batch.step == 2:
            break
    rest = list(sampler)
    assert {batch.step for batch in rest} == set(range(released[0], 5))
    released[0] = 5
    assert list(sampler) == []


def test_a_torch_dataloader_takes_it() -> None:
    class Rows(torch.utils.data.Dataset[Any]):
        def __getitems__(self, batch: Any) -> Any:
            return batch

    sampler = PhysicalBatchSampler(PoissonSampler(30, 0.2), 4, num_steps=3)
    loader: Any = DataLoader(Rows(), batch_sampler=sampler, collate_fn=lambda batch: batch)  # type: ignore[arg-type]  # a batch here is more than a list of indices
    assert sum(batch.is_last for batch in loader) == 3
