"""`dpft.prepare`: the loop of the issue, its exactness, and that every release is paid for before it happens."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import get_scheduler

import dpft
from dpft.errors import ClippingError
from dpft.privacy import Ledger, make_sampler
from tests import oracle, zoo
from tests.training import EXAMPLES, Training, collate, config, examples, new_accelerator, tiny_llama, values

strategies = pytest.mark.parametrize("strategy", ["one_pass", "two_pass", "per_example"])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


def test_the_loop_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    accelerator, model, dataset = new_accelerator(), tiny_llama(), examples()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    before = values(model)

    privacy = dpft.PrivacyConfig(
        target_epsilon=8.0, target_delta=1e-3, max_grad_norm=1.0, expected_batch_size=6, num_steps=4
    )
    model, optimizer, loader = dpft.prepare(
        accelerator, model, optimizer, dataset, privacy, collate_fn=collate, max_physical_batch_size=4
    )
    for batch in loader:
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()

    run = loader.privacy
    assert run.steps == 4 and run.private
    assert 7.0 < run.epsilon() <= 8.0 and run.epsilon(exact=True) <= run.epsilon()
    report = run.report()
    assert report["private"] and report["steps_released"] == 4 and 7.0 < report["epsilon_spent"] <= 8.0
    assert not torch.equal(values(model), before) and values(model).isfinite().all()
    assert Ledger.read(tmp_path / "privacy_ledger.jsonl").count == 4


def test_the_ledger_is_in_the_project_directory(tmp_path: Path) -> None:
    Training(None, accelerator=new_accelerator(project_dir=str(tmp_path))).train()  # type: ignore[arg-type]  # the default
    assert Ledger.read(tmp_path / "privacy_ledger.jsonl").count == 3


# --- exactness -------------------------------------------------------------------------------------------------------


def by_hand(steps: int, max_grad_norm: float, momentum: float) -> Tensor:
    """The same batches by a plain loop in float64, one example at a time: sum of clipped gradients over b."""
    model = tiny_llama().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
    sampler = make_sampler(config(num_steps=steps).resolve(EXAMPLES), EXAMPLES, test_seed=3)
    sizes = []
    for step in range(steps):
        indices = sampler.draw(step).tolist()
        sizes.append(len(indices))
        exact = oracle.oracle(model, collate([examples()[i] for i in indices]))
        for name, total in exact.clipped_sum(max_grad_norm).items():
            model.get_parameter(name).grad = total / 6
        optimizer.step()
    assert set(sizes) != {6}  # else b could not be told from the batch's size
    return values(model)


@strategies
@pytest.mark.parametrize("max_grad_norm", [0.5, 1e6])
def test_without_noise_it_is_the_plain_loop(path: Path, strategy: Any, max_grad_norm: float) -> None:
    """With a huge C that loop is plain SGD. Float32 training against float64: six digits after four steps."""
    training = Training(
        path,
        strategy=strategy,
        make=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        changes={"noise_multiplier": 0, "num_steps": 4, "max_grad_norm": max_grad_norm},
    ).train()
    expected = by_hand(4, max_grad_norm, 0.9)
    moved = (expected - values(tiny_llama())).norm()
    assert moved > 0.05
    assert (values(training.model) - expected).norm() < 1e-5 * moved


def test_float64_is_exact(path: Path) -> None:
    model = tiny_llama().double()
    with oracle.Float64():  # Hugging Face's casts to float32 become casts to float64
        training = Training(
            path,
            model=model,
            make=lambda p: torch.optim.SGD(p, lr=0.1),
            changes={"noise_multiplier": 0, "max_grad_norm": 0.5},
        ).train()
    expected = by_hand(3, 0.5, 0.0)
    assert (values(training.model) - expected).norm() < 1e-9 * (expected - values(tiny_llama())).norm()


@strategies
def test_physical_batch_size_does_not_change_the_result(tmp_path: Path, strategy: Any) -> None:
    """Same draws, same noise, whatever the cut and the padding."""
    results = [
        values(
            Training(
                tmp_path / f"{rows}{static}", max_physical_batch_size=rows, static_shapes=static, strategy=strategy
            )
            .train()
            .model
        )
        for rows, static in ((1, False), (3, False), (5, True), (EXAMPLES, False), (20, True))
    ]
    moved = (results[0] - values(tiny_llama())).norm()
    for other in results[1:]:
        assert (other - results[0]).norm() < 1e-5 * moved


def ragged() -> list[dict[str, Tensor]]:
    """Of 2 to 6 tokens, in no order."""
    cut = [6, 2, 4, 3, 6, 5, 2, 3, 4, 6, 2, 5]
    return [{name: value[:n] for name, value in item.items()} for item, n in zip(examples(), cut, strict=True)]


def padded(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """To the longest of a physical batch."""
    fill = {"labels": -100}
    return {
        name: nn.utils.rnn.pad_sequence([item[name] for item in items], True, fill.get(name, 0)) for name in items[0]
    }


@strategies
@pytest.mark.parametrize("static", [False, True])
def test_lengths_change_no_release(tmp_path: Path, strategy: Any, static: bool) -> None:
    """Each step's clipped sum is that of the drawn examples, one at a time; only the padding gets less."""
    data, total = ragged(), {}
    sizes = [len(item["input_ids"]) for item in data]
    for lengths in (None, sizes):
        options: dict[str, Any] = {"max_physical_batch_size": 3, "static_shapes": static, "strategy": strategy}
        training = Training(
            tmp_path / f"{lengths is None}",
            dataset=data,
            collate_fn=padded,
            lengths=lengths,
            changes={"noise_multiplier": 0, "num_steps": 3, "max_grad_norm": 0.5},
            **options,
        )
        widths: list[list[int]] = [[] for _ in range(3)]
        for batch in training.physical():
            widths[training.loader.step].append(batch["input_ids"].shape[1])
        total[lengths is None] = sum(map(sum, widths))
        assert lengths is None or widths == [sorted(each, reverse=True) for each in widths]

        model = tiny_llama().double()
        sampler = make_sampler(config().resolve(EXAMPLES), EXAMPLES, test_seed=3)
        for step in range(3):
            sums = [oracle.oracle(model, padded([data[i]])).clipped_sum(0.5) for i in sampler.draw(step)]
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p -= sum(s[name] for s in sums) / 6
        moved = values(model) - values(tiny_llama())
        assert (values(training.model) - values(model)).norm() < 1e-5 * moved.norm()
    assert total[False] < total[True]


