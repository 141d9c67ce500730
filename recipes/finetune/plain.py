"""--compare-nonprivate: the same training without privacy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from accelerate import Accelerator
from finetune.engine import weight_dtype
from finetune.loop import History, make_optimizer, make_scheduler, validation_row
from finetune.materials import Materials
from finetune.model import lengthen
from finetune.recipe import Recipe

FOR_DPFT = ("example_ids", "example_weight")  # of a batch; no argument of a bare model


def train_without_privacy(
    recipe: Recipe, options: Any, materials: Materials, accelerator: Accelerator, history: History, steps: int
) -> dict[str, float]:
    """Train a fresh copy for as many steps of as many examples without clipping or noise; its measures.

    For one process.
    """
    model = lengthen(recipe.model(options, weight_dtype(options, accelerator)), options, accelerator)
    model = model.to(accelerator.device).train()
    like = "adamw" if options.optim == "adamw_bc" else options.optim  # without noise it is the same
    optimizer = make_optimizer(replace(options, optim=like), model, options.compare_learning_rate)
    scheduler = make_scheduler(options, optimizer, steps)
    generator = torch.Generator().manual_seed(options.seed)
    size = min(round(options.expected_batch_size), len(materials.train))

    def forward(**batch: Any) -> Any:
        return model(**{name: value for name, value in batch.items() if name not in FOR_DPFT})

    history.add(validation_row(0, recipe.measure(model, materials), "nonprivate_"))
    for step in range(1, steps + 1):
        drawn = torch.randperm(len(materials.train), generator=generator)[:size].tolist()
        physical = options.max_physical_batch_size or 1
        for start in range(0, size, physical):
            part = drawn[start : start + physical]
            batch = materials.collate_train([materials.train[i] for i in part])
            batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
            (recipe.losses(forward, batch).mean() * (len(part) / size)).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if accelerator.is_main_process and step % 10 == 0:
            accelerator.print(f"without privacy: step {step} of {steps}")
    after = recipe.measure(model, materials)
    history.add(validation_row(steps, after, "nonprivate_"))
    return after
