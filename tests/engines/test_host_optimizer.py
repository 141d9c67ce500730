"""`sums_device="cpu"`: the user's optimiser on float32 masters, under schedulers, saved, loaded, detached, refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Adafactor, get_scheduler

import dpft
from dpft.engines.host import check_sums_device
from dpft.errors import EngineError, PrivacyConfigError
from tests.engines.on_host import ADAM, QUIET, STEPS, adamw, host, masters, on_host
from tests.training import Training, tiny_llama, values


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


# --- masters ---------------------------------------------------------------------------------------------------------


def test_bf16_weights_are_the_float32_masters_rounded(path: Path) -> None:
    """Steps far below the spacing of bf16 add up in the masters; in bf16 each would be lost."""
    training = on_host(
        path,
        model=tiny_llama().bfloat16(),
        make=lambda ps: torch.optim.AdamW(ps, lr=1e-5),
        changes={**QUIET, "num_steps": 6},
    )
    copies = [nn.Parameter(m.clone()) for m in masters(training)]
    plain = torch.optim.AdamW(copies, lr=1e-5, fused=True)

    def replay(inner: Any, *_: Any) -> None:
        for c, p in zip(copies, (p for g in inner.param_groups for p in g["params"]), strict=True):
            c.grad = p.grad.clone()
        plain.step()

    training.inner.register_step_pre_hook(replay)
    start = values(training.model)
    training.train()
    for p, master, c in zip(training.model.parameters(), masters(training), copies, strict=True):
        assert p.dtype == torch.bfloat16 and master.dtype == torch.float32
        assert torch.equal(master, c) and torch.equal(p.detach(), master.bfloat16())
    assert not torch.equal(values(training.model), start)
    once = Training(
        path.with_name("device"),
        model=tiny_llama().bfloat16(),
        make=lambda ps: torch.optim.AdamW(ps, lr=1e-5),
        changes={**QUIET, "num_steps": 6},
    ).train()
    moved = [(values(t.model) != start).double().mean() for t in (training, once)]
    assert moved[0] > 2 * moved[1]


def test_float64_parameters_have_float64_sums_and_masters(path: Path) -> None:
    training = on_host(path, model=tiny_llama().double(), changes=QUIET).train(1)
    assert {m.dtype for m in masters(training)} == {torch.float64}
    assert torch.equal(values(training.model), torch.cat([m.flatten() for m in masters(training)]))


# --- the optimiser ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
def test_schedulers_act_on_the_masters(tmp_path: Path, when: str) -> None:
    """Made on the user's optimiser before prepare, or on the one that it returns; the rates of each group."""

    def make(params: Any) -> torch.optim.Optimizer:
        params = list(params)
        groups = [{"params": params[:3], "lr": 0.5}, {"params": params[3:], "weight_decay": 0.25}]
        return torch.optim.SGD(groups, lr=1.0, momentum=0.9)

    made: list[Any] = []

    def scheduled(params: Any) -> torch.optim.Optimizer:
        inner = make(params)
        if when == "before":
            made.append(LambdaLR(inner, lambda n: 1 / (n + 1)))
        return inner

    training = on_host(tmp_path / "host", make=scheduled, changes={"num_steps": 3})
    device = Training(tmp_path / "device", make=make, changes={"num_steps": 3})
    schedulers = [made[0] if made else LambdaLR(training.optimizer, lambda n: 1 / (n + 1))]
    schedulers.append(LambdaLR(device.optimizer, lambda n: 1 / (n + 1)))
    rates = []
    for one, scheduler in zip((training, device), schedulers, strict=True):
        for _ in one.physical():
            if one.loader.is_last:
                rates.append([group["lr"] for group in one.optimizer.param_groups])
                scheduler.step()
    assert rates == 2 * [[0.5, 1.0], [0.25, 0.5], [0.5 / 3, 1 / 3]]
    moved = values(device.model) - values(tiny_llama())
    assert (values(training.model) - values(device.model)).norm() < 1e-6 * moved.norm()


def test_a_prepared_scheduler_counts_logical_batches(path: Path) -> None:
    training = on_host(path, max_physical_batch_size=1)
    scheduler = training.accelerator.prepare(get_scheduler("linear", training.optimizer, 0, 4))
    rates = []
    for _ in training.physical():
        scheduler.step()
        if training.loader.is_last:
            rates.append(training.inner.param_groups[0]["lr"] / ADAM["lr"])
    assert rates == pytest.approx([0.75, 0.5, 0.25])


@pytest.mark.parametrize(
    "make",
    [
        lambda ps: torch.optim.Adagrad(ps, lr=0.1),
        lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True),
        lambda ps: torch.optim.Adam(ps, lr=0.1, amsgrad=True, foreach=True),
        lambda ps: torch.optim.RMSprop(ps, lr=0.1, centered=True),
    ],
    ids=["adagrad", "sgd", "adam", "rmsprop"],
)
def test_optimisers_do_what_they_do_on_the_device(tmp_path: Path, make: Callable[..., Any]) -> None:
    changes = {"num_steps": 2}
    device = Training(tmp_path / "device", make=make, changes=changes).train()
    training = on_host(tmp_path / "host", make=make, changes=changes).train()
    moved = values(device.model) - values(tiny_llama())
    assert (values(training.model) - values(device.model)).norm() < 1e-5 * moved.norm()


