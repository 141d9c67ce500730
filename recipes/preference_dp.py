"""Train a language model on preferences under differential privacy: direct preference optimisation (DPO, IPO, RPO).

    accelerate launch recipes/preference_dp.py
    accelerate launch recipes/preference_dp.py --model Qwen/Qwen3-0.6B --dataset pairs.jsonl --seq-len 1024 --bf16

One pair, of a prompt, a chosen and a rejected completion, is one example, and what is protected. Without arguments:
the small Llama kept beside this file learns to prefer how a docstring of Python's standard library goes on to the same
words in another order, at epsilon 8, in under three minutes on two cores, no network.
"""

from collections.abc import Callable
from typing import Any, ClassVar

from finetune.run import main as run  # first of all: what it imports sets what torch reads when it is imported

# isort: split
import torch
from torch import Tensor, nn

from accelerate import Accelerator
from finetune.dpo import PreferenceLoss, measures, pair_logps, pair_losses, without_dropout
from finetune.materials import Materials
from finetune.preference import PAIRS, PreferenceOptions, pair_materials
from finetune.recipe import Recipe


class PreferenceRecipe(Recipe):
    """DPO: pairs of rows, whose loss compares the model with the one that it was."""

    name: ClassVar[str] = "preference_dp"
    options: ClassVar[type[PreferenceOptions]] = PreferenceOptions
    loss_unit: ClassVar[str] = "a pair"
    unit: ClassVar[str] = "preference pair"
    demonstration: ClassVar[str] = PAIRS
    loss = PreferenceLoss()  # known with the materials

    def materials(self, options: Any, accelerator: Accelerator) -> Materials:
        """Load tokenizer and pairs. A collective."""
        self.loss = options.loss
        return pair_materials(options, accelerator)

    def model(self, options: Any, dtype: torch.dtype) -> nn.Module:
        """Load the model, without dropout."""
        return without_dropout(super().model(options, dtype))

    def begin(self, model: nn.Module, materials: Any, accelerator: Accelerator) -> None:
        """Compute what the start model makes of all pairs. A collective."""
        accelerator.print(f"log-probabilities of {len(materials.train)} pairs by the start model ...")
        for pairs, collate in (
            (materials.train, materials.collate_train),
            (materials.validation, materials.collate),
        ):
            collate.reference, _ = pair_logps(model, pairs, collate, accelerator)

    def losses(self, model: Callable[..., Any], batch: dict[str, Tensor]) -> Tensor:
        """One loss for each pair."""
        return pair_losses(model, batch, self.loss)

    def measure(self, model: nn.Module, materials: Any, accelerator: Accelerator | None = None) -> dict[str, float]:
        """Loss, accuracy and margin of the held-out pairs. A collective where there is an accelerator."""
        return measures(model, materials.validation, materials.collate, self.loss, accelerator)

    def notes(self, options: Any) -> tuple[str, ...]:
        """What one example is, and of what."""
        rows = f"a pair is two rows of at most {options.seq_len} tokens, whose summed gradient is clipped once"
        made = "each pair was made of one docstring: how it goes on, and the same words in another order"
        return (*super().notes(options), rows, *((made,) if options.dataset == PAIRS else ()))


def main(argv: list[str] | None = None) -> int:
    """Read the options and run."""
    return run(PreferenceRecipe(), __doc__ or "", argv)


if __name__ == "__main__":
    raise SystemExit(main())
