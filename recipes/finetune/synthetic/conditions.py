"""The conditions that texts are generated for: public values of a record's columns, written as a header of its text.

    label: asyncio | kind: function
    Return the running event loop.

The loss of a record is that of its text: the header is given, in training and in generation. Which values there are,
and how many texts of each are generated, is public. How many private records have each value is used only with noise
(:mod:`finetune.synthetic.histogram`).
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from finetune.data.documents import IGNORED_LABEL

MOST = 10_000  # conditions
OTHER = "other"  # where it is among the public values: of the records with a value that is not
SEPARATOR = " | "
BECOMES_PUBLIC = (
    "--values was not given: the set of values of {} is taken from the private records, and becomes public with every "
    "text. Name the values by --values, or be sure that the set tells nothing"
)


@dataclass(frozen=True)
class Conditions:
    """The public values of each column, in the order of the header.

    Attributes:
        values: the values of each column.
    """

    values: dict[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        """Refuse values that would make a header ambiguous.

        Raises:
            ValueError: a column has no value, or the same one twice, or a value cannot be written in a header.
        """
        for column, values in self.values.items():
            if not values or len(set(values)) != len(values):
                raise ValueError(f"column {column!r} has the values {list(values)}; expected at least one, each once.")
            for word in (column, *values):
                if not word.strip() or SEPARATOR.strip() in word or len(word.splitlines()) != 1:
                    raise ValueError(
                        f"column {column!r}: {word!r} cannot be written in a header; expected one line without "
                        f"{SEPARATOR.strip()!r}. Rename it in the data."
                    )
        if (number := math.prod(map(len, self.values.values()))) > MOST:
            raise ValueError(
                f"{', '.join(self.values)} have {number:,} combinations of values, expected at most {MOST:,}. "
                "Condition on columns of few values: one that tells records apart would publish them."
            )

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns, in the order of the header."""
        return tuple(self.values)

    def header(self, record: dict[str, Any]) -> str:
        """The public first line of a record's text, with its line end."""
        return SEPARATOR.join(f"{column}: {self.value(record, column)}" for column in self.values) + "\n"

    def value(self, record: dict[str, Any], column: str) -> str:
        """The value of a record; ``other`` for one that is not public, where ``other`` is.

        Raises:
            ValueError: it is not among the public values, and ``other`` is neither.
        """
        found = str(record[column])
        if found in self.values[column]:
            return found
        if OTHER in self.values[column]:
            return OTHER
        raise ValueError(
            f"a record has a value of {column!r} that is not among the {len(self.values[column])} public ones. Add "
            f"{OTHER!r} to --values, which then stands for all others, or leave such records out of the data."
        )

    def all(self) -> list[dict[str, str]]:
        """Every combination of the values."""
        return [dict(zip(self.values, some, strict=True)) for some in itertools.product(*self.values.values())]

    def counts(self, number: int, weights: dict[str, float] | None = None) -> list[int]:
        """How many texts of each condition, in the order of ``all``: in proportion to its weight, ``number`` in sum.

        Args:
            number: of all texts.
            weights: of the values; that of a condition is the product of its values'. Columns of which none is named
                are uniform.

        Raises:
            ValueError: a weight is of no value, or of several columns' value, or a column's are not complete.
        """
        weights = weights or {}
        for name, weight in weights.items():
            holders = [column for column, values in self.values.items() if name in values]
            if len(holders) != 1 or not 0 <= weight < math.inf:
                raise ValueError(
                    f"--weights {name}={weight:g}: {name!r} is a value of {len(holders)} columns, expected one, and a "
                    f"finite weight of at least 0. The values: {self.words()}."
                )
        for column, values in self.values.items():
            named = [value for value in values if value in weights]
            if named and (len(named) < len(values) or not sum(weights[value] for value in named)):
                raise ValueError(
                    f"--weights names {len(named)} of the {len(values)} values of {column!r}; expected all of them, "
                    "and one above 0. Give 0 to those that are not wanted."
                )
        shares = [math.prod(weights.get(value, 1.0) for value in some.values()) for some in self.all()]
        return in_proportion(number, shares)

    def words(self) -> str:
        """The values, for a message or a card."""
        return "; ".join(f"{column}: {', '.join(values)}" for column, values in self.values.items())


def in_proportion(number: int, shares: Sequence[float]) -> list[int]:
    """``number`` divided in proportion to shares, of which one is above 0."""
    exact = [number * share / sum(shares) for share in shares]
    counts = [math.floor(x) for x in exact]
    # the largest remainders get what rounding down left over; of equal ones the first
    for i in sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])[: number - sum(counts)]:
        counts[i] += 1
    return counts


