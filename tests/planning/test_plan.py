"""`plan`: what it chooses, that a wrapped model chooses the same, and that it touches nothing."""

from __future__ import annotations

import copy
import functools
import json
import math
import warnings
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dpft
from dpft.planning.hardware import HARDWARE, Hardware
from dpft.planning.plan import plan
from dpft.planning.predictor import PROBE
from dpft.planning.result import Plan
from dpft.planning.simulate import ENGINES, EngineName
from tests.clipping.test_one_by_one import ENTRIES
from tests.planning.models import VOCAB, built, llama

FP32 = torch.float32
CPU = Hardware(
    "test", 2**33, {FP32: 1e11, torch.bfloat16: 1e11, torch.float64: 5e10}, 0.5, 1e10, 1e-5, False, "made up"
)


def planned(model: nn.Module, *args: Any, **kwargs: Any) -> Plan:
    return plan(model, *args, **({"hardware": CPU} | kwargs))


@functools.cache
def plan_of(name: str) -> Plan:
    """Of B = 2, T = 48: for what is read of it, several tests share one."""
    return planned(built(name), 2, 48)


def borders(model: nn.Module, batch_size: int, seq_len: int) -> tuple[int, int]:
    """Bytes that one-pass and two-pass need."""
    found = planned(model, batch_size, seq_len, memory=2**40).predictions
    return found["one_pass"].total_bytes, found["two_pass"].total_bytes


@pytest.mark.usefixtures("simulated_once")
@pytest.mark.parametrize(("batch_size", "seq_len"), [(2, 16), (4, 12)])
def test_a_wrapped_model_chooses_what_was_planned(batch_size: int, seq_len: int) -> None:
    """One-pass down to the last byte that it needs, two-pass below, at training time too."""
    one, two = borders(built("llama-1", checkpointing=True), batch_size, seq_len)
    assert two < one, "no border to test"
    for memory, choice in ((one, "one_pass"), (one - 1, "two_pass")):
        model = built("llama-1", checkpointing=True)
        found = planned(model, batch_size, seq_len, memory=memory)
        assert found.choice == choice and found.fits
        dpft.wrap(model, strategy="auto", memory=found.allowance)
        ids = torch.randint(0, VOCAB, (batch_size, seq_len))
        model(input_ids=ids, labels=ids).loss.backward()
        assert dpft.stats(model).strategy == found.choice
        reason = found.reason.split(". per_example is predicted")[0]  # advice that a plan alone gives
        assert reason in dpft.explain(model, batch_size, seq_len)


def test_one_pass_where_nothing_fits_and_two_pass_holds_no_less() -> None:
    found = planned(llama(1), 1, 64, memory=1000)
    assert found.predictions["one_pass"].total_bytes <= found.predictions["two_pass"].total_bytes
    assert found.choice == "one_pass" and not found.fits and "DOES NOT FIT" in found.reason


def test_the_choice_is_the_fastest_that_fits() -> None:
    """Predicted times: one-pass is never behind two-pass, and two-pass pays for its second traversal."""
    for name in ("llama", "lora"):
        found = plan_of(name)
        one, two = found.predictions["one_pass"], found.predictions["two_pass"]
        assert found.choice == "one_pass" and found.fits
        assert one.seconds < two.seconds and one.flops < two.flops
        assert one.time_ratio == one.seconds / found.plain.seconds
        assert one.memory_ratio == one.peak_bytes / found.plain.peak_bytes
        assert found.plain.time_ratio == found.plain.memory_ratio == 1


@pytest.mark.parametrize("wrapped", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_model_is_only_read(wrapped: bool) -> None:
    """Values, gradients, hooks, mode, configuration, wrapping and random numbers are as before; hooks do not run."""
    model: Any = built("lora").eval()
    if wrapped:
        dpft.wrap(model, strategy="two_pass")
    ids = torch.randint(0, VOCAB, (2, 8))
    model(input_ids=ids, labels=ids).loss.backward()
    calls: list[str] = []
    model.register_forward_hook(lambda *_: calls.append("forward"))
    for p in (p for p in model.parameters() if p.requires_grad):
        p.register_hook(lambda _: calls.append("gradient"))
    before = {name: (id(p), p._version, id(p.grad)) for name, p in model.named_parameters()}
    values = copy.deepcopy(model.state_dict())
    attributes = {path: dict(m.__dict__) for path, m in model.named_modules()}
    config, state = copy.deepcopy(model.config.to_dict()), torch.get_rng_state()
    report = dpft.stats(model) if wrapped else None
    planned(model, 2, 16, dtype="bf16", checkpointing=True)
    assert not calls and torch.equal(torch.get_rng_state(), state)
    assert {name: (id(p), p._version, id(p.grad)) for name, p in model.named_parameters()} == before
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())
    for path, module in model.named_modules():
        assert module.__dict__.keys() == attributes[path].keys(), path
        assert all(module.__dict__[k] is v for k, v in attributes[path].items() if k != "training"), path
        assert not module.training
    assert model.config.to_dict() == config
    assert not wrapped or dpft.stats(model) is report


