"""`sums_device="cpu"`: the same training, with sums, noise and optimiser in host memory.

Here both memories are the CPU's, so they are told apart by what a tensor is for.
"""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dpft
from dpft.clipping.strategy_choice import choose_strategy
from dpft.errors import ClippingError, DPFTError, EngineError, LedgerError, WrapError
from dpft.privacy import Ledger, make_sampler
from tests import zoo
from tests.engines.on_host import CLIP, QUIET, STEPS, adamw, host, masters, on_host, one_layer
from tests.oracle import oracle, trainable
from tests.training import EXAMPLES, Training, collate, config, examples, tiny_llama, values


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


# --- the training is the same ----------------------------------------------------------------------------------------


MODELS: dict[str, Callable[[], nn.Module]] = {
    "untied": tiny_llama,
    "tied": lambda: one_layer(zoo.llama, num_hidden_layers=1, tie_word_embeddings=True),
    "lora": lambda: one_layer(zoo.lora),
}


def by_hand(model: nn.Module) -> Tensor:
    """The same batches by AdamW in float64, one example at a time."""
    optimizer = adamw(trainable(model.double()).values())
    sampler = make_sampler(config(num_steps=STEPS).resolve(EXAMPLES), EXAMPLES, test_seed=3)
    for step in range(STEPS):
        total = oracle(model, collate([examples()[i] for i in sampler.draw(step).tolist()])).clipped_sum(CLIP)
        for name, p in trainable(model).items():
            p.grad = total[name] / 6
        optimizer.step()
    return values(model)


@pytest.mark.parametrize(
    ("name", "strategies"),
    [("untied", ("one_pass", "per_example")), ("tied", ("two_pass",)), ("lora", ("one_pass",))],
)
def test_five_steps_of_adam_are_the_oracles(tmp_path: Path, name: str, strategies: tuple[str, ...]) -> None:
    """Several physical batches in a logical one. Float32 against float64: 1e-5 of the way, as under every engine."""
    start, expected = values(MODELS[name]()), by_hand(MODELS[name]())
    for strategy in strategies:
        training = on_host(tmp_path / strategy, model=MODELS[name](), strategy=strategy, changes=QUIET).train()
        error = (values(training.model) - expected).norm() / (expected - start).norm()
        assert error < 1e-5, (strategy, error)
        assert training.run.steps == STEPS


@pytest.mark.parametrize("strategy", ["one_pass", "two_pass"])
def test_with_bf16_weights_the_release_is_the_devices_bit_for_bit(tmp_path: Path, strategy: Any) -> None:
    """Float32 sums of the same products, and the same draws; what steps on them are float32 masters."""
    seen: dict[str, list[Tensor]] = {"host": [], "device": []}
    options: dict[str, Any] = {"model": None, "strategy": strategy, "changes": {"num_steps": 1}}
    device = Training(tmp_path / "device", **{**options, "model": tiny_llama().bfloat16()})
    device.one_batch()
    noise = device.optimizer.optimizer.noise
    for p in device.model.parameters():
        assert p.grad is not None and p.grad.dtype == torch.float32
        seen["device"].append(noise.add_(p.grad.clone(), 1.0).div_(6.0))
    there = on_host(tmp_path / "host", **{**options, "model": tiny_llama().bfloat16()})
    there.inner.register_step_pre_hook(
        lambda inner, *_: seen["host"].extend(p.grad.clone() for g in inner.param_groups for p in g["params"])
    )
    there.one_batch(step=True)
    assert len(seen["host"]) == len(seen["device"]) > 5
    assert all(torch.equal(a, b) for a, b in zip(seen["host"], seen["device"], strict=True))


# --- what is where ---------------------------------------------------------------------------------------------------


def large(model: nn.Module) -> dict[str, int]:
    """Bytes of the live tensors of as many elements as the embedding, by dtype; a parameter's ``.grad`` apart."""
    size = model.get_input_embeddings().weight.numel()  # type: ignore[operator]  # a method, of an HF model
    found: dict[int, tuple[str, int]] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and thing.numel() == size and thing.dtype.is_floating_point:
            found[thing.data_ptr()] = (str(thing.dtype), thing.nbytes)
    return {d: sum(n for dtype, n in found.values() if dtype == d) for d in {dtype for dtype, _ in found.values()}}