def parse_columns(words: str) -> tuple[str, ...]:
    """``label,kind`` as columns.

    Raises:
        ValueError: there is none, or one twice.
    """
    columns = tuple(word.strip() for word in words.split(",") if word.strip())
    if not columns or len(set(columns)) != len(columns):
        raise ValueError(f"--condition-on {words!r}; expected columns of the data, separated by commas, each once.")
    return columns


def parse_values(words: str, columns: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """``a,b`` of one column, ``label=a,b;kind=x,y`` of several, or JSON, such as ``{"label": ["a, b", "c"]}``.

    Raises:
        ValueError: the columns are others than those conditioned on.
    """
    if words.lstrip().startswith("{"):
        try:
            loaded = json.loads(words)
        except ValueError as error:
            raise ValueError(f"--values begins with a brace and is no JSON: {error}.") from None
        if not all(isinstance(values, list) for values in loaded.values()):
            raise ValueError('--values: expected a list for each column, such as {"label": ["a", "b"]}.')
        found = {str(column): tuple(map(str, values)) for column, values in loaded.items()}
    else:
        parts = [part.partition("=") if "=" in part else (columns[0], "=", part) for part in words.split(";")]
        found = {
            column.strip(): tuple(value.strip() for value in values.split(",") if value.strip())
            for column, _, values in parts
        }
    if set(found) != set(columns):
        raise ValueError(
            f"--values is of the columns {', '.join(found)}, and --condition-on of {', '.join(columns)}. Give the "
            "values of each of those: --values 'label=a,b;kind=x,y'."
        )
    return {column: found[column] for column in columns}


def parse_weights(words: str | None) -> dict[str, float] | None:
    """``a=3,b=1`` as weights of values.

    Raises:
        ValueError: a part is no value and number.
    """
    if words is None:
        return None
    weights = {}
    for part in words.split(","):
        name, _, number = part.rpartition("=")
        try:
            weights[name.strip()] = float(number)
        except ValueError:
            raise ValueError(f"--weights: {part!r} is no value and number; expected such as a=3,b=1.") from None
    return weights


def conditions_of(records: Sequence[Dataset], columns: Sequence[str], values: str | None) -> tuple[Conditions, str]:
    """The conditions, and the warning that is due.

    Args:
        records: all records, for the set of values where ``values`` does not give it.
        columns: to condition on.
        values: as given (``parse_values``).

    Raises:
        ValueError: a column is missing.
    """
    for column in columns:
        if column not in records[0].column_names:
            raise ValueError(
                f"--condition-on {column!r}: the data has the columns {', '.join(records[0].column_names)}. Name one "
                "of them."
            )
    if values is not None:
        return Conditions(parse_values(values, columns)), ""
    found = {
        column: tuple(sorted({str(value) for part in records for value in part.unique(column)})) for column in columns
    }
    return Conditions(found), BECOMES_PUBLIC.format(", ".join(columns))


def tokenise_conditioned(
    records: Dataset, conditions: Conditions, tokenizer: PreTrainedTokenizerBase, seq_len: int, text_column: str
) -> Dataset:
    """One example of each record: header and text, cut at ``seq_len`` tokens, and the end token where there is room.

    Header and text are tokenised apart, as the header is when texts are generated: no token is of both.

    Returns:
        As many rows, in the same order, of ``input_ids`` and ``prompt_tokens`` (those of the header).

    Raises:
        ValueError: a header leaves no room for a text.
    """
    end = tokenizer.eos_token_id

    def row(record: dict[str, Any]) -> dict[str, Any]:
        head = tokenizer(conditions.header(record))["input_ids"]
        text = tokenizer(record[text_column], add_special_tokens=False)["input_ids"]
        ids = [*head, *text, *([] if end is None else [end])][:seq_len]
        return {"input_ids": ids, "prompt_tokens": len(head)}

    longest = max(len(tokenizer(conditions.header(some))["input_ids"]) for some in conditions.all())
    if longest >= seq_len:
        raise ValueError(f"--seq-len {seq_len}: a header has {longest} tokens. Give more, or shorter values.")
    return records.map(row, remove_columns=records.column_names, desc=None)


def without_prompt_loss(
    collate: Callable[[Sequence[dict[str, Any]]], dict[str, torch.Tensor]],
) -> Callable[[Sequence[dict[str, Any]]], dict[str, torch.Tensor]]:
    """``collate`` with no loss on the first ``prompt_tokens`` of each example."""

    def collated(examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = collate(examples)
        for labels, example in zip(batch["labels"], examples, strict=True):
            labels[: example["prompt_tokens"]] = IGNORED_LABEL
        return batch

    return collated
