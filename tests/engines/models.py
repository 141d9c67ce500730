"""The models that engines are tested with. Weights are numbers that bf16 holds exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests import zoo


def rounded(model: nn.Module) -> nn.Module:
    """The model with weights that bf16 holds exactly."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16().to(p.dtype))
    return model


def plain_llama() -> nn.Module:
    return rounded(zoo.seeded(zoo.llama)("sdpa"))


def tied_llama() -> nn.Module:
    return rounded(zoo.seeded(lambda attention: zoo.llama(attention, tie_word_embeddings=True))("sdpa"))


def grouped() -> nn.Module:  # two queries a key
    return rounded(zoo.seeded(lambda attention: zoo.llama(attention, num_key_value_heads=2))("sdpa"))


def frozen_embedding() -> nn.Module:
    model = plain_llama()
    model.get_submodule("model.embed_tokens").requires_grad_(False)
    return model


def with_lora() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return rounded(get_peft_model(plain_llama(), config))


def gpt2() -> nn.Module:
    return rounded(zoo.seeded(zoo.gpt2)("sdpa"))


def experts() -> nn.Module:
    model: Any = rounded(zoo.seeded(zoo.qwen3_moe)("sdpa"))
    model.set_experts_implementation("grouped_mm")  # ZeRO-3 needs it
    return model


def hybrid() -> nn.Module:
    model: Any = rounded(zoo.seeded(zoo.hybrid)("sdpa"))
    model._no_split_modules = ["Qwen3_5DecoderLayer"]  # FSDP's policy looks for that of images too, which it lacks
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": plain_llama,
    "tied": tied_llama,
    "grouped": grouped,
    "frozen embedding": frozen_embedding,
    "lora": with_lora,
    "gpt2": gpt2,
    "experts": experts,
    "hybrid": hybrid,
}
