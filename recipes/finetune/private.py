"""The only module that trains with dpft: from the options to a private loop, and what is read back from it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

import dpft
from accelerate import Accelerator
from finetune.data.users import unit_of
from finetune.materials import Materials
from finetune.options import Options
from finetune.recipe import Recipe


def privacy_config(options: Options) -> dpft.PrivacyConfig:
    """What the options say about privacy, checked."""
    # What a recipe spends on the same records beside the training (--distribution private).
    elsewhere = getattr(options, "epsilon_elsewhere", 0.0)
    return dpft.PrivacyConfig(
        target_epsilon=None if options.target_epsilon is None else options.target_epsilon - elsewhere,
        noise_multiplier=options.noise_multiplier,
        target_delta=options.target_delta,
        max_grad_norm=options.max_grad_norm,
        expected_batch_size=options.expected_batch_size,
        num_steps=options.num_steps,
        num_epochs=options.num_epochs,
        secure_rng=options.secure_rng,
        item=unit_of(options),
        mechanism=cast(Any, options.mechanism),  # the command line has checked the choices
        bands=options.bands,
        buffers=options.buffers,
        sampler=cast(Any, options.chosen_sampler),
        max_batch_size=options.max_batch_size,
        accountant=cast(Any, options.accountant),
        adaptive_clip=_adaptive_clip(options),
        clip_groups=cast(Any, options.groups()),
    )


def _adaptive_clip(options: Options) -> dpft.AdaptiveClip | None:
    """``--adaptive-clip``, with what was given beside it."""
    if options.adaptive_clip is None:
        return None
    rate = {} if options.adaptive_clip_rate is None else {"learning_rate": options.adaptive_clip_rate}
    return dpft.AdaptiveClip(quantile=options.adaptive_clip, count_noise=options.adaptive_clip_noise, **rate)


def check_privacy(options: Options, examples: int) -> None:
    """Refuse what the options about privacy cannot mean with so many examples, before anything is written.

    The noise is calibrated for it, which :func:`prepare` need not do again.

    Raises:
        ValueError: a logical batch is larger than the data; no noise meets the target; there is noise and no clipping.
    """
    privacy = privacy_config(options)
    if options.clipping == "none" and privacy.noise_multiplier != 0:
        raise ValueError("--clipping none bounds nothing, so that no noise makes it private; --noise-multiplier 0")
    if privacy.expected_batch_size > examples:
        unit = f" users of {options.user_column!r}" if options.user_column else " examples"
        raise ValueError(
            f"--expected-batch-size {privacy.expected_batch_size:g} is larger than the {examples}{unit} to train on; "
            "lower it. --advise suggests one."
        )
    planned_schedule(options, examples)


def planned_schedule(options: Options, examples: int) -> dpft.PrivacySchedule:
    """What the options say about privacy, for so many examples; without the warnings, which :func:`prepare` gives."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return privacy_config(options).resolve(examples)


@dataclass
class Prepared:
    """A model, optimiser and loader that train privately.

    Attributes:
        model: wrapped, and prepared for the engine.
        optimizer: adds the noise.
        loader: draws the logical batches.
        losses: of the recipe: the model's own loss of a batch, a scalar, or one for each example.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loader: Any
    losses: Callable[[nn.Module, dict[str, torch.Tensor]], torch.Tensor]

    @property
    def schedule(self) -> Any:
        """The ``dpft.PrivacySchedule`` that they follow."""
        return self.loader.privacy.schedule

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
        """Whether the current physical batch is the last one of its logical batch."""
        return bool(self.loader.is_last)

    def epsilon(self, exact: bool = False) -> float | None:
        """Epsilon spent so far, rounded up unless ``exact``: cheap enough for a progress bar. None if not private."""
        return float(self.loader.privacy.epsilon(exact=exact)) if self.private else None

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The mean of the examples' losses, whose backward computes the clipped sum."""
        losses = self.losses(self.model, batch)
        return dpft.clipped_loss(self.model, losses) if losses.dim() else losses

    @property
    def clip_norm(self) -> float:
        """C of the current logical batch; it is public, also where it adapts."""
        return float(self.loader.privacy.clip_norm)

    def close(self) -> None:
        """End the run: its account gets back what was not spent, and another run can open the ledger."""
        self.loader.privacy.close()

    def clipped(self, batch: dict[str, torch.Tensor]) -> tuple[float, float, torch.Tensor]:
        """Numbers of clipped and of all examples in the last physical batch, and the norms [examples].

        Computed from the private data without noise: for whoever trains, not for publication.
        """
        real = batch["example_weight"] > 0
        last = dpft.stats(self.model)
        factors = last.clip_factors.to(real.device)
        return float(((factors < 1) & real).sum()), float(real.sum()), last.norms.to(real.device)[real].float().cpu()


def prepare(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    materials: Materials,
    options: Options,
    ledger: Path,
) -> Prepared:
    """Make the parts of an ordinary loop private: the examples that the materials hold now, canaries among them."""
    privacy = privacy_config(options)
    model, optimizer, loader = dpft.prepare(
        accelerator,
        model,
        optimizer,
        materials.train,
        privacy,
        collate_fn=materials.collate_train,
        max_physical_batch_size=options.max_physical_batch_size or 1,
        clipping=cast(Any, options.clipping),  # the command line has checked the choices
        strategy=cast(Any, options.strategy),
        sums_device=cast(Any, options.sums_device),
        lengths=recipe.lengths(materials.train),
        ledger_path=ledger,
        account=recipe.account(options, materials, accelerator, ledger.parent, privacy),
    )
    return Prepared(model, optimizer, loader, recipe.losses)


def corrected_adamw(options: Options, parameters: Iterable[nn.Parameter], learning_rate: float) -> dpft.AdamWBC:
    """AdamW whose second moment is corrected for the noise."""
    return dpft.AdamWBC(
        parameters,
        lr=learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        weight_decay=options.weight_decay,
    )


def unwrap(accelerator: Accelerator, model: nn.Module) -> Any:
    """The bare Hugging Face model, without the wrappers and hooks of the engine and of dpft."""
    return dpft.unwrap(accelerator.unwrap_model(model))


def chunked(model: nn.Module, options: Options) -> nn.Module:
    """Wrap a model for its evaluation: the head then computes the losses of a long text in chunks."""
    return dpft.wrap(model, max_grad_norm=options.max_grad_norm)


def explain(model: nn.Module, options: Options) -> list[str]:
    """What dpft does with the largest physical batch and with a single example, and why: lines of text.

    The model is wrapped for this, and unwrapped afterwards.
    """
    dpft.wrap(
        model,
        clipping=cast(Any, options.clipping),  # the command line has checked the choices
        max_grad_norm=options.max_grad_norm,
        strategy=cast(Any, options.strategy),
        clip_groups=cast(Any, options.groups()),
    )
    lines = []
    for size in sorted({options.max_physical_batch_size or 1, 1}, reverse=True):
        rows = size * options.rows
        lines.append(f"{rows} x {options.row_tokens} tokens:")
        lines += ["  " + line for line in dpft.explain(model, rows, options.row_tokens).splitlines()]
    dpft.unwrap(model)
    return lines


def statement(prepared: Prepared, tuning: str | None, *notes: str) -> str:
    """The privacy statement of the model card, in Markdown: how the options were chosen, and notes."""
    report = prepared.loader.privacy.report(tuning=tuning, notes=notes)
    return dpft.privacy_statement_markdown(report)
