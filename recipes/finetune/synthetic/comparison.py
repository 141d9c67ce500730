"""Synthetic texts beside private ones: the file of figures that is not for publication."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.output import MEASURES
from finetune.synthetic import measures
from finetune.synthetic.downstream import Classifier, Labelled

NOTE = (
    "Not for publication: computed from private records without noise, and covered by no epsilon. A choice made by "
    "these figures (settings, or which data set is published) is not accounted for."
)
SYNTHETIC, HELD_OUT, UNTUNED, REAL = "synthetic", "held-out records", "untuned model's", "training records"


@dataclass(frozen=True)
class Samples:
    """What is compared: texts as they were trained on, cut where the examples are.

    Attributes:
        train: the private training records.
        held_out: private records that were not trained on.
        synthetic: the texts that are published.
        untuned: texts of the model before the fine-tuning, for the same headers; None: not compared.
        names: all labels, of the column that is learnt.
    """

    train: Labelled
    held_out: Labelled
    synthetic: Labelled
    untuned: Labelled | None
    names: Sequence[str]


def compare(
    samples: Samples,
    model: Any,
    tokenizer: Any,
    max_tokens: int,
    classifier: Classifier | None,
    seed: int,
) -> dict[str, Any]:
    """All figures. For one rank.

    Args:
        samples: what is compared.
        model: whose embeddings are compared.
        tokenizer: of that model.
        max_tokens: at which a text is cut for it.
        classifier: what is trained; None: nothing.
        seed: of clusters, the classifier, and what is drawn.
    """
    others = {SYNTHETIC: samples.synthetic, HELD_OUT: samples.held_out}
    if samples.untuned is not None:
        others[UNTUNED] = samples.untuned
    # one size for all: both the similarity and the accuracy depend on it
    size = min(len(some.texts) for some in (samples.train, *others.values()))
    points = {
        name: measures.embed(model, tokenizer, some.some(size, seed).texts, max_tokens)
        for name, some in {REAL: samples.train, **others}.items()
    }
    found: dict[str, Any] = {
        "note": NOTE,
        "texts": {REAL: len(samples.train.texts), **{name: len(some.texts) for name, some in others.items()}},
        "words in a row in common with a training record": {
            name: measures.overlap(some.texts, samples.train.texts) for name, some in others.items()
        },
        "words of a text, beside the training records": {
            name: measures.lengths(some.texts, samples.train.texts)
            for name, some in {REAL: samples.train, **others}.items()
        },
        "labels, total variation from the training records": {
            name: measures.total_variation(some.labels, samples.train.labels) for name, some in others.items()
        },
        f"similarity of embeddings to training records, {size} texts each": {
            name: measures.distance(points[REAL], points[name], seed) for name in others
        },
    }
    if classifier is not None:
        learnt = {SYNTHETIC: samples.synthetic, REAL: samples.train}
        if samples.untuned is not None:
            learnt[UNTUNED] = samples.untuned
        size = min(len(some.texts) for some in learnt.values())
        most = max(samples.held_out.labels.count(name) for name in samples.names) / len(samples.held_out.labels)
        found[f"accuracy on held-out records after training on {size} texts, {classifier.steps} steps"] = {
            **{
                name: classifier.score(some.some(size, seed), samples.held_out, samples.names, seed)
                for name, some in learnt.items()
            },
            "the most frequent label": {"accuracy": most},
        }
    return found


def write(output: Path, figures: dict[str, Any]) -> None:
    """Write the file beside the model, never into the folder that is published."""
    (output / MEASURES).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def lines(figures: dict[str, Any]) -> list[str]:
    """The figures for the terminal; the first line says that they are not for publication."""
    found = [str(figures["note"])]
    for name, part in figures.items():
        if isinstance(part, dict):
            found.append(f"{name}:")
            found += [f"    {key:20} {_words(value)}" for key, value in part.items()]
    return found


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return " / ".join(_words(inner) for inner in value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)