def test_torch_is_left_as_it_was() -> None:
    """What is answered for meta tensors during a simulation is put back, also after an error."""
    functional = nn.functional.scaled_dot_product_attention
    others = torch.autocast, torch.is_autocast_enabled, hf.masking_utils.find_packed_sequence_indices
    planned(llama(1), 1, 8)
    config = hf.LlamaConfig(vocab_size=8, hidden_size=32, num_hidden_layers=1)
    with pytest.raises(dpft.UnsupportedModuleError, match="could not be run on meta tensors"):
        planned(BranchingForCausalLM(config), 1, 8)
    assert nn.functional.scaled_dot_product_attention is functional
    assert others == (torch.autocast, torch.is_autocast_enabled, hf.masking_utils.find_packed_sequence_indices)


class BranchingForCausalLM(hf.LlamaForCausalLM):
    """Looks at the data."""

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        assert bool((input_ids >= 0).all())
        return super().forward(input_ids, **kwargs)


def test_a_large_model_is_planned_from_its_shapes() -> None:
    """One block of Llama-3.1-8B and a quarter of its vocabulary, at 131,072 tokens: from shapes alone."""
    config = hf.LlamaConfig(
        vocab_size=32064,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
    )
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(config)
    found = plan(model, seq_len=131072, dtype="bf16", checkpointing=True)
    assert found.hardware is HARDWARE["h100"] and found.memory == HARDWARE["h100"].memory
    assert "h100 (NVIDIA H100 data sheet" in str(found)
    linear = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name)
    head = 32064 * 4096
    # a product for the forward, one for its recomputation but for the head's, two for the backward
    least = 2 * 131072 * (4 * (linear - head) + 3 * head)
    assert found.plain.flops - found.plain.attention_flops == pytest.approx(least, rel=0.1)
    assert found.predictions["one_pass"].memory_ratio < 0.8  # logits are [131072, 32064]
    assert all(p.device.type == "meta" for p in model.parameters())


@pytest.mark.slow  # many sizes; that prepare takes what is found: test_prepare.py
@pytest.mark.usefixtures("simulated_once")
def test_batch_size_auto_grows_with_the_memory() -> None:
    model = llama(1)
    total = planned(model, 2, 64, memory=2**40).predictions["one_pass"].total_bytes
    two = math.ceil(total * PROBE)  # with the isolation check of a first step
    found = [planned(model, "auto", 64, memory=m) for m in (two - 1, two, 2 * two)]
    sizes = [p.batch_size for p in found]
    assert sizes[0] == 1 < sizes[1] and sizes == sorted(sizes) and sizes[-1] > 2
    assert all(p.fits for p in found)
    each = [p.predictions[p.choice].seconds / p.batch_size for p in found]
    assert each == sorted(each, reverse=True)


@pytest.mark.slow  # five engines
def test_engines_hold_their_part() -> None:
    """At rest: what an engine shards is divided by its ranks; the clipped sums are whole under DDP and ZeRO-1."""
    model = llama(1)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    found = {
        engine: planned(model, 2, 32, engine=engine, world_size=4, optimizer="adamw", memory=2**33)
        for engine in ENGINES[1:]
    }
    whole = {"ddp": 1.0, "zero1": 1.0, "zero2": 1.0, "fsdp2": 0.25, "zero3": 0.25}
    states = {"ddp": 2.0, "fsdp2": 0.5, "zero1": 0.75, "zero2": 0.75, "zero3": 0.75}
    peak: dict[str, int] = {}
    for engine, plan_ in found.items():
        assert plan_.resting["parameters and buffers"] == pytest.approx(whole[engine] * size, rel=0.01)
        assert plan_.resting["optimiser states"] == pytest.approx(states[engine] * size, rel=0.01)
        assert plan_.choice == "one_pass" and f"{engine} on 4 ranks" in str(plan_)
        peak[engine] = plan_.predictions["one_pass"].accumulating_peak_bytes
    for sharded, not_sharded in (("fsdp2", "ddp"), ("zero2", "zero1"), ("zero3", "ddp")):
        assert peak[not_sharded] - peak[sharded] == pytest.approx(0.75 * size, rel=0.01)
    assert 0 < found["fsdp2"].resting["gathered parameters"] <= size
    assert found["ddp"].plain.peak_bytes > size + found["zero1"].plain.peak_bytes - 1  # the buckets


