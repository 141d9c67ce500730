"""What a recipe adds to the run that all of them share (``run.py``): its examples, model, loss and measures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from accelerate import Accelerator
from finetune.data.documents import document_losses, token_counts
from finetune.data.users import Users
from finetune.evaluation import sample_text, validation_loss
from finetune.materials import Materials, text_materials
from finetune.model import load_model
from finetune.options import Options

TUNED_ON_DOCSTRINGS = (
    "not accounted for: the recipe's defaults (expected batch, steps, learning rate, Adam's betas) were chosen by "
    "the validation loss of several private runs on these same docstrings, which are public"
)


@dataclass(frozen=True)
class Finished:
    """A run whose model is trained and exported, for what a recipe does with it.

    Attributes:
        options: of the run.
        accelerator: of the run.
        materials: of the run.
        output: the run's folder, which holds the exported model.
        statement: the privacy statement, as Markdown.
        epsilon: that was spent; None if the run is not private.
    """

    options: Any
    accelerator: Accelerator
    materials: Materials
    output: Path
    statement: str
    epsilon: float | None


class Recipe:
    """A recipe; the defaults are those of ``llama_dp.py``: a causal language model on texts.

    Attributes:
        name: of the script, of its default folder below ``outputs``, and of its trackers.
        options: its options, a dataclass that inherits :class:`finetune.options.Options`.
        auto_class: of transformers, which loads the exported model.
        pipeline_tag: of the model card.
        loss_unit: of the losses that :meth:`measure` returns.
        unit: what one record is.
        demonstration: the dataset of the demonstration, made of docstrings, by which the defaults were chosen.
    """

    name: ClassVar[str] = "llama_dp"
    options: ClassVar[type[Options]] = Options
    auto_class: ClassVar[Any] = AutoModelForCausalLM
    pipeline_tag: ClassVar[str] = "text-generation"
    loss_unit: ClassVar[str] = "nats a token"
    unit: ClassVar[str] = "record"
    demonstration: ClassVar[str] = "docstrings"

    def materials(self, options: Any, accelerator: Accelerator) -> Materials:
        """Load tokenizer and examples. A collective."""
        return text_materials(options, accelerator)

    def lengths(self, train: Any) -> Sequence[int] | None:
        """Of the training examples: what is drawn is sorted by them before it is cut into physical batches.

        None: it is not sorted. Private, as the examples are.
        """
        return train.lengths if isinstance(train, Users) else token_counts(train)

    def model(self, options: Any, dtype: torch.dtype) -> nn.Module:
        """Load the model, with the adapters and checkpointing that the options ask for."""
        return load_model(options, dtype)

    def begin(self, model: nn.Module, materials: Materials, accelerator: Accelerator) -> None:
        """What is done with the prepared start model, before a checkpoint is loaded. A collective."""

    def losses(self, model: Callable[..., Any], batch: dict[str, Tensor]) -> Tensor:
        """The loss of a batch: the model's own, a scalar, or one for each example, ``[U]``.

        An example's loss must depend on that example alone. It is used with privacy, where dpft clips each example's
        gradient, and without (``--compare-nonprivate``), where the mean is taken.
        """
        ids = batch.get("example_ids")
        if ids is None:
            return model(**batch).loss
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        return document_losses(logits, batch["labels"], ids)

    def measure(
        self, model: nn.Module, materials: Materials, accelerator: Accelerator | None = None
    ) -> dict[str, float]:
        """Figures of a model on the held-out examples, ``loss`` first. A collective where there is an accelerator."""
        return {"loss": validation_loss(model, materials.validation, materials.collate, accelerator)}

    def sample(self, model: Any, materials: Materials, options: Any, accelerator: Accelerator) -> str:
        """Text that the model writes after ``--prompt``. A collective."""
        return sample_text(
            model, materials.tokenizer, options.prompt, options.sample_tokens, options.seed, accelerator
        )

    def notes(self, options: Any) -> tuple[str, ...]:
        """What the privacy statement must say of the examples; first of all, what one example is."""
        if options.user_column is not None:
            by_hash = "follows from the seed and from that user's own ones"
            chosen = "is drawn anew in each step" if options.records_drawn == "afresh" else by_hash
            return (
                f"each {self.unit} is cut to {options.example_tokens} tokens; which of a user are used {chosen}. A "
                "person whose records have several values of the column is protected for each value, not for all "
                "together",
            )
        unit = (
            f"one {self.unit} is one example, cut to {options.example_tokens} tokens: if a person has several "
            f"{self.unit}s, each is protected, not all together"
        )
        once = "a docstring that occurs several times in the library was kept once, before any step"
        return (unit, once) if options.dataset == self.demonstration else (unit,)

    def tuning(self, options: Any) -> str | None:
        """How the options were chosen, as far as the epsilon does not account for it."""
        return options.tuning_note or (TUNED_ON_DOCSTRINGS if options.dataset == self.demonstration else None)

    def account(
        self, options: Any, materials: Materials, accelerator: Accelerator, output: Path, privacy: Any
    ) -> Path | None:
        """The file of the account that the training pays from, if there is one. A collective.

        That of ``--account``; a recipe that uses the same records once more may make one.

        Args:
            options: of the run.
            materials: of the run.
            accelerator: of the run.
            output: the run's folder.
            privacy: the training's configuration.
        """
        return None if options.account is None else Path(options.account).expanduser()

    def after(self, finished: Finished) -> dict[str, Any]:
        """What is done with the exported model: figures for the card, by name. A collective."""
        return {}
