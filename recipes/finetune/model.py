"""The model of a run, with adapters, checkpointing and what long texts need."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
)

import dpft
from accelerate import Accelerator, PartialState
from finetune.engine import engine_name, launched_sharded
from finetune.options import Options

# architectures whose weights an AutoModelForCausalLM may load, and whose tokens see those after them
NOT_CAUSAL = ("ForMaskedLM", "ForPreTraining", "Classification", "ForQuestionAnswering", "ForMultipleChoice")


def load_model(options: Options, dtype: torch.dtype) -> nn.Module:
    """Load the model, with the adapters and checkpointing that the options ask for.

    Args:
        options: of the run.
        dtype: of all parameters, frozen ones too.

    Raises:
        ValueError: there is no such model, it is damaged or no causal language model, or the examples are longer than
            its positions; 4 bits under an engine that shards.
        ImportError: peft, bitsandbytes, or the kernels of ``--attn-implementation`` are asked for and missing.
    """
    config = _configuration(options)
    positions = getattr(config, "max_position_embeddings", None)
    if positions and options.row_tokens > positions:
        raise ValueError(
            f"--seq-len {options.row_tokens} is more than the {positions} positions of {options.model!r}. Lower it, "
            "take a model with a longer context, or give a larger --rope-theta."
        )
    model: Any = _bare(options, config, dtype)
    model.config.use_cache = False
    return checkpointed(with_lora(model, options), options)


def checkpointed(model: Any, options: Options) -> nn.Module:
    """``--gradient-checkpointing``: recompute activations in the backward pass."""
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Within it a model, its configuration or tokenizer is read: whatever is raised is said in one ValueError.

    transformers, tokenizers, safetensors and torch have no common class for what is wrong with a file.
    """
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"--model {name!r}: {kind}{' '.join(str(error).split())[:400]}") from error


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; a ValueError if there is none that can be read."""
    with reading(name):
        return AutoTokenizer.from_pretrained(name)


def check_vocabulary(model: nn.Module, tokenizer: Any) -> None:
    """Refuse a tokenizer with larger ids than the model has embeddings.

    Raises:
        ValueError: says both numbers.
    """
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    rows = getattr(embeddings, "num_embeddings", None)
    if rows is None or not isinstance(tokenizer, PreTrainedTokenizerBase):
        return
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= rows:
        raise ValueError(
            f"the tokenizer of --model has ids up to {largest}, and the model {rows} embeddings. Take a tokenizer and "
            "a model that belong together."
        )


def _bare(options: Options, config: Any, dtype: torch.dtype) -> nn.Module:
    """The bare model; with ``--load-in-4bit`` its linear layers in nf4, which compute in ``dtype``."""
    quantised: dict[str, Any] = {}
    if options.load_in_4bit:
        if launched_sharded():
            raise ValueError("--load-in-4bit runs in one process or under ddp.yaml; launch it so, or leave it out.")
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ImportError("--load-in-4bit needs bitsandbytes, which is not installed: pip install bitsandbytes.")
        bits = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
        quantised = {"quantization_config": bits, "device_map": {"": PartialState().device}}
    with reading(options.model):
        model, found = AutoModelForCausalLM.from_pretrained(
            options.model,
            config=config,
            dtype=dtype,
            attn_implementation=options.attn_implementation,
            output_loading_info=True,
            **quantised,
        )
    if found["missing_keys"]:
        raise ValueError(
            f"--model {options.model!r} lacks {len(found['missing_keys'])} tensors of a {type(model).__name__}, such "
            f"as {min(found['missing_keys'])}: they would be random. Take a model with all its weights."
        )
    for module in model.modules():
        # on some CPUs an evaluation packs 4-bit weights, and packed ones let no gradient through
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def merged(options: Options, adapter: Path, dtype: torch.dtype) -> nn.Module:
    """The model that adapters on 4-bit weights were trained on, with these weights in ``dtype`` and the adapter in.

    What the 4 bits stand for, not what they were rounded from: the adapter was trained on that.
    """
    from peft import PeftModel

    base: Any = _bare(options, _configuration(options), dtype)
    return PeftModel.from_pretrained(base.dequantize(dtype), adapter).merge_and_unload()


def _configuration(options: Options) -> Any:
    with reading(options.model):
        config = AutoConfig.from_pretrained(options.model)
    others = [name for name in config.architectures or [] if name.endswith(NOT_CAUSAL)]
    if others:
        raise ValueError(
            f"--model {options.model!r} is a {others[0]}, expected a causal language model, whose tokens see those "
            "before them only."
        )
    if options.rope_theta is not None:
        _extend_positions(config, options)
    return config


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