@pytest.mark.usefixtures("simulated_once")
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_engines_take_one_strategy_for_all_ranks(engine: EngineName) -> None:
    """At the last byte that one-pass needs, and below."""
    model: Any = llama(1)
    model.gradient_checkpointing_enable()
    ranks: dict[str, Any] = {"engine": engine, "world_size": 4}
    found = planned(model, 2, 16, memory=2**40, **ranks).predictions
    one, two = (found[s].total_bytes for s in ("one_pass", "two_pass"))
    assert two < one, "no border to test"
    assert planned(model, 2, 16, memory=one, **ranks).choice == "one_pass"
    short = planned(model, 2, 16, memory=one - 1, **ranks)
    assert short.choice == "two_pass" and ("gathered once more" in short.reason) == (engine == "fsdp2")


def test_bf16_gradients_are_float32_under_an_optimiser() -> None:
    bare, run = (planned(llama(1), 1, 8, dtype="bf16", optimizer=o) for o in (None, "sgd"))
    sizes = [p.numel() for p in llama(1).parameters()]
    size = sum(sizes) - max(sizes)  # the product that is being made is float32 in both
    grown = run.predictions["two_pass"].accumulating_peak_bytes - bare.predictions["two_pass"].accumulating_peak_bytes
    assert 2 * size <= grown <= 3 * sum(sizes)


def test_prints_and_goes_to_json() -> None:
    found = plan_of("llama")
    text = str(found)
    for row in ("plain", "one_pass *", "two_pass", "per_example", "model.layers.*.mlp.up_proj.weight", found.reason):
        assert row in text
    assert all(len(line) <= 119 for line in text.splitlines() if line[:2] not in ("* ", "- "))
    back = json.loads(json.dumps(found.to_dict()))
    assert back["predictions"]["one_pass"]["peak_bytes"] == found.predictions["one_pass"].peak_bytes
    assert back["hardware"]["name"] == "test" and back["fits"] is True
    assert sum(layer.count for layer in found.layers) == sum(p.dim() == 2 for p in llama().parameters())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": "most"}, "or 'auto'"),
        ({"seq_len": True}, "seq_len is True"),
        ({"world_size": 0, "engine": "ddp"}, "world_size is 0"),
        ({"world_size": 2}, "name the engine"),
        ({"engine": "horovod"}, "engine is 'horovod'"),
        ({"hardware": "abacus"}, "hardware is 'abacus'"),
        ({"memory": 0}, "memory is 0"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"dtype": torch.int32}, "dtype is torch.int32"),
        ({"optimizer": "lion"}, "optimizer is 'lion'"),
    ],
)
def test_refuses(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(llama(1), **kwargs)


def test_refuses_models_that_it_cannot_plan() -> None:
    frozen = llama(1).requires_grad_(False)
    for model, message in ((frozen, "unfreeze"), (nn.Linear(2, 2), "not a causal LM"), (nn.Sequential(), "unfreeze")):
        with pytest.raises(dpft.UnsupportedModuleError, match=message):
            planned(model)


def test_warns_beyond_the_models_positions() -> None:
    with pytest.warns(UserWarning, match="beyond the model's max_position_embeddings 1024"):
        planned(llama(1), 1, 1025)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        planned(llama(1), 1, 1024)


@pytest.mark.slow
def test_experts_are_planned_with_tokens_spread_evenly() -> None:
    """The steps of a mixture of experts run without its data-dependent routing; FLOPs are those of a real step."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_key_value_heads": 2}
    config = hf.Qwen3MoeConfig(**sizes, **experts)
    config._experts_implementation = "eager"
    model = hf.Qwen3MoeForCausalLM(config).train()
    found = planned(model, 2, 48)
    assert found.choice == "one_pass" and any("experts" in layer.name for layer in found.layers)
    assert config._experts_implementation == "eager"
    ids = torch.randint(0, VOCAB, (2, 48))
    for strategy, prediction in (("plain", found.plain), ("one_pass", found.predictions["one_pass"])):
        real = copy.deepcopy(model)
        if strategy != "plain":
            dpft.wrap(real, strategy="one_pass", isolation="off")
            for _ in range(2):  # the isolation check by gradients
                real(input_ids=ids[:, :8], labels=ids[:, :8]).loss.backward()
        with FlopCounterMode(display=False) as counter:
            real(input_ids=ids, labels=ids).loss.backward()
        # segments of unequal lengths take other Gram matrices than equal ones
        flops = prediction.flops - prediction.attention_flops  # a CPU's kernel is not counted
        assert flops == pytest.approx(counter.get_total_flops(), rel=0.02), strategy


def test_what_no_rule_covers_is_planned_one_by_one() -> None:
    """Found by wrap, or by the first forward; the reason names the parameter."""
    for kind, name in (("kernel", "mlp.weight"), ("function", "mlp.points")):
        found = planned(ENTRIES[kind].build(), 2, 9)
        assert found.choice == "per_example" and set(found.predictions) == {"per_example"}
        assert "one example at a time" in found.reason and name in found.reason
