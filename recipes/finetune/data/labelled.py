"""Texts with labels: the built-in ones, files and the hub; their model, their metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from finetune.data.loading import load_texts

ENCODER = Path(__file__).resolve().parents[2] / "assets" / "encoder"
# Packages whose docstrings are many in every version of Python; chosen by name, not by counting private records.
PACKAGES = ("asyncio", "email", "importlib", "logging", "tkinter", "turtle", "unittest", "xml")


def labelled(dataset: str, text_column: str, label_column: str) -> tuple[Dataset, Dataset, list[str]]:
    """Records with ``text`` and ``label``, a number, to train on and to test with, and the labels' names.

    Raises:
        ValueError: a column is missing; says which there are.
    """
    train, test = load_texts(dataset, validation_share=0.2)
    if dataset == "docstrings":
        parts = [
            part.map(lambda row: {"label": row["name"].split(".")[0]}).filter(lambda row: row["label"] in PACKAGES)
            for part in (train, test)
        ]
        names = list(PACKAGES)
        text_column, label_column = "text", "label"
    else:
        parts = [train, test]
        for column in (text_column, label_column):
            if column not in train.column_names:
                raise ValueError(
                    f"{dataset!r} has the columns {train.column_names}, and no {column!r}; give --text_column and "
                    "--label_column."
                )
        # The set of labels becomes a public part of the model: name them, or be sure that it tells nothing.
        names = sorted({str(value) for part in parts for value in part[label_column]})
    number = {name: i for i, name in enumerate(names)}

    def row(record: dict[str, Any]) -> dict[str, Any]:
        return {"text": record[text_column], "label": number[str(record[label_column])]}

    made = [part.map(row, remove_columns=part.column_names) for part in parts]
    return made[0], made[1], names


def tokenised(data: Dataset, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> Dataset:
    """``input_ids``, ``attention_mask`` and ``label`` of each record, one row for each."""

    def cut(record: dict[str, Any]) -> dict[str, Any]:
        return dict(tokenizer(record["text"], truncation=True, max_length=seq_len, return_token_type_ids=False))

    return data.map(cut, remove_columns=["text"])


def load_classifier(model: str, names: list[str], train: str) -> nn.Module:
    """A model with a head for these labels, of which ``train`` says what is trained.

    Raises:
        ValueError: ``train`` is none of all, top, head.
    """
    if train not in ("all", "top", "head"):
        raise ValueError(f"--train is {train!r}; expected all, top or head")
    loaded = AutoModelForSequenceClassification.from_pretrained(
        model, num_labels=len(names), id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)}
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


def measure(prediction: Any) -> dict[str, float]:
    """Accuracy, and the mean of the classes' F1."""
    found, labels = np.asarray(prediction.predictions).argmax(-1), np.asarray(prediction.label_ids)
    scores = []
    for label in np.unique(labels):
        hit = float(np.sum((found == label) & (labels == label)))
        scores.append(2 * hit / max(1.0, float(np.sum(found == label) + np.sum(labels == label))))
    return {"accuracy": float(np.mean(found == labels)), "f1": float(np.mean(scores))}
