"""One private training of the recipe's small Llama on docstrings, and its validation loss."""

from __future__ import annotations

import functools
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars

from accelerate import Accelerator
from finetune.loop import make_optimizer, make_scheduler
from finetune.materials import Materials
from finetune.options import Options
from finetune.private import prepare, privacy_config
from finetune.recipe import Recipe

DELTA, TOKENS = 1e-6, 64


@dataclass(frozen=True)
class Setting:
    """What is varied; AdamW with the recipe's betas and its cosine schedule, and delta 1e-6, are not."""

    epsilon: float
    batch: int
    steps: int
    learning_rate: float
    clip_norm: float = 1.0
    lora_r: int = 0


@functools.cache
def _materials(evaluated: int) -> Materials:
    """Read and tokenised once in a process."""
    disable_progress_bars()
    return Recipe().materials(Options(seq_len=TOKENS, max_eval_examples=evaluated), Accelerator(cpu=True))


def train(setting: Setting, evaluated: int) -> dict[str, Any]:
    """Train once, with fresh noise and fresh batches.

    Args:
        setting: of the training.
        evaluated: validation examples.

    Returns:
        The setting, with noise multiplier, epsilon, validation loss before and after (nats a token), the share of
        clipped examples and the median gradient norm over the first and the last step, and seconds of training.
    """
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)
    materials = _materials(evaluated)
    options = Options(
        target_epsilon=setting.epsilon,
        target_delta=DELTA,
        expected_batch_size=setting.batch,
        num_steps=setting.steps,
        learning_rate=setting.learning_rate,
        max_grad_norm=setting.clip_norm,
        lora_r=setting.lora_r,
        seq_len=TOKENS,
        max_physical_batch_size=32,
    )
    recipe, accelerator = Recipe(), Accelerator(cpu=True)
    model = recipe.model(options, torch.float32)
    before = recipe.measure(model, materials)["loss"]
    optimizer = make_optimizer(options, model)
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(
            accelerator,
            model,
            optimizer,
            materials.train,
            privacy_config(options),
            materials.collate_train,
            recipe.losses,
            options,
            Path(folder) / "ledger.jsonl",
            recipe.lengths(materials.train),
        )
        schedule = prepared.schedule
        scheduler = make_scheduler(options, prepared.optimizer, schedule.num_steps)
        norms: list[list[torch.Tensor]] = [[]]
        began = time.perf_counter()
        prepared.model.train()
        for batch in prepared.loader:
            accelerator.backward(prepared.loss(batch))
            norms[-1].append(prepared.clipped(batch)[2])
            last = prepared.ends_logical_batch
            prepared.optimizer.step()
            prepared.optimizer.zero_grad()
            if last:
                scheduler.step()
                norms.append([])
        seconds = time.perf_counter() - began
        spent = prepared.epsilon(exact=True)
        prepared.loader.privacy.close()
    after = recipe.measure(prepared.model, materials)["loss"]
    first, end = torch.cat(norms[0]), torch.cat(norms[-2])
    return {
        **asdict(setting),
        "examples": len(materials.train),
        "noise_multiplier": schedule.noise_multiplier,
        "epsilon_spent": spent,
        "loss_before": before,
        "loss_after": after,
        "clipped": [float((n > setting.clip_norm).float().mean()) for n in (first, end)],
        "median_norm": [float(n.median()) for n in (first, end)],
        "seconds": seconds,
    }
