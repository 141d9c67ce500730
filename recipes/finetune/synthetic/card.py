"""The folder of the synthetic data, which can be published whole: the texts as parquet, and their data card.

Nothing in it is computed from a private record but through the model and, with --distribution private, noisy counts.
So it costs nothing beyond the epsilon of these (post-processing: Dwork and Roth 2014, proposition 2.1). Figures that
compare with private records are in another folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from datasets import Dataset

from finetune.output import CARD
from finetune.report import tags
from finetune.synthetic.checks import Rules
from finetune.synthetic.conditions import Conditions
from finetune.synthetic.generation import Sampling

DATA = "synthetic.parquet"


@dataclass(frozen=True)
class Made:
    """What is said of the data. No field may hold a figure that was computed from private records.

    Attributes:
        model: what was fine-tuned, as it may be named in public.
        data: the private records, as they may be named in public.
        statement: the privacy statement of the model's training, as Markdown.
        private: whether that training has a finite epsilon.
        conditions: of the texts.
        values_from_data: whether the set of values was taken from the private records.
        distribution: how many texts of each condition, in words.
        counted: instead: of the noisy counts of the private records, in words.
        account: the statement of what training and counts spent together, as Markdown.
        sampling: how they were drawn.
        rules: which were kept.
        generated: number of texts before the checks.
        kept: texts of each condition after them, in the order of ``conditions.all()``.
        cut: kept texts that the model had not ended.
        rejected: reason to number.
        versions: of the libraries.
        mechanism: of the training's noise.
    """

    model: str
    data: str
    statement: str
    private: bool
    conditions: Conditions
    values_from_data: bool
    distribution: str
    sampling: Sampling
    rules: Rules
    generated: int
    kept: Sequence[int]
    cut: int
    rejected: dict[str, int]
    versions: str
    counted: str | None = None
    account: str = ""
    mechanism: str = "dp_sgd"


def write(
    folder: Path, conditions: Sequence[dict[str, str]], texts: Sequence[str], text_column: str, made: Made
) -> None:
    """Write the folder; there must be nothing else in it. For one rank.

    Args:
        folder: to write.
        conditions: of each text, by column.
        texts: that were kept.
        text_column: the name of the texts' column.
        made: for the card.

    Raises:
        FileExistsError: the folder holds something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    others = sorted(path.name for path in folder.iterdir() if path.name not in (DATA, CARD))
    if others:
        raise FileExistsError(
            f"{folder} holds {others[0]!r}; expected {DATA} and {CARD} alone, so that it can be published "
            "whole. Move it."
        )
    columns = {column: [row[column] for row in conditions] for column in made.conditions.columns}
    Dataset.from_dict({**columns, text_column: list(texts)}).to_parquet(str(folder / DATA))
    (folder / CARD).write_text(card(made), encoding="utf-8")


def card(made: Made) -> str:
    """The data card, as Markdown."""
    kept = sum(made.kept)
    counts = "\n".join(
        f"| {' | '.join(_cell(value) for value in some.values())} | {count:,} |"
        for some, count in zip(made.conditions.all(), made.kept, strict=True)
    )
    rejected = "; ".join(f"{reason}: {count:,}" for reason, count in made.rejected.items()) or "none"
    settings = ", ".join(f"{f.name.replace('_', ' ')} {getattr(made.sampling, f.name)}" for f in fields(made.sampling))
    rules = ", ".join(
        f"{f.name.replace('_', ' ')} {getattr(made.rules, f.name)!r}"
        for f in fields(made.rules)
        if f.name != "columns" and getattr(made.rules, f.name) is not None
    )
    columns = ", ".join(f"`{column}`" for column in made.conditions.columns)
    trained = "with differential privacy" if made.private else "WITHOUT PRIVACY"
    covered = COVERED if made.private else NOT_PRIVATE
    if made.counted is not None:
        covered = COVERED_COUNTS.replace("@", COVERED.partition("It bounds")[2])
        texts_of_each = f"follows from noisy counts of the private records: {made.counted} Negative counts are 0"
    else:
        texts_of_each = f"follows from {made.distribution},\nand not from the private records"
    values = VALUES_FROM_DATA if made.values_from_data else "Which values there are was given."
    return f"""---
tags: [synthetic, {tags(made.mechanism if made.private else None)}]
task_categories: [text-generation, text-classification]
configs: [{{config_name: default, data_files: {DATA}}}]
---
# Synthetic texts, from a model fine-tuned {trained}

{kept:,} texts, written by a language model: {made.model}, fine-tuned {trained} on {made.data}. There each text stood
after a header with the values of {columns}; here headers were given to the model, and it wrote the texts. A label is
what was asked for: that the text fits it was not verified.

{made.account}{made.statement.strip()}

### What the epsilon covers

{covered}

{values} How many texts of each condition were generated {texts_of_each}.

## How it was made

`recipes/synthesize_dp.py`: {made.generated:,} texts were generated.

- Generation: {settings}.
- Checks, by the synthetic texts alone: {rules}; the header not repeated; valid text.
- Rejected: {rejected}.
- Kept: {kept:,}, of which {made.cut:,} were cut at the largest number of tokens.

| {" | ".join(made.conditions.columns)} | texts |
|{"---|" * (len(made.conditions.columns) + 1)}
{counts}

{made.versions}
"""


COVERED = """\
This data was computed from the model and public choices alone (post-processing): the epsilon of the model's
training is its epsilon too, however many texts are drawn. It bounds what the data tells of whether one record was
among the training data, and of what it said. It does **not** cover
- several records of one person together, unless the unit above is the person;
- what many records have in common: texts may state it, true or not;
- what the model knew before the fine-tuning, such as its public pretraining data;
- choices that somebody made after looking at private figures: which hyperparameters, which settings of the generation,
  which of several data sets is published.

It says nothing about truth, fairness or quality: read some before you use them."""
COVERED_COUNTS = """\
This data was computed from the model and from noisy counts of the same records, and from nothing else that is private
(post-processing). What it costs is what **both** cost together: the epsilon of the privacy account above, and not that
of the training alone. It bounds@"""
NOT_PRIVATE = """\
**Nothing: the training was NOT PRIVATE.** Texts may be copies of records. Treat them as you treat the records."""
VALUES_FROM_DATA = """\
Which values there are was **taken from the private records**: the set of values is public, and no epsilon covers it. A
value that a single record has tells that there is this record."""


def _cell(value: str) -> str:
    return value.replace("|", "\\|")
