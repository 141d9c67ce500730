"""`PrivateDataLoader`: every drawn example once, padding rows that count nothing, and an end."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset, default_collate

import dpft
from dpft.errors import PrivacyConfigError
from dpft.privacy import PhysicalBatchSampler, make_sampler
from tests.training import config, examples

N = 12


def batches(schedule: dpft.PrivacySchedule, rows: int, seed: int | None = 3, first: int = 0) -> PhysicalBatchSampler:
    return PhysicalBatchSampler(
        make_sampler(schedule, N, test_seed=seed), rows, num_steps=schedule.num_steps, first_step=first
    )


def schedule(**changes: Any) -> dpft.PrivacySchedule:
    return config(**changes).resolve(N)


def numbered() -> list[dict[str, Any]]:
    """Example i says i."""
    return [{"labels": torch.full((3,), i), "number": i} for i in range(N)]


def load(dataset: Any = None, rows: int = 4, **options: Any) -> dpft.PrivateDataLoader:
    sampler = options.pop("batches", None) or batches(schedule(num_steps=options.pop("num_steps", 3)), rows)
    dataset = numbered() if dataset is None else dataset
    return dpft.PrivateDataLoader(dataset, sampler, options.pop("collate", None), **options)


def real(batch: dict[str, Any]) -> list[int]:
    return batch["number"][batch["example_weight"] > 0].tolist()


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_yields_the_drawn_examples_in_their_logical_batches(static: bool, workers: int) -> None:
    p = schedule(num_steps=4)
    drawn = make_sampler(p, N, test_seed=3)
    expected = [drawn.draw(step).tolist() for step in range(4)]
    assert len({len(indices) for indices in expected}) > 1 and any(len(i) % 4 for i in expected)
    loader = load(batches=batches(p, 4), static_shapes=static, num_workers=workers)
    got: list[list[int]] = [[] for _ in range(4)]
    ends = Counter[int]()
    for batch in loader:
        rows = len(batch["example_weight"])
        assert rows == 4 if static else rows == len(real(batch))
        assert batch["example_weight"].dtype == torch.float32
        assert (batch["labels"][:, 0] == batch["number"]).eq(batch["example_weight"] > 0).all()
        got[loader.step] += real(batch)
        ends[loader.step] += loader.is_last
    assert got == expected
    assert ends == {0: 1, 1: 1, 2: 1, 3: 1} and loader.is_last and loader.num_steps == 4


def test_is_last_only_on_the_last_of_a_logical_batch_and_the_callback_agrees() -> None:
    p = schedule(sample_rate=1.0, num_steps=2)
    seen: list[tuple[int, bool]] = []
    loader = load(batches=batches(p, 5), on_batch=lambda step, last, rows, padding: seen.append((step, last)))
    flags = [(loader.step, loader.is_last, len(b["number"])) for b in loader]
    assert flags == [(0, False, 5), (0, False, 5), (0, True, 2), (1, False, 5), (1, False, 5), (1, True, 2)]
    assert seen == [(step, last) for step, last, _ in flags]
    assert not load().is_last  # before anything was yielded, nothing ends


def test_ends_after_the_plan_and_begins_where_the_ledger_stands() -> None:
    p = schedule(num_steps=5)
    count = 2
    sampler = PhysicalBatchSampler(make_sampler(p, N, test_seed=3), 4, num_steps=p.num_steps, first_step=lambda: count)
    loader = load(batches=sampler)
    assert sorted({loader.step for _ in loader}) == [2, 3, 4]
    count = 5
    assert list(loader) == []


@pytest.mark.parametrize("static", [False, True])
def test_an_empty_logical_batch_is_rows_of_weight_zero(static: bool) -> None:
    p = schedule(sample_rate=1e-9, num_steps=2)
    loader = load(batches=batches(p, 4), static_shapes=static)
    steps = []
    for batch in loader:
        rows = 4 if static else 1
        assert batch["example_weight"].tolist() == [0.0] * rows
        assert (batch["labels"] == -100).all() and batch["labels"].shape == (rows, 3)
        assert loader.is_last
        steps.append(loader.step)
    assert steps == [0, 1]


@pytest.mark.parametrize("collate", ["copying", "views"])
def test_padding_labels_are_masked_without_touching_the_dataset(collate: str) -> None:
    """A collator that returns views of the data's own tensors must not have them overwritten."""
    whole = torch.arange(3 * N).view(N, 3).clone()
    before = whole.clone()

    def views(items: list[int]) -> dict[str, Tensor]:
        if len(items) == 1:
            return {"labels": whole[items[0] : items[0] + 1]}
        return {"labels": whole[items] if collate == "copying" else whole[items[0]].expand(len(items), 3)}

    p = schedule(sample_rate=0.1, num_steps=30)
    padded = 0
    for batch in load(list(range(N)), batches=batches(p, 3), collate=views, static_shapes=True):
        weight = batch["example_weight"]
        assert (batch["labels"][weight == 0] == -100).all() and (batch["labels"][weight > 0] >= 0).all()
        assert weight.sort(descending=True).values.equal(weight)
        padded += int((weight == 0).sum())
    for batch in load(list(range(N)), batches=batches(schedule(sample_rate=1e-9), 1), collate=views):
        assert (batch["labels"] == -100).all()
    assert padded > 30 and torch.equal(whole, before)


