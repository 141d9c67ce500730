"""From records to tokenised examples and batches: one record, one example.

Several records are never put into one row: clipping protects examples, and the privacy unit would change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from finetune.data.checks import check_texts
from finetune.data.documents import IGNORED_LABEL, rows_of
from finetune.data.files import shown

TEXT_COLUMNS = ("text", "content", "document", "sentence")


def text_column(records: Dataset, wanted: str | None = None) -> str:
    """The name of :func:`named_text_column`, whose content is checked in one pass.

    Raises:
        ValueError: there is no such column, or a record has no text in it.
    """
    column = named_text_column(records, wanted)
    check_texts(records, column)
    return column


def named_text_column(records: Dataset, wanted: str | None = None) -> str:
    """The column that holds the text: the one asked for, else the first of the usual names, else the only column.

    Raises:
        ValueError: there is no such column.
    """
    columns = records.column_names
    usual = [column for column in TEXT_COLUMNS if column in columns]
    column = wanted or (usual[0] if usual else columns[0] if len(columns) == 1 else None)
    if column is None or column not in columns:
        given = "is not given" if wanted is None else repr(wanted)
        raise ValueError(f"--text-column {given}: the data has the columns {shown(columns)}. Name one of them.")
    return column


def tokenise(records: Dataset, tokenizer: PreTrainedTokenizerBase, seq_len: int, column: str) -> Dataset:
    """Turn every record into one example of at most ``seq_len`` tokens; what is longer is cut off.

    Args:
        records: records with a column of text.
        tokenizer: the model's tokenizer. The end token is appended where it has one and there is room.
        seq_len: largest number of tokens of an example.
        column: the column of text.

    Returns:
        A dataset of ``input_ids`` only, memory-mapped where ``records`` is: as many rows, in the same order. A row
        may hold fewer than two tokens (an empty line); it stays, since dropping rows by their content would make the
        number of examples depend on them, and it has no loss.
    """

    def cut(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids = tokenizer(batch[column], truncation=True, max_length=seq_len)["input_ids"]
        end = tokenizer.eos_token_id
        return {
            "input_ids": [
                [*row, end] if end is not None and len(row) < seq_len and row[-1:] != [end] else row for row in ids
            ]
        }

    return records.map(cut, batched=True, remove_columns=records.column_names, desc=None)


def make_collate(
    pad_token_id: int, pad_to: int | None = None, multiple_of: int = 1, row_tokens: int | None = None
) -> Callable[[Sequence[dict[str, Any]]], dict[str, torch.Tensor]]:
    """Make the function that turns a list of examples into a batch.

    Args:
        pad_token_id: token to pad with; it is masked and has no loss, so that any will do.
        pad_to: pad every batch to this many tokens (static shapes); to the longest example in the batch if None.
        multiple_of: round the length up to a multiple of this.
        row_tokens: cut each example into rows of at most so many tokens, and name the example of each row.

    Returns:
        A function from a list of examples to int64 tensors [B, T]: ``input_ids``, ``attention_mask`` (1 where there
        is a token), ``labels`` (the tokens, or the example's own ``labels``; -100 on padding); with ``row_tokens``,
        or examples that have ``rows`` instead of ``input_ids`` (:class:`finetune.data.users.Users`), also
        ``example_ids`` [B], and B counts rows. It must be given at least one example; the loader of dpft adds its
        examples of weight zero before. It raises ValueError for an example with more tokens than ``pad_to``, or
        another number of labels than of tokens.
    """

    def in_rows(example: dict[str, Any], column: str) -> list[list[int]]:
        if "rows" in example:
            return [list(row) for row in example["rows"]]
        tokens = list(example.get(column, example["input_ids"]))
        return [tokens] if row_tokens is None else rows_of(tokens, row_tokens)

    def collate(examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if any("labels" in example and len(example["labels"]) != len(example["input_ids"]) for example in examples):
            raise ValueError("an example has another number of labels than of tokens; expected one for each token.")
        parts = [in_rows(example, "input_ids") for example in examples]
        learnt = [in_rows(example, "labels") for example in examples]
        rows = [row for part in parts for row in part]
        rows_of_labels = [row for part in learnt for row in part]
        longest = max(1, *(len(row) for row in rows)) if rows else 1
        length = pad_to or -(-longest // multiple_of) * multiple_of
        if longest > length:
            raise ValueError(
                f"an example has {longest} tokens, expected at most {length}, the length to pad to. Cut the examples "
                "to it with tokenise(), or raise --seq-len."
            )
        input_ids = torch.full((len(rows), length), pad_token_id, dtype=torch.long)
        mask = torch.zeros_like(input_ids)
        labels = torch.full_like(input_ids, IGNORED_LABEL)
        for i, (row, row_labels) in enumerate(zip(rows, rows_of_labels, strict=True)):
            input_ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
            labels[i, : len(row)] = torch.tensor(row_labels, dtype=torch.long)
            mask[i, : len(row)] = 1
        # A row without a single token attends to nothing, which some attention kernels answer with NaN.
        mask[:, 0] = 1
        batch = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
        if row_tokens is not None or any("rows" in example for example in examples):
            batch["example_ids"] = torch.arange(len(parts)).repeat_interleave(torch.tensor([len(p) for p in parts]))
        return batch

    return collate
