"""What a run reads from columns: checked before anything is trained, and summed up for whoever trains.

A message names a record by its number, from 1, never by its content. The passes stream over batches of Arrow.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]  # it has no types
import pyarrow.compute as pc  # type: ignore[import-untyped]  # it has no types
from datasets import Dataset

from finetune.data.files import shown

BATCH = 1000  # records
NOT_FOR_PUBLICATION = "the training records (computed from them without noise, not for publication):"


def _column(records: Dataset, column: str) -> Iterator[tuple[int, pa.Array]]:
    """The values of a column in batches, each with the number of the record before it."""
    done = 0
    for batch in records.select_columns([column]).with_format("arrow").iter(BATCH):
        values = batch[column].combine_chunks()
        yield done, values
        done += len(values)


def _kind(records: Dataset, column: str) -> str:
    """The type of a column's values, such as ``string``, ``int64``, ``null``; other features by their class."""
    feature = records.features[column]
    return str(getattr(feature, "dtype", type(feature).__name__)) if not isinstance(feature, list) else "list"


def check_texts(records: Dataset, column: str, option: str = "--text-column") -> None:
    """Refuse a column that does not hold a text in every record, or holds only empty ones.

    Args:
        records: the records of one split.
        column: that is there.
        option: that named it, for the message.

    Raises:
        ValueError: says the number of the first record without a text.
    """
    kind = _kind(records, column)
    where = f"{option} {column!r}"
    if kind not in ("string", "large_string"):
        if kind == "null":
            raise ValueError(f"{where} holds nothing: it is null in every record. Name another.")
        if kind == "Json":  # datasets' type for values of several types
            number = next((n for n, value in enumerate(records[column], 1) if not isinstance(value, str)), 1)
            raise ValueError(f"{where} holds no text in record {number}. Give every record a text.")
        kind = kind if kind not in ("List", "dict") else kind.lower()
        raise ValueError(f"{where} holds {kind}, expected text. Name another.")
    blank = True
    for before, values in _column(records, column):
        if values.null_count:
            number = before + 1 + values.is_null().to_pylist().index(True)
            raise ValueError(f"{where} is null in record {number}. Give every record a text, or leave the record out.")
        blank = blank and not pc.any(pc.not_equal(pc.utf8_trim_whitespace(values), "")).as_py()
    if blank:
        raise ValueError(f"{where} is empty in all of the {len(records)} records. Name another.")


def check_column(records: Dataset, column: str, option: str) -> None:
    """Refuse a column that is not there.

    Raises:
        ValueError: names the columns that there are.
    """
    if column not in records.column_names:
        raise ValueError(f"{option} {column!r}: the data has the columns {shown(records.column_names)}. Name one.")


def values_of(records: Dataset, column: str, option: str = "--user-column") -> Iterator[str]:
    """The values of a column that names something, a user or a label: one text for each record, in their order.

    Raises:
        ValueError: there is no such column, it holds neither text nor whole numbers, or a record has no value.
    """
    check_column(records, column, option)
    kind = _kind(records, column)
    if kind not in ("string", "large_string") and not kind.startswith(("int", "uint", "bool")):
        if kind == "Json":  # datasets' type for values of several types
            found = [(number, type(value)) for number, value in enumerate(records[column], 1) if value is not None]
            if other := next((number for number, its in found if its is not found[0][1]), None):
                raise ValueError(
                    f"{option} {column!r} holds one type in record {found[0][0]}, and another in record {other}; "
                    "expected text in all of them, or whole numbers. Give all records the same type."
                )
        raise ValueError(f"{option} {column!r} holds {kind}, expected text or whole numbers. Name another.")
    for before, values in _column(records, column):
        for number, value in enumerate(values.to_pylist(), before + 1):
            if value is None or not str(value).strip():
                raise ValueError(
                    f"{option} {column!r} is empty in record {number}. Give every record a value, or leave the record "
                    "out."
                )
            yield str(value)


def summary(texts: Dataset, column: str, examples: Dataset, tokens: int, end: int | None) -> list[str]:
    """What whoever trains should know of the records, in lines.

    Args:
        texts: the training records.
        column: of the text.
        examples: the same, tokenised and cut.
        tokens: where they were cut.
        end: the end token, which a record has that was not cut; None: those that are just as long are counted, too.
    """
    hashes, empty = [], 0
    for _, values in _column(texts, column):
        here = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in values.to_pylist()]
        hashes.append(np.frombuffer(b"".join(here), dtype=np.uint64))
        empty += pc.sum(pc.equal(pc.utf8_trim_whitespace(values), "")).as_py() or 0
    number = len(texts)
    again = number - len(np.unique(np.concatenate(hashes)))
    cut = sum(_cut(ids, tokens, end) for _, ids in _column(examples, "input_ids"))
    longer = "have at least" if end is None else "are longer than"
    return [
        NOT_FOR_PUBLICATION,
        f"  {number:,} records; {share(again, number)} repeat an earlier one; {share(empty, number)} are empty",
        f"  {share(cut, number)} {longer} {tokens} tokens, and are cut there",
    ]


def _cut(ids: Any, tokens: int, end: int | None) -> int:
    full = pc.equal(pc.list_value_length(ids), tokens)
    if end is None or not pc.any(full).as_py():
        return pc.sum(full).as_py() or 0
    last = pc.list_element(ids.filter(full), tokens - 1)
    return pc.sum(pc.not_equal(last, end)).as_py() or 0


def share(number: int, of: int) -> str:
    """A number, and the share that it is."""
    return f"{number:,} ({100 * number / max(1, of):.3g} %)"
