"""The model of a run, with adapters, checkpointing and what long texts need."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import dpft
from accelerate import Accelerator
from finetune.engine import engine_name
from finetune.options import Options


def load_model(options: Options, dtype: torch.dtype) -> nn.Module:
    """Load the model, with the adapters and checkpointing that the options ask for.

    Args:
        options: of the run.
        dtype: of all parameters, frozen ones too.

    Raises:
        ValueError: the examples are longer than the model's positions.
        ImportError: LoRA was asked for, and peft is missing; or the kernels of ``--attn-implementation`` are.
    """
    config = AutoConfig.from_pretrained(options.model)
    if options.rope_theta is not None:
        _extend_positions(config, options)
    positions = getattr(config, "max_position_embeddings", None)
    if positions and options.row_tokens > positions:
        raise ValueError(
            f"--seq-len {options.row_tokens} is more than the {positions} positions of {options.model!r}. Lower it, "
            "take a model with a longer context, or give a larger --rope-theta."
        )
    model = AutoModelForCausalLM.from_pretrained(
        options.model, config=config, dtype=dtype, attn_implementation=options.attn_implementation
    )
    model.config.use_cache = False
    return checkpointed(with_lora(model, options), options)


def checkpointed(model: Any, options: Options) -> nn.Module:
    """``--gradient-checkpointing``: recompute activations in the backward pass."""
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _extend_positions(config: Any, options: Options) -> None:
    """Another base of the rotary positions, and as many positions as the rows need; both are saved with the model."""
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        raise ValueError(f"--rope-theta: {options.model!r} has no rotary positions with one base. Leave it out.")
    rope["rope_theta"] = options.rope_theta
    config.max_position_embeddings = max(config.max_position_embeddings, options.row_tokens)


def lengthen(model: nn.Module, options: Options, accelerator: Accelerator) -> nn.Module:
    """``--long-context``: prepare the model for long texts, in place. Before dpft, which wraps inside of the tiles."""
    if options.long_context:
        # under ZeRO-3 each tile would gather the block's parameters
        dpft.long_context(model, tile_mlp=None if engine_name(accelerator) == "zero3" else "auto")
    return model


def with_lora(model: nn.Module, options: Options, task: str = "CAUSAL_LM") -> nn.Module:
    """Add the adapters that the options ask for; ``task`` is PEFT's name of it. Nothing without ``--lora-r``."""
    if not options.lora_r:
        return model
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("--lora-r needs peft, which is not installed: pip install 'dpft[peft]'.") from error
    names: str | list[str] = options.lora_target_modules
    if names != "all-linear":
        names = [name.strip() for name in options.lora_target_modules.split(",") if name.strip()]
    torch.manual_seed(options.seed)  # adapters are initialised at random, and alike on every rank
    config = LoraConfig(r=options.lora_r, lora_alpha=options.lora_alpha, target_modules=names, task_type=task)
    return get_peft_model(model, config)
