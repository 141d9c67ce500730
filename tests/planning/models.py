"""Small causal LMs, made from a config, and the measurement of a real step that a prediction is held against."""

from __future__ import annotations

import functools
import gc
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dpft
from tests.memory_meter import MemoryMeter

VOCAB = 600


def llama(layers: int = 2, **more: Any) -> nn.Module:
    """Llama, 64 wide, grouped-query attention."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "use_cache": False,
    }
    return hf.LlamaForCausalLM(hf.LlamaConfig(**(sizes | {"num_hidden_layers": layers} | more)))


def gpt2(**more: Any) -> nn.Module:
    """GPT-2, 64 wide, its head tied unless told otherwise, without dropout."""
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 1024, "use_cache": False}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**(sizes | none | more)))


def lora() -> nn.Module:
    """Llama with LoRA factors, everything else frozen."""
    import peft

    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(llama(), config)


# Two layers where layers are what is tested (peaks over several, repeated shapes, LoRA); one where it is the head, the
# attention or the family: a simulation takes a second a layer.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "llama-1": functools.partial(llama, layers=1),
    "llama-tied": functools.partial(llama, layers=1, tie_word_embeddings=True),
    "llama-wide-vocabulary": functools.partial(llama, layers=1, vocab_size=6000),
    "llama-eager": functools.partial(llama, layers=1, attn_implementation="eager"),
    "gpt2": functools.partial(gpt2, n_layer=1),
    "gpt2-untied": functools.partial(gpt2, n_layer=1, tie_word_embeddings=False),
    "lora": lora,
}


def built(name: str, checkpointing: bool = False, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model of :data:`MODELS` in training mode."""
    model: Any = MODELS[name]().to(dtype).train()
    if checkpointing:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    built_model: nn.Module = model
    return built_model


def measured(
    model: nn.Module, strategy: Any, batch_size: int, seq_len: int, clip_groups: Any = None
) -> tuple[int, int, int]:
    """Bytes at the peak of a real step and of one more onto its gradient, and FLOPs; the model is used up."""
    if strategy is not None:
        dpft.wrap(model, strategy=strategy, clip_groups=clip_groups)
    ids = torch.randint(0, VOCAB, (batch_size, seq_len), generator=torch.Generator().manual_seed(1))
    warm = ids[:, :8]
    # The isolation check of a batch runs at backward 1, 2, 4, 8: the steps measured are 5 to 7.
    for _ in range(4 if batch_size > 1 and strategy is not None else 1):
        model(input_ids=warm, labels=warm).loss.backward()
    counter = FlopCounterMode(display=False)
    with counter:
        model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad(set_to_none=True)
    gc.collect()  # of the counter's hooks, which hold tensors in cycles
    peaks = []
    with MemoryMeter([*model.parameters(), *model.buffers(), ids]) as meter:
        for _ in range(2):
            meter.reset_peak()
            model(input_ids=ids, labels=ids).loss.backward()
            peaks.append(meter.peak)
    return peaks[0], peaks[1], counter.get_total_flops()
