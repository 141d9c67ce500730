"""`dpft.prepare`: every release is paid for before it happens, once, and is what was paid for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import dpft
from dpft.errors import BudgetExceededError, DPFTError, LedgerError
from dpft.privacy import Ledger
from tests.training import EXAMPLES, Training, collate, examples, tiny_llama, values


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


# --- the order: ledger, then parameters ------------------------------------------------------------------------------


def test_the_line_is_on_the_disk_before_parameters_change(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(path)
    counts: list[int] = []
    step = training.inner.step

    def spied(*args: Any) -> None:
        counts.append(Ledger.read(path).count)
        step(*args)

    monkeypatch.setattr(training.inner, "step", spied)
    steps = [Ledger.read(path).count for _ in training.physical() if training.loader.is_last]
    assert counts == steps == [1, 2, 3]


def test_a_ledger_that_cannot_be_written_stops_the_release(path: Path) -> None:
    training = Training(path)
    training.train(1)
    before = values(training.model)
    path.unlink()
    training.one_batch()
    with pytest.raises(LedgerError, match="deleted"):
        training.optimizer.step()
    assert torch.equal(values(training.model), before)


def test_it_ends_by_itself_and_one_more_release_is_refused(path: Path) -> None:
    training = Training(path).train()
    before = values(training.model)
    assert training.run.steps == 3 and list(training.loader) == []
    training.backward(collate(examples()[:2]))
    with pytest.raises(BudgetExceededError, match="3 of 3"):
        training.optimizer.step()
    assert torch.equal(values(training.model), before)
    assert training.run.steps == Ledger.read(path).count == 3


def test_no_logical_batch_is_released_twice(path: Path) -> None:
    """The accountant composes independent draws; a second release of one draw is none."""
    training = Training(path, max_physical_batch_size=EXAMPLES)
    for batch in training.loader:
        training.backward(batch)
        training.optimizer.step()
        training.optimizer.zero_grad()
        before = values(training.model)
        with pytest.raises(dpft.ClippingError, match="a second time"):
            training.optimizer.step()
        with pytest.raises(DPFTError):
            training.backward(batch)
            training.optimizer.step()
        assert torch.equal(values(training.model), before) and training.run.steps == 1
        break


@pytest.mark.parametrize("what", ["multiple", "accelerator", "twice", "twice in the middle"])
def test_no_example_contributes_more_than_c(tmp_path: Path, what: str) -> None:
    """Twice the loss, or two backward passes, would be twice the sensitivity under the same noise."""
    once = Training(tmp_path / "once", changes={"noise_multiplier": 0})
    once.train(1)
    start = values(tiny_llama())
    training = Training(tmp_path / "more", changes={"noise_multiplier": 0})
    if what == "accelerator":
        training.accelerator.gradient_accumulation_steps = 4
    try:
        for number, batch in enumerate(training.loader):
            loss = training.model(**batch).loss
            training.accelerator.backward(10 * loss if what == "multiple" else loss)
            if what == "twice" or (what == "twice in the middle" and number == 0):
                training.backward(batch)
            training.optimizer.step()
            last = training.loader.is_last
            training.optimizer.zero_grad()
            if last:
                break
    except DPFTError:
        assert torch.equal(values(training.model), start) and training.run.steps == 0
        return
    torch.testing.assert_close(values(training.model), values(once.model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("how", ["break", "exception", "break before step"])
def test_an_abandoned_logical_batch_is_not_added_to_the_next(tmp_path: Path, how: str) -> None:
    changes = {"noise_multiplier": 0, "sample_rate": 1.0}
    expected = values(Training(tmp_path / "a", changes=changes).train(1).model)
    training = Training(tmp_path / "b", changes=changes)
    try:
        for number, batch in enumerate(training.loader):
            if how == "exception" and number == 2:
                raise MemoryError
            training.backward(batch)
            if how == "break before step":
                break
            training.optimizer.step()
            training.optimizer.zero_grad()
            if number == 1:
                break
    except MemoryError:
        pass
    assert training.run.steps == 0
    training.train(1)
    torch.testing.assert_close(values(training.model), expected, rtol=0, atol=1e-6)


def test_two_live_iterators_do_not_share_a_release(path: Path) -> None:
    """Each draws a logical batch of its own; an example of both would contribute twice."""
    training = Training(path, changes={"noise_multiplier": 0, "sample_rate": 1.0})
    iterators = [iter(training.loader), iter(training.loader)]
    rows = 0
    try:
        while training.run.steps == 0:
            for iterator in iterators:
                batch = next(iterator)
                training.backward(batch)
                rows += len(batch["labels"])
                training.optimizer.step()
                if training.run.steps:
                    break
                training.optimizer.zero_grad()
    except DPFTError:
        assert training.run.steps == 0
    else:
        assert rows <= EXAMPLES


def test_a_second_phase_with_the_same_optimiser(path: Path) -> None:
    """Unwrapped and prepared again: nothing of the first phase stands in the way, and its noise stays behind."""
    first = Training(path).train()
    model = dpft.unwrap(first.model)
    second = Training(path.with_name("second"), model=model, make=lambda _: first.inner)
    before = values(model)
    second.train()
    assert second.run.steps == 3 and not torch.equal(values(model), before)


# --- a second run, another ledger, seeds -----------------------------------------------------------------------------


def test_a_second_run_on_a_ledger_must_say_what_it_is(tmp_path: Path, path: Path) -> None:
    first = Training(path)
    first.train(2)
    first.accelerator.save_state(str(tmp_path / "state"))
    first.close()
    second = Training(path)
    before = values(second.model)
    second.one_batch()
    with pytest.raises(LedgerError, match="load_state"):
        second.optimizer.step()
    assert torch.equal(values(second.model), before) and Ledger.read(path).count == 2
    second.accelerator.load_state(str(tmp_path / "state"))
    assert torch.equal(values(second.model), values(first.model))
    second.train()
    assert second.run.steps == 3
    second.close()
    third = Training(path, continue_ledger=True, changes={"num_steps": 5})
    third.train()
    assert third.run.steps == Ledger.read(path).count == 5


def test_a_ledger_of_another_mechanism_is_refused(path: Path) -> None:
    first = Training(path)
    first.train(1)
    first.close()
    for changes in ({"noise_multiplier": 2.0}, {"sample_rate": 0.25}):
        with pytest.raises(LedgerError, match="mechanism"):
            Training(path, changes=changes, continue_ledger=True)
    assert Ledger.read(path).count == 1


def test_a_ledger_of_other_examples_is_refused(path: Path) -> None:
    """Steps on records and steps on users under one ledger: a statement about either would be false of the others."""
    users, fewer = "user (at most 8 records)", "user (at most 4 records)"
    first = Training(path, changes={"item": users})
    first.train(1)
    first.close()
    for item in (None, fewer):
        with pytest.raises(LedgerError, match="no statement covers both"):
            Training(path, changes={"item": item}, continue_ledger=True)
    assert Ledger.read(path).count == 1
    again = Training(path, changes={"item": users}, continue_ledger=True)
    again.train()
    assert again.run.report()["neighbours"] == f"one {users} is added or removed"


def test_the_statement_says_that_earlier_releases_were_clipped_otherwise(path: Path) -> None:
    """Noise is relative to C, so that epsilon is the same; the statement has one C."""
    for changes in ({"max_grad_norm": 0.5}, {}, {"clip_groups": {"model": 1.0, "lm_head": 1.0}}):
        training = Training(path, changes=changes, continue_ledger=True).train(1)
        report = training.run.report()
        training.close()
    assert [line for line in report["assumptions"] if "clipped with" in line] == [
        "1 of the releases were clipped with max_grad_norm 0.5, clip_groups None; epsilon is that of all",
        "1 of the releases were clipped with clip_groups None; epsilon is that of all",
    ]
    assert report["max_grad_norm"] == 1.0 and "with max_grad_norm 0.5" in dpft.privacy_statement_markdown(report)


@pytest.mark.parametrize("sampler", ["shuffle", "balls_and_bins"])
def test_a_resumed_run_counts_its_epochs_and_stays_in_its_budget(sampler: str, tmp_path: Path, path: Path) -> None:
    """Every start begins an epoch, in one batch of which each example is: in more batches than were planned."""
    changes = {"sampler": sampler, "num_steps": 6}  # three epochs of two batches
    first = Training(path, changes=changes, test_seed=None)
    first.train(1)
    first.accelerator.save_state(str(tmp_path / "state"))
    first.close()
    second = Training(path, changes=changes, test_seed=None)
    second.accelerator.load_state(str(tmp_path / "state"))
    drawn = []
    try:
        for batch in second.physical():
            drawn += [tuple(row.tolist()) for row in batch["input_ids"][batch["example_weight"] > 0]]
    except BudgetExceededError:
        assert second.run.steps < 6
    epochs = [drawn[start : start + EXAMPLES] for start in range(0, len(drawn), EXAMPLES)]
    assert epochs and all(len(set(epoch)) == EXAMPLES for epoch in epochs)
    spent = float(second.run.report()["epsilon_spent"])
    assert spent <= second.run.schedule.epsilon * (1 + 1e-9)
    assert second.run.epsilon() >= spent * (1 - 1e-9)


def test_known_seeds_in_an_earlier_part_are_not_forgotten(tmp_path: Path, path: Path) -> None:
    first = Training(path, test_seed=3)
    first.train(1)
    first.accelerator.save_state(str(tmp_path / "state"))
    first.close()
    try:
        second = Training(path, test_seed=None)
    except DPFTError:
        return
    second.accelerator.load_state(str(tmp_path / "state"))
    assert not second.run.private and second.run.epsilon() == math.inf
    assert not second.run.report()["private"]


@pytest.mark.parametrize(
    ("options", "changes", "reason"),
    [
        ({"test_seed": None}, {"noise_multiplier": 0}, "no noise"),
        ({"test_seed": None, "clipping": "none"}, {"noise_multiplier": 0}, "not clipped"),
        ({"test_seed": 3}, {}, "seed known"),
    ],
)
def test_not_private_is_said_everywhere(path: Path, options: Any, changes: Any, reason: str) -> None:
    run = Training(path, changes=changes, **options).train().run
    report = run.report()
    assert not report["private"] and any(reason in r for r in report["not_private_because"])
    assert report["epsilon_spent"] == "inf" and run.epsilon() == run.epsilon(exact=True) == math.inf
    assert not run.private
    assert f"NOT PRIVATE: {'; '.join(report['not_private_because'])}" in dpft.privacy_statement_markdown(report)


# --- what the device found out stays an error ------------------------------------------------------------------------


def scaled(training: Training, batch: dict[str, Any]) -> None:
    (3.0 * training.model(**batch).loss).backward()


def weights_dropped(training: Training, batch: dict[str, Any]) -> None:
    rest = {name: value for name, value in batch.items() if name != "example_weight"}
    training.accelerator.backward(training.model(**rest).loss)


def passes_apart(training: Training, batch: dict[str, Any]) -> None:
    """A layer whose gradient is another one in the pass that is released."""

    def hook(grad: torch.Tensor) -> torch.Tensor:
        return grad * 2 if training.model._dpft_state.active.weighted else grad

    def ask(module: Any, arguments: Any, out: torch.Tensor) -> None:
        if out.requires_grad:  # not where a row is run alone
            out.register_hook(hook)

    handle = training.model.model.layers[0].register_forward_hook(ask)
    try:
        training.backward(batch)
    finally:
        handle.remove()


@pytest.mark.parametrize("wrong", [scaled, weights_dropped, passes_apart])
def test_a_refused_batch_is_not_released_by_asking_again(wrong: Any, path: Path) -> None:
    training = Training(path, strategy="two_pass", static_shapes=True, changes={"num_steps": 9})
    before, refused = values(training.model), 0
    for batch in training.loader:
        wrong(training, batch)
        if not training.loader.is_last:
            continue
        for _ in range(2):  # the second time asks again for what was refused
            with pytest.raises(dpft.ClippingError):
                training.optimizer.step()
            refused += 1
        break
    assert refused == 2 and training.run.steps == 0
    assert torch.equal(values(training.model), before)
    training.train(2)  # a loop that starts anew is in order
    assert training.run.steps == 2
