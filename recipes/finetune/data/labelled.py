"""Texts with labels: the built-in ones, files and the hub; their model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from finetune.data.checks import check_column, check_texts, values_of
from finetune.data.examples import make_collate

ENCODER = Path(__file__).resolve().parents[2] / "assets" / "encoder"
# Packages whose docstrings are many in every version of Python; chosen by name, not by counting private records.
PACKAGES = ("asyncio", "email", "importlib", "logging", "tkinter", "turtle", "unittest", "xml")


def check_labelled(records: Dataset, text_column: str, label_column: str) -> None:
    """Refuse records of which one has no text or no label.

    Raises:
        ValueError: a column is missing, or holds something else; says the number of the first such record.
    """
    check_column(records, text_column, "--text-column")
    check_texts(records, text_column)
    for _ in values_of(records, label_column, "--label-column"):
        pass


def labelled(
    train: Dataset, test: Dataset, dataset: str, text_column: str, label_column: str, labels: str | None = None
) -> tuple[Dataset, Dataset, list[str]]:
    """Records with ``text`` and ``label``, a number, to train on and to test with, and the labels' names.

    Args:
        train: records to train on.
        test: records to test with.
        dataset: where they are from; of ``docstrings`` those of some packages are taken, whose names are the labels.
        text_column: of the texts.
        label_column: of the labels.
        labels: all that there can be, separated by commas; if None, those that there are.

    Raises:
        ValueError: a column is missing; a record has another label; or there are fewer than two labels.
    """
    parts = [train, test]
    if dataset == "docstrings":
        parts = [
            part.map(lambda row: {"label": row["name"].split(".")[0]}).filter(lambda row: row["label"] in PACKAGES)
            for part in parts
        ]
        text_column, label_column, labels = "text", "label", ",".join(PACKAGES)
    for option, column in (("--text-column", text_column), ("--label-column", label_column)):
        if column not in parts[0].column_names:
            there = ", ".join(parts[0].column_names)
            raise ValueError(f"{option} {column!r}: the data has the columns {there}. Name one of them.")
    found = {str(value) for part in parts for value in part.unique(label_column)}
    # The set of labels becomes a public part of the model: name them, or be sure that it tells nothing.
    names = sorted(found) if labels is None else [name.strip() for name in labels.split(",") if name.strip()]
    if found - set(names):
        raise ValueError(
            f"--labels has {len(names)} names, and {len(found - set(names))} labels of the records are none of them. "
            "Name all."
        )
    if len(names) < 2:
        raise ValueError(f"--label-column {label_column!r} holds one label only; a classifier needs two.")
    number = {name: i for i, name in enumerate(names)}

    def row(record: dict[str, Any]) -> dict[str, Any]:
        return {"text": record[text_column], "label": number[str(record[label_column])]}

    made = [part.map(row, remove_columns=part.column_names) for part in parts]
    return made[0], made[1], names


def tokenised(data: Dataset, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> Dataset:
    """``input_ids`` of at most ``seq_len`` tokens and ``labels``, a number, of each record: one row for each."""

    def cut(batch: dict[str, list[Any]]) -> dict[str, Any]:
        return {
            "input_ids": tokenizer(batch["text"], truncation=True, max_length=seq_len)["input_ids"],
            "labels": batch["label"],
        }

    return data.map(cut, batched=True, remove_columns=data.column_names)


def make_label_collate(pad_token_id: int) -> Callable[[Sequence[dict[str, Any]]], dict[str, torch.Tensor]]:
    """From a list of examples to ``input_ids`` and ``attention_mask`` ``[B, T]`` and ``labels`` ``[B]``, int64."""
    pad = make_collate(pad_token_id)

    def collate(examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = pad([{"input_ids": example["input_ids"]} for example in examples])
        return batch | {"labels": torch.tensor([example["labels"] for example in examples])}

    return collate


def load_classifier(model: str, names: list[str], train: str, **options: Any) -> nn.Module:
    """A model with a head for these labels, of which ``train`` says what is trained; ``options`` of from_pretrained.

    Raises:
        ValueError: ``train`` is none of all, top, head.
    """
    if train not in ("all", "top", "head"):
        raise ValueError(f"--train is {train!r}; expected all, top or head")
    loaded = AutoModelForSequenceClassification.from_pretrained(
        model,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={n: i for i, n in enumerate(names)},
        **options,
    )
    if train == "all":
        return loaded
    body = loaded.base_model
    for p in body.parameters():
        p.requires_grad_(False)
    blocks = [m for m in body.modules() if isinstance(m, nn.ModuleList)]
    for part in [getattr(body, "pooler", None), *([blocks[0][-1]] if blocks and train == "top" else [])]:
        if isinstance(part, nn.Module):
            part.requires_grad_(True)
    return loaded