def test_only_labels_are_changed_in_padding_rows() -> None:
    dataset = examples(N)
    for batch in load(dataset, batches=batches(schedule(), 16), static_shapes=True):
        weight = batch["example_weight"]
        assert 0 < weight.sum() < 16
        template = 0
        for row in range(16):
            if weight[row] == 0:
                assert torch.equal(batch["input_ids"][row], batch["input_ids"][template])
                assert torch.equal(batch["attention_mask"][row], batch["attention_mask"][template])
        assert (batch["labels"][weight > 0] != -100).any(1).all()


@pytest.mark.slow  # starts a worker
def test_a_memory_mapped_dataset_from_disk(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"number": i, "labels": [i] * 3} for i in range(N)]).save_to_disk(tmp_path / "data")
    from_disk = datasets.load_from_disk(str(tmp_path / "data"))
    assert from_disk.cache_files
    plain = [real(b) for b in load()]
    assert [real(b) for b in load(from_disk.with_format("torch"))] == plain
    assert [real(b) for b in load(from_disk.with_format("torch"), num_workers=2)] == plain
    lists = list(load(from_disk, collate=lambda items: {"number": torch.tensor([i["number"] for i in items])}))
    assert [real(b) for b in lists] == plain


def test_subsets_and_tuples() -> None:
    plain = [real(b) for b in load()]
    assert [real(b) for b in load(Subset(numbered(), list(range(N))))] == plain  # has __getitems__
    pairs = TensorDataset(torch.arange(N), torch.zeros(N))

    def named(items: list[Any]) -> dict[str, Any]:
        return dict(zip(("number", "labels"), default_collate(items), strict=True))

    assert [real(b) for b in load(pairs, collate=named)] == plain


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_collator_that_returns_no_dictionary_is_refused(rows: int) -> None:
    """`dict()` of two tensors of two rows would be a dictionary, with tensors for keys."""
    pairs = TensorDataset(torch.arange(N), torch.zeros(N, 2))
    with pytest.raises(PrivacyConfigError, match="collate_fn"):
        list(load(pairs, rows=rows))


@pytest.mark.parametrize("wrong", ["packed", "fewer", "more", "list"])
def test_wrong_number_of_rows_is_refused(wrong: str) -> None:
    def collate(items: list[Any]) -> dict[str, Any]:
        good = torch.stack([item["labels"] for item in items])
        bad = {
            "packed": good.reshape(1, -1),
            "fewer": good[:-1],
            "more": torch.cat([good, good]),
            "list": [0] * (len(items) + 1),
        }[wrong]
        return {"input_ids": good, "labels": bad}

    with pytest.raises(PrivacyConfigError, match="labels"):
        list(load(collate=collate, batches=batches(schedule(sample_rate=1.0), 4)))


def test_values_that_are_no_tensors_pass() -> None:
    def collate(items: list[Any]) -> dict[str, Any]:
        return {"labels": ["a"] * len(items), "scalar": torch.tensor(2.0), "flag": True, "none": None}

    for batch in load(collate=collate, batches=batches(schedule(sample_rate=1.0), 16), static_shapes=True):
        assert batch["flag"] is True and batch["none"] is None and batch["scalar"] == 2
        assert len(batch["labels"]) == 16 and batch["example_weight"].sum() == N


def test_a_mapping_that_is_no_dict_passes() -> None:
    from transformers import BatchEncoding

    def collate(items: list[Any]) -> BatchEncoding:
        return BatchEncoding(default_collate(items))

    assert [real(b) for b in load(collate=collate)] == [real(b) for b in load()]


def test_abandoned_iterators_do_not_disturb_the_next() -> None:
    p = schedule(sample_rate=1.0, num_steps=3)
    loader = load(batches=batches(p, 5))
    for _ in itertools.islice(loader, 2):
        pass
    assert Counter(i for b in loader for i in real(b)) == Counter(dict.fromkeys(range(N), 3))


def test_draws_do_not_depend_on_global_seeds() -> None:
    drawn = []
    for _ in range(2):
        torch.manual_seed(7)
        p = schedule(num_steps=20)
        drawn.append([real(b) for b in load(batches=batches(p, N, seed=None))])
    assert drawn[0] != drawn[1]
