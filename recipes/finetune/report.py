"""The report of a run: the model card with the privacy statement, and the picture."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

import accelerate
from finetune.options import BASE_MODEL
from finetune.output import ADAPTER, CARD, LEDGER, METRICS, PICTURE
from finetune.parsing import as_words
from finetune.plots import plot_run
from finetune.recipe import Recipe

NOT_COVERED = f"""\
The epsilon covers the weights in this directory, and whatever is computed from them alone, such as the sample below.
It does **not** cover `{METRICS}`, the picture, the checkpoints and the figures under "Measured": training loss, share
clipped, gradient norms, tokens a second and validation loss are computed from the private records, without noise, for
whoever trained. Leave them out when you publish the model, or treat them as you treat the records."""
PUBLISHED = """\
Every release was written to a ledger ahead of it. The ledger, and what was measured on private records, stay with
whoever trained.

"""
NOTHING_COVERED = """\
Everything: **this training was NOT PRIVATE**. Treat the weights, and whatever was computed with them, as you treat the
records themselves."""


def shown(model: str) -> str:
    """A model's name for a card: that of the hub, or the last part of a local path, the rest of which is private."""
    if Path(model).resolve() == BASE_MODEL:
        return "the bundled base model of dpft's recipes"
    return Path(model).name if is_path(model) else model


def is_path(value: str) -> bool:
    """Whether a file or folder has this name; not of a single word, which may be one by chance."""
    return os.sep in value and os.path.exists(
        os.path.expanduser(value)
    )  # Path.exists raises for what is too long to be one


def described(dataset: str) -> str:
    """The private records, for a card."""
    return {
        "docstrings": "docstrings of Python's standard library, public text that plays the private records",
        "chats": "questions about names of Python's standard library, answered by their docstrings, public text that "
        "plays the private records",
        "pairs": "pairs made of the docstrings of Python's standard library, public text that plays the private "
        "records",
        "tickets": "**synthetic** support tickets, from templates",
    }.get(dataset, Path(dataset).name if is_path(dataset) else dataset)


def tags(mechanism: str | None) -> str:
    """Of a card; ``mechanism``: None if the training was not private."""
    return "not-private, dpft" if mechanism is None else f"differential-privacy, {mechanism.replace('_', '-')}, dpft"


def versions() -> str:
    """What ran, for a card."""
    return (
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"accelerate {accelerate.__version__}"
    )


@dataclass(frozen=True)
class Report:
    """What a model card is made of.

    Attributes:
        recipe: that was run.
        options: of the run, as they were given.
        statement: the privacy statement, as Markdown.
        figures: name to value, for the table of what was measured.
        samples: generated texts, by "before" and "after".
        private: whether the run has a finite epsilon.
        audit: the section about the audit, as Markdown, if there was one.
    """

    recipe: Recipe
    options: Any
    statement: str
    figures: dict[str, Any]
    samples: dict[str, str]
    private: bool
    audit: str = ""


def model_card(report: Report, published: bool = False) -> str:
    """Write the card; ``published``: without what the epsilon does not cover, and what stays in the run's folder."""
    options, private = report.options, report.private
    given = as_words(options)
    if "model" in given:
        given["model"] = shown(options.model)
    for of_the_machine in ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "push_to_hub"):
        given.pop(of_the_machine, None)
    # a card must not disclose a path of the machine
    given |= {name: Path(value).name for name, value in given.items() if isinstance(value, str) and is_path(value)}
    command = yaml.safe_dump(given, sort_keys=True).rstrip()
    rows = "\n".join(f"| {name} | {_figure(value)} |" for name, value in report.figures.items())
    texts = "\n\n".join(f"{when.capitalize()} training:\n\n{_quoted(text)}" for when, text in report.samples.items())
    samples = f"## Samples\n\nPrompt: `{options.prompt}`.\n\n{texts}\n" if texts else ""
    rows_words = f", in rows of at most {options.seq_len} tokens" if options.in_rows else ""
    unit = "one record is one example" if options.user_column is None else "one user is one example, each record a row"
    uncovered = f"### What the epsilon does not cover\n\n{NOT_COVERED if private else NOTHING_COVERED}\n\n"
    measured = f"## Measured\n\n| | |\n|---|---|\n{rows}\n\n![Loss and epsilon over the steps]({PICTURE})\n\n"
    ledger = f"Every release is in the ledger, `{LEDGER}`, which was written ahead of it.\n\n"
    of_the_run = PUBLISHED if published else f"{ledger}{uncovered}{report.audit}\n{measured}"
    title = shown(options.model).removeprefix("the ")
    return f"""---
library_name: transformers
pipeline_tag: {report.recipe.pipeline_tag}
tags: [{tags(options.mechanism if private else None)}]
---
# {title[:1].upper() + title[1:]}, fine-tuned {"with differential privacy" if private else "WITHOUT PRIVACY"}

Data: {described(options.dataset)}. At most {options.example_tokens} tokens of each record; {unit}, never packed with \
others{rows_words}.

{report.statement.strip()}

{of_the_run}{samples}
## How it was made

`recipes/{report.recipe.name}.py` with these options (the others at their defaults):

```yaml
{command if given else "{}  # all of them"}
```

{versions()}, {platform.machine()}, {torch.get_num_threads()} thread(s).
"""


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _quoted(text: str) -> str:
    return "\n".join("> " + line.replace("<", "&lt;") + "  " for line in text.splitlines()) or "> "


def write_report(directory: Path, report: Report, schedule: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Write the card and the picture into the directory; ``schedule`` is the run's ``dpft.PrivacySchedule``."""
    options = report.options
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    data = Path(options.dataset).name if Path(options.dataset).exists() else options.dataset
    noise = "" if options.mechanism == "dp_sgd" else f"{options.mechanism} noise, "
    caption = (
        f"{shown(options.model)}; {data}, at most {options.example_tokens} tokens; {noise}{schedule.sampler} "
        f"sampling, {schedule.expected_batch_size:g} expected, rate {schedule.sample_rate:.4f}\n"
        f"noise multiplier {schedule.noise_multiplier:.4g}, clip norm {schedule.max_grad_norm:g}, {options.clipping}, "
        f"AdamW {options.learning_rate:g} {options.lr_scheduler_type}; {hardware}, "
        f"{torch.get_num_threads()} thread(s), torch {torch.__version__}. Losses are of private "
        "records, without noise"
    )
    plot_run(
        rows,
        directory / PICTURE,
        target_epsilon=schedule.target_epsilon,
        delta=schedule.target_delta,
        private=report.private,
        caption=caption,
        loss_unit=report.recipe.loss_unit,
    )
    (directory / CARD).write_text(model_card(report), encoding="utf-8")
    if (directory / ADAPTER).is_dir():  # an adapter is often published alone, and peft's card says nothing of privacy
        (directory / ADAPTER / CARD).write_text(model_card(report, published=True), encoding="utf-8")
