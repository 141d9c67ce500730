"""What a run leaves behind for a reader: the model card with the privacy statement, and the picture."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
import yaml

from finetune.options import BASE_MODEL, Options, as_words
from finetune.plots import plot_run

NOT_COVERED = """\
The epsilon covers the weights in this directory, and whatever is computed from them alone, such as the sample below.
It does **not** cover `metrics.jsonl`, the picture and the losses in this card: training loss, share clipped, tokens a
second and validation loss are figures of the private records, without noise, for whoever trained. Leave them out when
you publish the model, or treat them as you treat the records."""


def shown(model: str) -> str:
    """A model's name for a card: that of the hub, or the last part of a local path, which is nobody's business."""
    if Path(model).resolve() == BASE_MODEL:
        return "the bundled base model of dpft's recipes"
    return Path(model).name if Path(model).exists() else model


def model_card(
    options: Options,
    statement: str,
    figures: dict[str, Any],
    samples: dict[str, str],
    ledger: str,
) -> str:
    """Write the card.

    Args:
        options: of the run.
        statement: the privacy statement, as Markdown.
        figures: name to value, for the table of what was measured.
        samples: generated texts, by "before" and "after".
        ledger: name of the ledger's file, beside the card.
    """
    given = as_words(options)
    if "model" in given:
        given["model"] = shown(options.model)
    given.pop("output_dir", None)
    if Path(options.dataset).exists():  # a path of somebody's machine is nobody's business
        given["dataset"] = Path(options.dataset).name
    command = yaml.safe_dump(given, sort_keys=True).rstrip()
    rows = "\n".join(f"| {name} | {_figure(value)} |" for name, value in figures.items())
    texts = "\n\n".join(f"{when.capitalize()} training:\n\n{_quoted(text)}" for when, text in samples.items())
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, "
    versions += f"transformers {transformers.__version__}, accelerate {accelerate.__version__}"
    data = {
        "docstrings": "docstrings of Python's standard library, public text that plays the private records. Default "
        "hyperparameters were chosen on it, by the validation loss too, which the epsilon does not account for",
        "tickets": "**synthetic** support tickets, from templates",
    }.get(options.dataset, Path(options.dataset).name if Path(options.dataset).exists() else options.dataset)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [differential-privacy, dp-sgd, dpft]
---
# {shown(options.model).removeprefix("the ").capitalize()}, fine-tuned with differential privacy

Data: {data}. At most {options.seq_len} tokens of each record; one record is one example, never packed.

{statement.strip()}

Every release is in the ledger, `{ledger}`, which was written ahead of it.

### What the epsilon does not cover

{NOT_COVERED}

## Measured

| | |
|---|---|
{rows}

![Loss and epsilon over the steps](training.png)

## Samples

Prompt: `{options.prompt}`.

{texts or "None were asked for."}

## How it was made

`recipes/llama_dp.py` with these options (the others at their defaults):

```yaml
{command}
```

{versions}, {platform.machine()}, {torch.get_num_threads()} thread(s).
"""


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _quoted(text: str) -> str:
    return "\n".join("> " + line.replace("<", "&lt;") + "  " for line in text.splitlines()) or "> "


def write_report(
    directory: Path,
    options: Options,
    statement: str,
    figures: dict[str, Any],
    samples: dict[str, str],
    rows: Sequence[dict[str, Any]],
    *,
    ledger: str,
    private: bool,
) -> None:
    """Write ``README.md`` and ``training.png`` into the directory."""
    caption = (
        f"{shown(options.model)}, {Path(options.dataset).name}, seq_len {options.seq_len}, expected batch "
        f"{options.expected_batch_size:g}, clip norm {options.max_grad_norm:g}; figures of private records, not noised"
    )
    plot_run(
        rows,
        directory / "training.png",
        target_epsilon=options.target_epsilon,
        delta=options.target_delta,
        private=private,
        caption=caption,
    )
    card = model_card(options, statement, figures, samples, ledger)
    (directory / "README.md").write_text(card, encoding="utf-8")
