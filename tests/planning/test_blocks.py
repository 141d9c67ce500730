"""A plan of a deep model, from steps of 2 and 3 of its blocks, is that of the whole model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from dpft.planning.blocks import repeated_blocks
from dpft.planning.hardware import HARDWARE
from dpft.planning.simulate import Sharding, simulate
from dpft.planning.twin import make_twin


def llama(vocab: int = 300, tied: bool = False, layers: int = 9, **options: Any) -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=64,
            intermediate_size=176,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            use_cache=False,
            tie_word_embeddings=tied,
            **options,
        )
    )


def gpt2() -> nn.Module:
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=64, n_layer=8, n_head=4, use_cache=False, **tokens))


CASES: list[tuple[Callable[[], nn.Module], int, int, bool, str | None, bool, Sharding | None]] = [
    # model, B, T, checkpointing, strategy, GPU, engine
    (llama, 1, 200, False, None, False, None),
    (llama, 3, 64, False, "one_pass", False, None),
    (lambda: llama(9000), 2, 64, True, "one_pass", False, None),  # the head has the peak
    # These take long.
    (llama, 1, 200, True, "one_pass", True, Sharding("fsdp2", 4)),
    (llama, 1, 200, True, "one_pass", False, None),
    (llama, 3, 64, True, "two_pass", True, None),
    (gpt2, 3, 48, False, "one_pass", False, None),
]


@pytest.mark.parametrize(
    "case",
    [*CASES[:-4], *(pytest.param(case, marks=pytest.mark.slow) for case in CASES[-4:])],
    ids=["-".join(str(part) for part in case[1:]) for case in CASES],
)
def test_a_deep_model_is_that_of_shallow_ones(case: Any) -> None:
    make, examples, tokens, checkpointing, strategy, gpu, sharding = case
    twin = make_twin(make(), torch.bfloat16 if gpu else None, checkpointing)
    assert repeated_blocks(twin) is not None
    whole, found = (simulate(twin, examples, tokens, strategy, sharding, gpu=gpu, whole=w) for w in (True, False))
    assert (found.peak, found.accumulating_peak) == (whole.peak, whole.accumulating_peak)
    assert found.flops() == whole.flops() and found.flops(attention=False) == whole.flops(attention=False)
    seconds = [HARDWARE["a100"].seconds(simulation.operations) for simulation in (whole, found)]
    assert seconds[1] == pytest.approx(seconds[0], rel=1e-6)


def test_blocks_that_differ_are_run_as_they_are() -> None:
    assert repeated_blocks(llama(layers=4)) is None  # too few to be worth it
    widened = llama()
    widened.get_submodule("model.layers.3.mlp").add_module("more", nn.Linear(2, 2))
    frozen = llama()
    frozen.get_submodule("model.layers.5").requires_grad_(False)
    mixed = llama(layer_types=["full_attention", "sliding_attention"] * 4 + ["full_attention"], sliding_window=8)
    assert [repeated_blocks(model) for model in (widened, frozen, mixed)] == [None, None, None]
