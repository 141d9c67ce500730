"""Export of the trained model for transformers, from every engine, and the check that it loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import dpft
from accelerate import Accelerator
from finetune.engine import compute_dtype, from_first, unsharded
from finetune.materials import Materials
from finetune.model import merged
from finetune.options import Options
from finetune.output import ADAPTER
from finetune.private import Prepared, chunked, unwrap
from finetune.recipe import Recipe

RELOAD_TOLERANCE = 1e-3  # nats; the same weights differ at most by the order of the sums


def export(
    accelerator: Accelerator, prepared: Prepared, recipe: Recipe, materials: Materials, options: Options, output: Path
) -> None:
    """Write model and tokenizer; with LoRA the adapter and the merged model, which needs no peft. A collective.

    Shards are gathered into the memory of rank 0's CPU, and merged there.

    Raises:
        Exception: on all ranks, the error of rank 0.
    """
    state = accelerator.get_state_dict(prepared.model)
    bare = unwrap(accelerator, prepared.model)
    if options.long_context:
        dpft.long_context(bare, off=True)  # the saved configuration is that of the model without it

    def write() -> None:
        model: Any = bare
        weights, dtype = state, next(iter(state.values())).dtype
        if options.lora_r:
            with unsharded(accelerator):
                model = recipe.model(options, dtype)
            adapter = {name: state[name] for name, p in model.named_parameters() if p.requires_grad}
            # the other weights were not changed; of 4 bits no module can load its own state
            model.load_state_dict(adapter if options.load_in_4bit else state, strict=not options.load_in_4bit)
            model.save_pretrained(output / ADAPTER)
            model = merged(options, output / ADAPTER, dtype) if options.load_in_4bit else model.merge_and_unload()
            weights = model.state_dict()
        model.config.use_cache = True
        model.save_pretrained(output, state_dict=weights)
        materials.tokenizer.save_pretrained(output)

    from_first(accelerator, write)


def reload_and_check(
    accelerator: Accelerator, recipe: Recipe, options: Options, materials: Materials, output: Path, after: float
) -> None:
    """Reload the model on one device and compare its validation loss. For one rank: it calls no collective.

    Raises:
        RuntimeError: the reloaded model has another loss.
    """
    dtype = compute_dtype(options, accelerator)
    with unsharded(accelerator):
        again: Any = recipe.auto_class.from_pretrained(output, dtype=dtype).to(accelerator.device)
    if options.long_context:
        again = chunked(dpft.long_context(again), options)
    reloaded = recipe.measure(again, materials)["loss"]
    # bfloat16 weights that an adapter was merged into were rounded once more
    tolerance = RELOAD_TOLERANCE if dtype == torch.float32 else 2e-2
    if not abs(reloaded - after) <= tolerance:
        raise RuntimeError(
            f"the model saved in {str(output)!r} has a validation loss of {reloaded:.4f}, expected {after:.4f} as "
            "before saving. Do not use it; the last checkpoint is intact."
        )
