"""FLOPs and memory of a mixture of experts, against plain training of the same model on the same batch.

The shape has half the layers, examples and vocabulary of the one in docs/design.md.
"""

from __future__ import annotations

import functools
import gc
from typing import Any

import pytest
import torch
import transformers as hf
from torch.utils.flop_counter import FlopCounterMode

import dpft
from tests.memory_meter import MemoryMeter


@functools.cache
def costs(strategy: str, implementation: str) -> tuple[int, int]:
    """FLOPs and peak bytes above the parameters of a step, B = 4, T = 128, 16 experts of which a token has two."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128, "vocab_size": 1000}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    config = hf.Qwen3MoeConfig(**sizes, **layers, num_experts=16, num_experts_per_tok=2, use_cache=False)
    torch.manual_seed(0)
    model: Any = hf.Qwen3MoeForCausalLM(config).train()
    for module in model.modules():
        if "Router" in type(module).__name__:
            module.requires_grad_(False)
    model.set_experts_implementation(implementation)
    if strategy != "plain":
        dpft.wrap(model, strategy=strategy, loss_chunk=None)  # type: ignore[arg-type]  # mypy takes it for a str
    ids = torch.randint(0, 1000, (4, 128), generator=torch.Generator().manual_seed(1))
    for _ in range(4):  # the isolation check runs at backward 1, 2, 4, 8
        model(input_ids=ids[:, :8], labels=ids[:, :8]).loss.backward()
    model.zero_grad(set_to_none=True)
    gc.collect()
    with MemoryMeter([*model.parameters(), *model.buffers(), ids]) as meter:
        model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad(set_to_none=True)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    return counter.get_total_flops(), meter.peak


@pytest.mark.slow  # figures, which a change of the rule moves and nothing else
@pytest.mark.parametrize(("strategy", "flops"), [("one_pass", 1.10), ("two_pass", 1.55)])
def test_costs(strategy: str, flops: float) -> None:
    """Of plain training: FLOPs are those of the loop over experts, as the counter does not know grouped products."""
    plain, _ = costs("plain", "eager")
    _, memory = costs("plain", "grouped_mm")
    found = costs(strategy, "grouped_mm")
    assert 1.0 < found[0] / plain <= flops, f"{found[0] / plain:.3f} x"
    assert found[1] <= 1.05 * memory, f"{found[1] / memory:.3f} x"
