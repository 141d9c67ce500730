"""Make a synthetic data set: fine-tune a language model under differential privacy, and let it write new records.

    accelerate launch recipes/synthesize_dp.py
    accelerate launch recipes/synthesize_dp.py --dataset mails.jsonl --condition-on folder --values inbox,sales,other

Without arguments: the small Llama kept beside this file learns support tickets (synthetic, from templates), each after
a header with its label, at epsilon 8; then it writes 800 tickets. They are checked, written with a data card into a
folder that can be published, and compared with the private ones, apart. Minutes on two cores, no network. What the
folder holds and what the figures mean: docs/synthetic.md.
"""

from pathlib import Path
from typing import Any

from finetune.run import main as run  # first of all: what it imports sets what torch reads when it is imported

# isort: split
from accelerate import Accelerator
from finetune.materials import Materials
from finetune.recipe import Finished, Recipe
from finetune.synthetic.options import SynthesisOptions
from finetune.synthetic.records import conditioned_materials
from finetune.synthetic.synthesis import account_of, synthesise


class Synthesize(Recipe):
    """Texts after headers; then new texts."""

    name = "synthesize_dp"
    options = SynthesisOptions

    def materials(self, options: SynthesisOptions, accelerator: Accelerator) -> Materials:
        """Examples of a header, which has no loss, and a text."""
        return conditioned_materials(options, accelerator)

    def notes(self, options: SynthesisOptions) -> tuple[str, ...]:
        """That the header is read, not learnt."""
        header = f"a record's text is learnt after a header with its values of {options.condition_on}"
        return (*super().notes(options), header)

    def tuning(self, options: SynthesisOptions) -> str | None:
        """The demonstration's own."""
        if options.dataset != "tickets":
            return super().tuning(options)
        return options.tuning_note or (
            "not accounted for: the recipe's defaults were chosen by the figures of several runs on such tickets, "
            "which are synthetic"
        )

    def account(
        self, options: SynthesisOptions, materials: Materials, accelerator: Accelerator, output: Path, privacy: Any
    ) -> Path | None:
        """With --distribution private the run's own, for training and counts; a resumed run has it."""
        own = account_of(options, materials, accelerator, output, privacy)
        return own or super().account(options, materials, accelerator, output, privacy)

    def after(self, finished: Finished) -> dict[str, Any]:
        """Generate, check, write, compare."""
        return synthesise(finished)


def main(argv: list[str] | None = None) -> int:
    """Read the options and run."""
    return run(Synthesize(), __doc__ or "", argv)


if __name__ == "__main__":
    raise SystemExit(main())