def test_the_device_has_the_parameters_alone(path: Path) -> None:
    """At rest and between physical batches: 2 bytes a parameter of bf16; sums, masters and moments are 16, float32."""
    config = {"num_hidden_layers": 1, "tie_word_embeddings": True, "vocab_size": 1031}
    model = one_layer(zoo.llama, **config).bfloat16()
    n = model.get_input_embeddings().weight.numel()  # type: ignore[operator]  # a method, of an HF model
    training = on_host(path, model=model, max_physical_batch_size=2)
    for number, _ in enumerate(training.physical()):
        assert all(p.grad is None for p in model.parameters())
        if number == 0 or training.loader.is_last:
            moments = 8 * n if training.inner.state else 0
            assert large(model) == {"torch.bfloat16": 2 * n, "torch.float32": 4 * n + 4 * n + moments}
            assert training.run.steps == int(moments > 0)
        if training.loader.is_last:
            break
    device = {p.data_ptr() for p in model.parameters()}
    held = [*masters(training), *(v for s in training.inner.state.values() for v in s.values())]
    assert not device & {t.data_ptr() for t in held}
    assert all(t.dtype == torch.float32 and t.device.type == "cpu" for t in held)
    assert training.inner.param_groups[0]["fused"] is True


def test_gradients_go_to_the_host_layer_by_layer(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are delivered (two-pass) or released (one-pass), and what was delivered is not kept."""
    training = on_host(path, model=one_layer(zoo.llama), strategy="two_pass", max_physical_batch_size=EXAMPLES)
    alive: list[int] = []
    addresses: dict[str, tuple[Any, int]] = {}
    sums = host(training)._host_sums
    add = type(sums).add

    def spied(self: Any, name: str, grad: Tensor) -> None:
        add(self, name, grad)
        addresses[name] = (weakref.ref(grad), grad.nbytes)
        alive.append(sum(n for ref, n in addresses.values() if ref() is not None))

    monkeypatch.setattr(type(sums), "add", spied)
    training.one_batch()
    names = [name for name, _ in training.model.named_parameters()]
    assert sorted(addresses) == sorted(names) and len(alive) == len(names)
    assert max(alive) <= max(n for _, n in addresses.values())


# --- noise -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("secure", [False, True])
def test_noise_reaches_every_element_once_with_its_deviation(path: Path, secure: bool) -> None:
    """No example is drawn, so what moves a parameter is the noise: N(0, (sigma C / b)^2), float32, drawn once."""
    seen: list[tuple[int, torch.dtype, str]] = []

    class Spy(dpft.GaussianNoise):
        def add_(self, tensor: Tensor, std: float) -> Tensor:
            seen.append((tensor.data_ptr(), tensor.dtype, tensor.device.type))
            return super().add_(tensor, std)

    model = tiny_llama()
    training = on_host(
        path,
        model=model,
        make=lambda ps: torch.optim.SGD(ps, lr=1.0),
        test_seed=None,
        changes={
            "sample_rate": 1e-9,
            "noise_multiplier": 2.0,
            "max_grad_norm": 1.5,
            "num_steps": 2,
            "secure_rng": secure,
        },
    )
    host(training).noise = Spy(secure=secure)
    moves = []
    for _ in range(2):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        training.train(1)
        for name, p in model.named_parameters():
            move = (p.detach() - before[name]).double()
            assert abs(move.square().mean().sqrt() / 0.5 - 1) < 6 / math.sqrt(2 * move.numel()), name
            assert move.unique().numel() > 0.99 * move.numel()
        moves.append(torch.cat([(p.detach() - before[n]).flatten() for n, p in model.named_parameters()]))
    assert abs(torch.corrcoef(torch.stack(moves))[0, 1]) < 5 / math.sqrt(len(moves[0]))
    count = len(list(model.parameters()))
    assert len(seen) == 2 * count == 2 * len({address for address, _, _ in seen})
    assert {(dtype, device) for _, dtype, device in seen} == {(torch.float32, "cpu")}


def test_an_element_without_noise_stops_the_release(path: Path) -> None:
    training = on_host(path)
    training.one_batch()
    before, sums = values(training.model), host(training)._host_sums
    sums._sums.pop("model.norm.weight")
    with pytest.raises(EngineError, match="noised"):
        training.optimizer.step()
    assert torch.equal(values(training.model), before)


# --- the order of events, and what must not happen -------------------------------------------------------------------


def test_the_line_is_on_the_disk_before_masters_and_parameters_change(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = on_host(path)
    counts: list[int] = []
    state = [values(training.model), torch.cat([m.flatten() for m in masters(training)])]
    release = type(host(training)._host_sums).release

    def spied(*args: Any) -> None:
        counts.append(Ledger.read(path).count)
        assert torch.equal(values(training.model), state[0])
        assert torch.equal(torch.cat([m.flatten() for m in masters(training)]), state[1])
        release(*args)

    monkeypatch.setattr(type(host(training)._host_sums), "release", spied)
    for _ in training.physical():
        state = [values(training.model), torch.cat([m.flatten() for m in masters(training)])]
    assert counts == [1, 2, 3]


def test_a_ledger_that_cannot_be_written_stops_the_release(path: Path) -> None:
    training = on_host(path)
    before = values(training.model)
    path.unlink()
    training.one_batch()
    with pytest.raises(LedgerError, match="deleted"):
        training.optimizer.step()
    assert torch.equal(values(training.model), before) and not training.inner.state


def test_the_inner_optimiser_does_not_step_alone(path: Path) -> None:
    training = on_host(path)
    training.one_batch()
    before = values(training.model)
    with pytest.raises(WrapError, match="without noise"):
        training.inner.step()
    training.inner._optimizer_step_pre_hooks.clear()
    with pytest.raises(EngineError, match="step hook that adds noise was removed"):
        training.backward(collate(examples()[:2]))
    assert torch.equal(values(training.model), before) and training.run.steps == 0


@pytest.mark.parametrize("how", ["break", "error in the backward", "error in the loop"])
def test_what_was_abandoned_is_not_in_the_next_batch(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"noise_multiplier": 0, "sample_rate": 1.0}
    expected = values(on_host(tmp_path / "a", changes=changes).train(1).model)
    training = on_host(tmp_path / "b", changes=changes)
    sums = host(training)._host_sums
    add = type(sums).add

    def fails(self: Any, name: str, grad: Tensor) -> None:
        if name.endswith("norm.weight"):
            raise MemoryError
        add(self, name, grad)

    try:
        for number, batch in enumerate(training.loader):
            if how == "error in the loop" and number == 1:
                raise MemoryError
            if how == "error in the backward" and number == 1:
                monkeypatch.setattr(type(sums), "add", fails)
            training.backward(batch)
            training.optimizer.step()
            training.optimizer.zero_grad()
            if how == "break" and number == 1:
                break
    except MemoryError:
        monkeypatch.undo()
        if how == "error in the backward":
            with pytest.raises(ClippingError, match="failed midway"):
                host(training)._before_release()
    assert training.run.steps == 0
    training.train(1)
    assert torch.equal(values(training.model), expected) and training.run.steps == 1


def test_a_gradient_that_is_no_clipped_sum_is_refused(path: Path) -> None:
    training = on_host(path)
    training.one_batch()
    before = values(training.model)
    next(iter(training.model.parameters())).grad = torch.ones_like(next(iter(training.model.parameters())))
    with pytest.raises(WrapError, match="not the clipped sum"):
        training.optimizer.step()
    assert torch.equal(values(training.model), before) and training.run.steps == 0
    training.train(1)
    with pytest.raises(DPFTError):
        next(iter(training.model.parameters())).square().sum().backward()
    with pytest.raises(WrapError, match="added"):
        training.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})


def test_zero_grad_inside_a_logical_batch_keeps_the_sum(tmp_path: Path) -> None:
    """Cut into physical batches or not: the same draws, the same noise."""
    ends = [
        values(on_host(tmp_path / str(rows), max_physical_batch_size=rows, static_shapes=rows == 5).train().model)
        for rows in (1, 5)
    ]
    moved = (ends[0] - values(tiny_llama())).norm()
    assert all((end - ends[0]).norm() < 1e-5 * moved for end in ends[1:])


# --- the strategy ----------------------------------------------------------------------------------------------------


def test_auto_counts_all_that_one_pass_keeps(path: Path) -> None:
    """With its sums in `.grad` a device has a gradient anyway; with sums on the host what is kept is the only one."""
    training = on_host(path, memory=0, max_physical_batch_size=1)
    uses = training.model._dpft_state.uses
    asked = (uses, 1, 6, 4, 0, torch.device("cpu"))
    assert choose_strategy(*asked).strategy == "one_pass"
    assert choose_strategy(*asked, sums_elsewhere=True).strategy == "two_pass"
    training.one_batch()
    assert dpft.stats(training.model).strategy == "two_pass"
    roomy = on_host(path.with_name("roomy"), max_physical_batch_size=1)
    roomy.one_batch()
    assert dpft.stats(roomy.model).strategy == "one_pass"


def test_a_forward_without_rules_is_run_one_by_one(tmp_path: Path) -> None:
    """As in any training of one process: nobody else has to agree."""
    ends = []
    for device in (None, "cpu"):
        model = tiny_llama()
        original = model.model.forward  # type: ignore[union-attr,operator]  # of an HF model

        def forward(*args: Any, original: Any = original, model: Any = model, **kwargs: Any) -> Any:
            out = original(*args, **kwargs)
            gate = model.model.layers[0].mlp.gate_proj.weight.square().mean()  # read by nobody's rule
            out.last_hidden_state = out.last_hidden_state * (1 + gate)
            return out

        model.model.forward = forward  # type: ignore[union-attr,method-assign]  # of an HF model
        training = Training(
            tmp_path / str(device), model=model, sums_device=device, changes={"noise_multiplier": 0}
        ).train()
        assert dpft.stats(training.model).strategy == "per_example"
        ends.append(values(training.model))
    assert (ends[0] - ends[1]).norm() < 1e-6 * (ends[0] - values(tiny_llama())).norm() > 0
