"""The one place where the recipe touches dpft: from options to a private loop, and what is read back from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import nn

import dpft
from finetune.options import Options

LEDGER = "ledger.jsonl"


def privacy_config(options: Options) -> dpft.PrivacyConfig:
    """What the options say about privacy, checked."""
    return dpft.PrivacyConfig(
        target_epsilon=options.target_epsilon,
        noise_multiplier=options.noise_multiplier,
        target_delta=options.target_delta,
        max_grad_norm=options.max_grad_norm,
        expected_batch_size=options.expected_batch_size,
        num_steps=options.num_steps,
        num_epochs=options.num_epochs,
        secure_rng=options.secure_rng,
    )


@dataclass
class Prepared:
    """A model, optimiser and loader that train privately."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loader: Any

    @property
    def plan(self) -> Any:
        """The ``dpft.PrivacyPlan`` that they follow."""
        return self.loader.privacy.plan

    @property
    def private(self) -> bool:
        """Whether the run has a finite epsilon."""
        return bool(self.loader.privacy.private)

    @property
    def step(self) -> int:
        """Logical batches released so far, by the ledger."""
        return int(self.loader.privacy.steps)

    @property
    def ends_logical_batch(self) -> bool:
        """Whether the physical batch at hand is the last one of its logical batch."""
        return bool(self.loader.is_last)

    def epsilon(self, exact: bool = False) -> float | None:
        """Spent so far, rounded up unless ``exact``: cheap enough for a progress bar. None if not private."""
        return float(self.loader.privacy.epsilon(exact=exact)) if self.private else None

    def clipped(self, batch: dict[str, torch.Tensor]) -> tuple[float, float]:
        """How many examples of the last physical batch were clipped, and how many there were.

        A figure of the private data without noise: for the eyes of whoever trains, not for publication.
        """
        real = batch["example_weight"] > 0
        factors = dpft.stats(self.model).clip_factors.to(real.device)
        return float(((factors < 1) & real).sum()), float(real.sum())


def prepare(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    dataset: Any,
    privacy: dpft.PrivacyConfig,
    collate: Callable[..., dict[str, torch.Tensor]],
    options: Options,
    ledger: Path,
) -> Prepared:
    """Make the parts of an ordinary loop private."""
    model, optimizer, loader = dpft.prepare(
        accelerator,
        model,
        optimizer,
        dataset,
        privacy,
        collate_fn=collate,
        max_physical_batch_size=options.max_physical_batch_size,
        clipping=cast(Any, options.clipping),  # the command line has checked the choices
        strategy=cast(Any, options.strategy),
        ledger_path=ledger,
    )
    return Prepared(model, optimizer, loader)


def unwrap(accelerator: Accelerator, model: nn.Module) -> Any:
    """The bare Hugging Face model, without what an engine or dpft put around or into it."""
    return dpft.unwrap(accelerator.unwrap_model(model))


def statement(prepared: Prepared) -> str:
    """The privacy statement of the model card, in Markdown."""
    return dpft.privacy_statement_markdown(prepared.loader.privacy.report())