def test_a_resumed_training_is_bitwise_the_unbroken_one(tmp_path: Path) -> None:
    def options() -> dict[str, Any]:
        changes = {**QUIET, "sample_rate": 1.0}
        return {
            "model": tiny_llama().bfloat16(),
            "changes": changes,
            "make": lambda ps: torch.optim.AdamW(ps, lr=1e-4),
        }

    whole = on_host(tmp_path / "whole", **options()).train()
    first = on_host(tmp_path / "parts", **options()).train(2)
    first.accelerator.save_state(str(tmp_path / "state"))
    first.close()
    second = on_host(tmp_path / "parts", **options())
    second.accelerator.load_state(str(tmp_path / "state"))
    for p, master in zip(second.model.parameters(), masters(second), strict=True):
        assert torch.equal(p.detach(), master.bfloat16())
        assert not torch.equal(p.detach().float(), master)  # the bits that bf16 has not
    second.train()
    assert second.run.steps == STEPS and torch.equal(values(second.model), values(whole.model))
    assert all(torch.equal(a, b) for a, b in zip(masters(second), masters(whole), strict=True))
    for a, b in zip(second.inner.state.values(), whole.inner.state.values(), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in b) and a["exp_avg"].dtype == torch.float32
    other = on_host(tmp_path / "other", make=lambda ps: torch.optim.AdamW(ps[:3], lr=1e-4))
    with pytest.raises(ValueError, match="masters"):
        other.optimizer.load_state_dict(second.optimizer.state_dict())


def test_a_state_of_a_training_on_the_device_can_be_loaded(tmp_path: Path) -> None:
    """It has no masters: they are the parameters. Its moments and rates are taken over, and the steps stay fused."""
    device = Training(tmp_path / "ledger", model=tiny_llama().bfloat16(), make=adamw, changes=QUIET).train(2)
    device.accelerator.save_state(str(tmp_path / "state"))
    device.close()
    training = on_host(tmp_path / "ledger", model=tiny_llama().bfloat16(), changes=QUIET)
    training.accelerator.load_state(str(tmp_path / "state"))
    for p, master in zip(device.model.parameters(), masters(training), strict=True):
        assert torch.equal(p.detach().float(), master)
    assert training.inner.param_groups[0]["fused"] is True
    assert all(s["exp_avg"].dtype == torch.float32 for s in training.inner.state.values())
    training.train()
    assert training.run.steps == STEPS


def test_parameters_changed_by_something_else_are_stepped_from_there(path: Path) -> None:
    """Weights that are loaded, clamped or averaged between steps, seen by autograd or not, are not undone."""
    training = on_host(
        path, make=lambda ps: torch.optim.SGD(ps, lr=0.0), model=tiny_llama().bfloat16(), changes={"num_steps": 2}
    )
    training.train(1)
    first, second, third = list(training.model.parameters())[:3]
    low = masters(training)[2].clone()
    with torch.no_grad():
        first.add_(1.0)
    second.data.flatten()[:5] = 7.0
    kept = [p.detach().clone() for p in (first, second, third)]
    training.train(1)
    assert all(torch.equal(a, b) for a, b in zip(kept, (first, second, third), strict=True))
    assert torch.equal(masters(training)[0], kept[0].float()) and torch.equal(masters(training)[2], low)


def test_detached_it_is_the_users_optimiser_again(path: Path) -> None:
    """With the model's parameters and their dtype, to train without privacy, or in another phase."""
    model = tiny_llama().bfloat16()
    training = on_host(path, model=model).train(2)
    inner = host(training).detach()
    assert inner is training.inner
    assert [id(p) for g in inner.param_groups for p in g["params"]] == [id(p) for p in model.parameters()]
    assert not inner.param_groups[0]["fused"] and not inner.param_groups[0]["foreach"]
    state = inner.state[next(model.parameters())]
    assert state["step"] == 2 and state["exp_avg"].dtype == torch.bfloat16
    training.close()
    dpft.unwrap(model)
    before = values(model)
    next(iter(model.parameters())).square().sum().backward()
    inner.step()
    assert not torch.equal(values(model), before)
    inner.zero_grad()
    again = on_host(path.with_name("again"), model=model, make=lambda _: inner).train()
    assert again.run.steps == 3


# --- what is refused -------------------------------------------------------------------------------------------------


class _Own(torch.optim.AdamW):
    pass


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"sums_device": "cuda"}, PrivacyConfigError, "'cpu'"),
        ({"clipping": "none", "changes": {"noise_multiplier": 0}}, EngineError, "clipping"),
        ({"make": lambda ps: _Own(ps)}, EngineError, "_Own"),
        ({"make": lambda ps: Adafactor(ps)}, EngineError, "AdamW"),
        ({"make": lambda ps: torch.optim.AdamW(ps, capturable=True)}, EngineError, "capturable"),
        ({"make": lambda ps: torch.optim.AdamW(ps, differentiable=True)}, EngineError, "differentiable"),
    ],
)
def test_refused_before_anything_is_touched(path: Path, options: Any, error: type[Exception], words: str) -> None:
    model = tiny_llama()
    with pytest.raises(error, match=words):
        on_host(path, model=model, **options)
    assert not path.exists()
    dpft.wrap(model)  # it was left as it was


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_an_engine_is_refused_and_its_own_way_named(kind: str) -> None:
    optimizer = adamw(tiny_llama().parameters())
    with pytest.raises(EngineError, match="zero2_offload"):
        check_sums_device("cpu", kind, "flash", optimizer)
    check_sums_device(None, kind, "flash", optimizer)
