"""Text classification as a recipe: options, losses, and figures of the predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from accelerate import Accelerator
from finetune.data.checks import summary
from finetune.data.labelled import (
    ENCODER,
    check_labelled,
    labelled,
    load_classifier,
    make_label_collate,
    tokenised,
)
from finetune.data.progress import loading_bars
from finetune.evaluation import choose_examples, over_batches
from finetune.materials import Materials, pad_token, records_of
from finetune.model import checkpointed, load_tokenizer, reading, with_lora
from finetune.options import Options, again, option
from finetune.recipe import Recipe

BINS = 10  # of the calibration error


@dataclass
class ClassifyOptions(Options):
    """Options of ``classify_dp.py``."""

    steps: ClassVar[int] = 60
    unused: ClassVar[tuple[str, ...]] = (
        *("pack", "max_tokens_in_memory", "long_context", "rope_theta", "load_in_4bit"),
        *("prompt", "sample_tokens", "audit"),
        *("user_column", "records_per_user"),
    )

    model: str = again(Options, "model", str(ENCODER))
    text_column: str | None = again(Options, "text_column", "text")
    label_column: str = option("label", "data", "column of the labels, whole numbers or words", metavar="NAME")
    labels: str | None = option(
        None,
        "data",
        "all labels, separated by commas: they become a public part of the model. Without it they are those that the "
        "data has, and are published",
        metavar="NAMES",
    )
    class_weights: str | None = option(
        None,
        "data",
        "weights of the losses, such as spam=3,ham=1; 1 for a label that is not named. A part of the public settings: "
        "weights computed from the records would tell how many there are of each",
        metavar="WEIGHTS",
    )
    train: str = option("top", "model", "what is trained", choices=("all", "top", "head"))
    seq_len: int = again(Options, "seq_len", 64)
    target_delta: float = again(Options, "target_delta", 1e-5)
    expected_batch_size: float = again(Options, "expected_batch_size", 256)
    learning_rate: float = again(Options, "learning_rate", 0.02)
    eval_every: int = again(Options, "eval_every", 20)
    max_eval_examples: int = again(Options, "max_eval_examples", 1000)
    sample_tokens: int = again(Options, "sample_tokens", 0)
    validation_share: float = again(Options, "validation_share", 0.2)
    compare_nonprivate: bool = again(Options, "compare_nonprivate", True)
    compare_learning_rate: float | None = again(Options, "compare_learning_rate", 3e-3)


def weights_of(words: str | None, names: list[str]) -> list[float] | None:
    """The weight of each label, from the option.

    Raises:
        ValueError: an unknown label, or no positive number.
    """
    if words is None:
        return None
    given = dict.fromkeys(names, 1.0)
    for part in words.split(","):
        name, _, value = part.rpartition("=")
        if name.strip() not in given:
            raise ValueError(f"--class-weights: {name.strip()!r} is no label; expected {', '.join(names)}.")
        try:
            given[name.strip()] = float(value)
        except ValueError:
            given[name.strip()] = -1.0
        if not 0 < given[name.strip()] < float("inf"):
            raise ValueError(
                f"--class-weights: the weight of {name.strip()!r} is {value!r}; expected a number above 0."
            )
    return list(given.values())


def figures(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """Loss, accuracy, macro F1 and calibration of predictions.

    Args:
        probabilities: ``[N, K]`` float64.
        labels: ``[N]`` int64.

    Returns:
        ``loss``: mean cross-entropy in nats, unweighted. ``accuracy``. ``macro F1``: the mean of the F1 of the labels
        that occur or are predicted. ``calibration error``: the mean of \\|confidence - accuracy\\| over ten bins of
        the confidence, weighted by their records (Guo et al. 2017, arXiv 1706.04599, equation 3).
    """
    confidence, found = probabilities.max(1)
    hits = (found == labels).double()
    kinds = probabilities.shape[1]
    both = torch.bincount(labels[found == labels], minlength=kinds).double()
    of_labels, of_found = (torch.bincount(x, minlength=kinds).double() for x in (labels, found))
    there = (of_labels + of_found) > 0
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add(0, bins, confidence - hits)
    return {
        "loss": float(-probabilities[torch.arange(len(labels)), labels].clamp(min=1e-30).log().mean()),
        "accuracy": float(hits.mean()),
        "macro F1": float((2 * both / (of_labels + of_found))[there].mean()),
        "calibration error": float(gaps.abs().sum() / len(labels)),
    }


def predictions(
    model: nn.Module,
    examples: Sequence[dict[str, Any]],
    collate: Callable[..., dict[str, Tensor]],
    accelerator: Accelerator | None = None,
) -> tuple[Tensor, Tensor]:
    """Probabilities ``[N, K]`` float64 and labels ``[N]`` of examples. A collective where there is an accelerator."""

    def probabilities(network: Any, batch: dict[str, Tensor]) -> list[tuple[list[float], int]]:
        labels = batch.pop("labels").tolist()
        return list(zip(network(**batch).logits.double().softmax(-1).tolist(), labels, strict=True))

    found = over_batches(model, examples, collate, accelerator, probabilities)
    return torch.tensor([p for p, _ in found], dtype=torch.float64), torch.tensor([y for _, y in found])


class Classification(Recipe):
    """Texts with labels."""

    name = "classify_dp"
    options = ClassifyOptions
    auto_class = AutoModelForSequenceClassification
    pipeline_tag = "text-classification"
    loss_unit = "nats"

    names: list[str]  # of the labels; known with the materials
    weights: list[float] | None = None

    def materials(self, options: ClassifyOptions, accelerator: Accelerator) -> Materials:
        """Load tokenizer, texts and labels."""
        tokenizer = load_tokenizer(options.model)
        with accelerator.main_process_first(), loading_bars(accelerator):
            text, label = options.text_column or "text", options.label_column

            def check(records: Dataset) -> None:
                if options.dataset != "docstrings":  # whose labels are made of the names
                    check_labelled(records, text, label)

            parts = records_of(options, check)
            texts, test, self.names = labelled(*parts, options.dataset, text, label, options.labels)
            train, test = (tokenised(part, tokenizer, options.seq_len) for part in (texts, test))
        if accelerator.is_main_process:
            print(*summary(texts, "text", train, options.seq_len, None), sep="\n")
        self.weights = weights_of(options.class_weights, self.names)
        chosen = choose_examples(test, options.max_eval_examples, options.seed, least=0)
        collate = make_label_collate(pad_token(tokenizer))
        return Materials(tokenizer, train, chosen, collate, collate)

    def model(self, options: ClassifyOptions, dtype: torch.dtype) -> nn.Module:
        """Load the encoder, with a new head."""
        torch.manual_seed(options.seed)  # the head is initialised at random, and alike on every rank
        settings = {"dtype": dtype, "attn_implementation": options.attn_implementation}
        with reading(options.model):
            model = load_classifier(options.model, self.names, options.train, **settings)
        return checkpointed(with_lora(model, options, "SEQ_CLS"), options)

    def losses(self, model: Callable[..., Any], batch: dict[str, Tensor]) -> Tensor:
        """The weighted cross-entropy of each example, ``[B]``; not divided by the weights of the others."""
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        weight = None if self.weights is None else logits.new_tensor(self.weights)
        return nn.functional.cross_entropy(logits, batch["labels"], weight=weight, reduction="none")

    def measure(
        self, model: nn.Module, materials: Materials, accelerator: Accelerator | None = None
    ) -> dict[str, float]:
        """See :func:`figures`."""
        return figures(*predictions(model, materials.validation, materials.collate, accelerator))

    def notes(self, options: ClassifyOptions) -> tuple[str, ...]:
        """One example, and that the labels are public."""
        public = "the names of the labels are a public part of the model"
        given = options.labels is not None or options.dataset == "docstrings"
        return (*super().notes(options), public if given else public + ", and were taken from the records")
