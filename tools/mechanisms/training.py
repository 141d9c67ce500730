"""One private training of the recipe's small Llama on docstrings, by a variant of optimiser and mechanism."""

from __future__ import annotations

import functools
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars

import dpft
from accelerate import Accelerator
from finetune.loop import make_optimizer, make_scheduler
from finetune.materials import Materials
from finetune.options import Options
from finetune.recipe import Recipe
from tools.mechanisms.average import Average
from tools.mechanisms.settings import (
    BANDS,
    BATCH,
    CLIP_NORM,
    DECAYS,
    DELTA,
    MECHANISMS,
    STEPS,
    TOKENS,
    Training,
    Variant,
)

TRAINED = ("model.layers.2.", "model.norm.")  # a third of the time of all parameters
PHYSICAL = 256  # of rows of 16 tokens; a logical batch is one physical batch


@functools.cache
def materials(evaluated: int) -> Materials:
    """Read and tokenised once in a process."""
    disable_progress_bars()
    return Recipe().materials(Options(seq_len=TOKENS, max_eval_examples=evaluated), Accelerator(cpu=True))


def privacy_config(mechanism: str, epsilon: float) -> dpft.PrivacyConfig:
    """Of a training, to be calibrated."""
    chosen = dict(MECHANISMS[mechanism])
    if mechanism == "bandmf":
        chosen["bands"] = BANDS[epsilon]
    return dpft.PrivacyConfig(
        target_epsilon=epsilon,
        target_delta=DELTA,
        expected_batch_size=BATCH,
        num_steps=STEPS,
        max_grad_norm=CLIP_NORM,
        **chosen,
    )


@functools.cache
def loss_before(evaluated: int) -> float:
    """Of the model before training."""
    return Recipe().measure(Recipe().model(Options(), torch.float32), materials(evaluated))["loss"]


@functools.cache
def calibrated(mechanism: str, epsilon: float, examples: int) -> tuple[dpft.PrivacyConfig, dpft.PrivacySchedule]:
    """The configuration with the noise that spends this epsilon, and its schedule."""
    config = privacy_config(mechanism, epsilon)
    schedule = config.resolve(examples)
    return replace(config, target_epsilon=None, noise_multiplier=schedule.noise_multiplier), schedule


def optimizer_of(variant: Variant, options: Options, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The recipe's, or AdamW with the corrected second moment."""
    if variant.floor is None:
        return make_optimizer(replace(options, optim=variant.optimizer), model)
    return dpft.AdamWBC(
        [p for p in model.parameters() if p.requires_grad],
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        weight_decay=options.weight_decay,
        floor=variant.floor,
    )


def train(training: Training, evaluated: int) -> dict[str, Any]:
    """Train once.

    The seed fixes sampling and noise, so that a result can be had again: as a run it is not private.

    Args:
        training: what.
        evaluated: validation examples, at most.

    Returns:
        What was trained, noise multiplier, the epsilon that it would spend, validation loss before and after (nats a
        token), that of the averaged weights by decay, and seconds of training.
    """
    torch.set_num_threads(1)
    variant, inputs = training.variant, materials(evaluated)
    schedule_of_rate = "constant" if variant.constant else "cosine"
    options = Options(learning_rate=training.learning_rate, seq_len=TOKENS, lr_scheduler_type=schedule_of_rate)
    recipe, accelerator = Recipe(), Accelerator(cpu=True)
    config, schedule = calibrated(variant.mechanism, training.epsilon, len(inputs.train))
    model = recipe.model(options, torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(TRAINED))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model, optimizer, loader = dpft.prepare(
            accelerator,
            model,
            optimizer_of(variant, options, model),
            inputs.train,
            config,
            collate_fn=inputs.collate_train,
            max_physical_batch_size=PHYSICAL,
            ledger_path=Path(folder) / "ledger.jsonl",
            test_seed=training.seed,
        )
        averages = [Average(model, optimizer, decay=d) for d in DECAYS] if variant.averaged else []
        scheduler = make_scheduler(options, optimizer, schedule.num_steps)
        began = time.process_time()
        model.train()
        for batch in loader:
            accelerator.backward(model(**batch).loss)
            last = loader.is_last
            optimizer.step()
            optimizer.zero_grad()
            if last:
                scheduler.step()
        seconds = time.process_time() - began
        loader.privacy.close()
    found: dict[str, Any] = {
        "variant": variant.name,
        "epsilon": training.epsilon,
        "learning_rate": training.learning_rate,
        "seed": training.seed,
        "examples": len(inputs.train),
        "noise_multiplier": schedule.noise_multiplier,
        "epsilon_of_schedule": schedule.epsilon,
        "loss_before": loss_before(evaluated),
        "loss": recipe.measure(model, inputs)["loss"],
        "seconds": seconds,
    }
    if averages:
        found["averaged"] = {}
    for average in averages:
        with average.applied():
            found["averaged"][f"{average.decay:g}"] = recipe.measure(model, inputs)["loss"]
    return found