@pytest.mark.parametrize("strategy", ["one_pass", "two_pass"])
def test_padding_rows_change_nothing_also_where_the_user_computes_the_losses(tmp_path: Path, strategy: Any) -> None:
    """`model(**batch)` takes the weights out of the batch; `clipped_loss` must not take the padding for examples."""

    def losses(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(logits[:, :-1].mT, batch["input_ids"][:, 1:], reduction="none").mean(1)

    def train(rows: int, given: bool, q: float | None = None) -> Tensor:
        changes = {"noise_multiplier": 0, "sample_rate": q}
        name = f"{rows}{given}{q}"
        training = Training(
            tmp_path / name, max_physical_batch_size=rows, static_shapes=True, strategy=strategy, changes=changes
        )
        for batch in training.loader:
            batch.pop("labels")
            weight = batch["example_weight"]
            out = training.model(**batch)
            more = {"example_weight": weight} if given else {}
            training.accelerator.backward(dpft.clipped_loss(training.model, losses(out.logits, batch), **more))
            training.optimizer.step()
            training.optimizer.zero_grad()
        return values(training.model)

    start, right = values(tiny_llama()), train(16, True)
    try:
        implied = train(16, False)
        empty = train(16, False, 1e-9)
    except ClippingError:
        return  # refused is as good
    assert (implied - right).norm() < 1e-5 * (right - start).norm()
    assert torch.equal(empty, start)


@pytest.mark.parametrize("order", ["first", "before backward", "last"])
def test_zero_grad_may_stand_where_torch_allows_it(tmp_path: Path, order: str) -> None:
    """zero_grad, backward, step is the order of torch's own tutorials: no physical batch may get lost."""
    expected = values(Training(tmp_path / "a", max_physical_batch_size=2).train().model)
    training = Training(tmp_path / "b", max_physical_batch_size=2)
    for batch in training.loader:
        if order == "first":
            training.optimizer.zero_grad()
        loss = training.model(**batch).loss
        if order == "before backward":
            training.optimizer.zero_grad()
        training.accelerator.backward(loss)
        training.optimizer.step()
        if order == "last":
            training.optimizer.zero_grad()
    assert torch.equal(values(training.model), expected)


def test_accumulate_context_changes_nothing(tmp_path: Path) -> None:
    expected = values(Training(tmp_path / "a", max_physical_batch_size=2).train().model)
    training = Training(tmp_path / "b", max_physical_batch_size=2)
    for batch in training.loader:
        with training.accelerator.accumulate(training.model):
            training.backward(batch)
            training.optimizer.step()
            training.optimizer.zero_grad()
    assert torch.equal(values(training.model), expected) and training.run.steps == 3


def test_bf16_mixed_precision(tmp_path: Path) -> None:
    def train(name: str, precision: str) -> Training:
        changes = {"noise_multiplier": 0}
        accelerator = new_accelerator(mixed_precision=precision)
        return Training(tmp_path / name, accelerator=accelerator, changes=changes).train()

    start, full, mixed = values(tiny_llama()), train("a", "no"), train("b", "bf16")
    assert all(p.dtype == torch.float32 for p in mixed.model.parameters())
    moved, difference = values(full.model) - start, values(mixed.model) - values(full.model)
    assert 0 < difference.norm() < 0.05 * moved.norm()


@pytest.mark.parametrize("strategy", ["one_pass", "two_pass", "per_example"])
def test_pure_bf16_parameters(path: Path, strategy: Any) -> None:
    training = Training(path, model=tiny_llama().bfloat16(), strategy=strategy, changes={"noise_multiplier": 0})
    training.one_batch()
    grads = [p.grad for p in training.model.parameters()]
    assert all(g is not None and g.dtype == torch.float32 for g in grads)
    training.optimizer.step()
    assert all(p.dtype == torch.bfloat16 and p.isfinite().all() for p in training.model.parameters())
    assert not torch.equal(values(training.model), values(tiny_llama().bfloat16()))


def test_same_test_seed_is_bitwise_the_same_and_another_is_not(tmp_path: Path) -> None:
    a, b, c, d = (
        values(Training(tmp_path / name, test_seed=seed).train().model)
        for name, seed in (("a", 3), ("b", 3), ("c", 4), ("d", None))
    )
    assert torch.equal(a, b) and not torch.equal(a, c) and not torch.equal(a, d)


def test_noise_reaches_every_parameter_once_with_its_deviation(path: Path) -> None:
    """No example is ever drawn, so what moves a parameter in a step is the noise alone: N(0, (sigma C / b)^2)."""
    model = tiny_llama()
    training = Training(
        path,
        model=model,
        test_seed=5,
        changes={"sample_rate": 1e-9, "noise_multiplier": 2.0, "max_grad_norm": 1.5, "num_steps": 2},
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    training.train(1)
    first = {n: (p.detach() - before[n]).double() for n, p in model.named_parameters()}
    for name, move in first.items():
        std = 2.0 * 1.5 / 6
        assert abs(move.square().mean().sqrt() / std - 1) < 5 / math.sqrt(2 * move.numel()), name
        assert move.unique().numel() > 0.99 * move.numel()
    training.train(1)
    second = values(model) - torch.cat([p.flatten().double() for p in before.values()])
    flat = torch.cat([m.flatten() for m in first.values()])
    assert abs(torch.corrcoef(torch.stack([flat, second - flat]))[0, 1]) < 5 / math.sqrt(flat.numel())


@pytest.mark.parametrize("secure", [False, True])
def test_a_training_draws_the_noise_that_it_states(path: Path, secure: bool) -> None:
    training = Training(path, test_seed=None, changes={"secure_rng": secure})
    noise = training.optimizer.optimizer.noise
    assert noise.secure == secure and not noise.known_secret


def test_schedulers_count_logical_batches(path: Path) -> None:
    training = Training(path, max_physical_batch_size=1, changes={"num_steps": 5})
    scheduler = training.accelerator.prepare(get_scheduler("linear", training.optimizer, 0, 5))
    rates = []
    for _ in training.physical():
        scheduler.step()
        if training.loader.is_last:
            rates.append(round(scheduler.get_last_lr()[0], 6))
    assert rates == [0.8, 0.6, 0.4, 0.2, 0.0]


def test_clipping_none_is_plain_training(path: Path) -> None:
    training = Training(path, clipping="none", changes={"noise_multiplier": 0, "sample_rate": 1.0, "num_steps": 1})
    model = copy.deepcopy(tiny_llama()).double()
    exact = oracle.oracle(model, collate(examples()))
    expected = values(model) - torch.cat([g.flatten() / 6 for g in exact.weighted_sum([1.0] * EXAMPLES).values()])
    training.train()
    assert (values(training.model) - expected).norm() < 1e-5 * (expected - values(model)).norm()


def test_any_module_through_clipped_loss(path: Path) -> None:
    data = zoo.vector_batch(EXAMPLES)
    dataset = [{"x": data["x"][i], "labels": data["labels"][i]} for i in range(EXAMPLES)]
    mlp: Callable[[], nn.Module] = zoo.MLP_ENTRY.build
    changes = {"noise_multiplier": 0, "sample_rate": 1.0, "num_steps": 1}
    training = Training(path, model=mlp(), dataset=dataset, changes=changes)
    for batch in training.loader:
        losses = zoo.vector_losses(training.model, batch)
        training.accelerator.backward(dpft.clipped_loss(training.model, losses, batch["example_weight"]))
        training.optimizer.step()
        training.optimizer.zero_grad()
    total = oracle.oracle(mlp(), data, zoo.vector_losses).clipped_sum(1.0)
    moved = torch.cat([g.flatten() / 6 for g in total.values()])
    assert (values(mlp()) - values(training.model) - moved).norm() < 1e-5 * moved.norm()


def test_the_planner_chooses_the_physical_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` is dpft.plan's choice, never more than a logical batch; and the release is what it was."""
    names, plans = dpft.prepare.__globals__, []
    predict = names["predict"]

    def noted(*args: Any, **options: Any) -> dpft.Plan:
        plans.append(predict(*args, **options))
        return plans[-1]

    monkeypatch.setitem(names, "predict", noted)
    # Every size costs seconds. Four is more than a logical batch of three, which has to be noticed.
    monkeypatch.setattr("dpft.planning.predictor.MAX_BATCH_SIZE", 4)
    changes = {"expected_batch_size": 3}
    training = Training(tmp_path / "auto.jsonl", max_physical_batch_size="auto", seq_len=6, changes=changes)
    rows = [len(batch["input_ids"]) for batch in training.physical()]
    (planned,) = plans
    assert planned.seq_len == 6 and planned.batch_size > 1
    assert 1 < max(rows) <= min(planned.batch_size, 3)
    one = Training(tmp_path / "one.jsonl", max_physical_batch_size=1, changes=changes).train()
    torch.testing.assert_close(values(training.model), values(one.model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [{"seq_len": None}, {"seq_len": 0}, {"seq_len": 6, "strategy": "two_pass"}])
def test_the_planner_needs_a_length(tmp_path: Path, bad: dict[str, Any]) -> None:
    model = tiny_llama()
    with pytest.raises((dpft.PrivacyConfigError, ValueError), match=r"seq_len|strategy"):
        Training(tmp_path / "ledger.jsonl", model=model, max_physical_batch_size="auto", **bad)
    assert not (tmp_path / "ledger.jsonl").exists()
    dpft.wrap(model)  # it was left as it was
