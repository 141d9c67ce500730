"""Small models and batches of a model type and a head: float64, random weights, from the configuration alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tools.models.exceptions import CODEBOOKS, FIELDS, IMAGES, LENGTHS, NOT_TRAINED
from tools.models.precision import DOUBLE
from tools.models.shrink import FIRST_TOKEN, VOCAB, shrunk

HEADS = {
    "causal_lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "sequence_classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "masked_lm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "seq2seq_lm": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "token_classification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "question_answering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
}
ROWS = (12, 9, 6)
CLASSES = 3
TARGETS = 5  # tokens of a text that an encoder-decoder is to write
MOST_WEIGHTS = 20_000_000
# Parts that a batch of texts does not reach.
_TOWER = re.compile(r"vision|visual|audio|image|vqmodel|multi_modal_projector", re.IGNORECASE)


class NotBuiltError(RuntimeError):
    """A family has no small model that a batch of texts trains; the text is the reason."""


@dataclass(frozen=True)
class Family:
    """A model type with a head.

    Attributes:
        name: transformers' model type.
        head: of :data:`HEADS`.
        class_name: of the model.
    """

    name: str
    head: str
    class_name: str

    precision = DOUBLE

    def __str__(self) -> str:
        return self.name if self.head == "causal_lm" else f"{self.name}/{self.head}"

    def build(self) -> nn.Module:
        """:func:`build_model`."""
        return build_model(self)

    def lengths(self) -> list[int]:
        """Tokens of the rows."""
        return list(LENGTHS.get(self.name, ROWS))

    def make_batch(self, config: Any, lengths: list[int], seed: int = 1) -> dict[str, Tensor]:
        """:func:`build_batch`."""
        return build_batch(self, config, lengths, seed)


def families(head: str) -> list[Family]:
    """All that the installed transformers has with a head, by name."""
    names: Mapping[str, Any] = getattr(modeling_auto, HEADS[head])
    return [
        Family(model_type, head, name if isinstance(name, str) else name[0])
        for model_type, name in sorted(names.items())
    ]


def build_config(family: Family) -> PreTrainedConfig:
    """A small configuration of the class that the family's model takes.

    Raises:
        NotBuiltError: there is none.
    """
    if family.name in NOT_TRAINED:
        raise NotBuiltError(NOT_TRAINED[family.name])
    cls = CONFIG_MAPPING[family.name]
    exceptions = dict(FIELDS.get(family.name, {}))
    fields = cls.__dataclass_fields__
    if family.head == "causal_lm" and "is_decoder" in fields:
        exceptions.setdefault("is_decoder", True)
    config = cls(**shrunk(cls(), exceptions))
    wanted = getattr(transformers, family.class_name).config_class
    if not isinstance(config, wanted):
        config = next((part for part in config.__dict__.values() if isinstance(part, wanted)), config)
    if family.head in ("sequence_classification", "token_classification"):
        config.num_labels = CLASSES
    if family.head != "causal_lm" and getattr(config.get_text_config(), "pad_token_id", 0) is None:
        config.get_text_config().pad_token_id = config.pad_token_id = 0
    if getattr(config, "is_encoder_decoder", False) and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"  # grouped products refuse doubles
    return config


def build_model(family: Family, seed: int = 0) -> nn.Module:
    """The model in float64, in training mode without dropout, with weights that let no gradient vanish by symmetry.

    What takes images and sounds is frozen: a batch of texts does not train it.

    Raises:
        NotBuiltError: it has none.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            config = build_config(family)
            refuse_large(family, config)
            model = getattr(transformers, family.class_name)(config)
        except ImportError as error:
            raise NotBuiltError(str(error).strip().splitlines()[0].strip()) from None
        model = model.double().train()
        randomise(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for name, p in model.named_parameters():
        if _TOWER.search(name):
            p.requires_grad_(False)
    return model


def refuse_large(family: Family, config: PreTrainedConfig) -> None:
    """Count the weights of a model before it is made.

    Raises:
        NotBuiltError: they are many: a part of the configuration is of a kind that the table does not make small.
    """
    with torch.device("meta"):
        total = sum(p.numel() for p in getattr(transformers, family.class_name)(config).parameters())
    if total > MOST_WEIGHTS:
        raise NotBuiltError(f"{total:,} weights: not all of its configuration could be made small")


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Move every parameter off its initial value: norms, biases and decays by a fifth, matrices wholly."""
    for name, p in model.named_parameters():
        if not p.requires_grad:  # a table of sines
            continue
        noise = torch.randn(p.shape, dtype=p.dtype)
        if p.dim() < 2 or name.endswith(("A_log", "_scale", ".gamma", ".scale")):
            p.copy_(torch.nan_to_num(p) + 0.2 * noise)
        else:
            p.copy_(noise / math.sqrt(max(p.shape[-1], 8)))


def build_batch(family: Family, config: Any, lengths: list[int], seed: int = 1) -> dict[str, Tensor]:
    """Random texts of these lengths, padded on the right to the longest, with labels that are -100 on padding.

    Returns:
        ``input_ids`` and ``attention_mask`` ``[B, T]``; ``labels`` ``[B, T]``, ``[B]`` or ``[B, 5]``, or
        ``start_positions`` and ``end_positions`` ``[B]``.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, tokens = len(lengths), max(lengths)
    text = config.get_text_config()
    vocab = min(VOCAB, getattr(text, "vocab_size", None) or VOCAB)
    pad = getattr(text, "pad_token_id", None) or 0
    ids = torch.randint(FIRST_TOKEN, vocab, (rows, tokens), generator=generator)
    mask = torch.tensor([[int(t < length) for t in range(tokens)] for length in lengths])
    ids = torch.where(mask == 1, ids, pad)
    end = getattr(text, "eos_token_id", None)
    if family.head == "sequence_classification" and isinstance(end, int):  # some are read off at the end of the text
        ids[torch.arange(rows), mask.sum(1) - 1] = end
    batch = {"input_ids": ids, "attention_mask": mask}
    if family.name in IMAGES:
        batch["pixel_values"] = torch.randn(rows, 3, 8, 8, generator=generator, dtype=torch.float64)
    writes = family.head == "seq2seq_lm" and getattr(config, "is_encoder_decoder", False)
    if family.head == "causal_lm" or (family.head == "seq2seq_lm" and not writes):
        labels = ids.masked_fill(mask == 0, -100)
        return {**batch, "labels": labels[..., None] if family.name in CODEBOOKS else labels}
    if family.head == "sequence_classification":
        return {**batch, "labels": torch.arange(rows) % CLASSES}
    if family.head == "token_classification":
        return {**batch, "labels": (ids % CLASSES).masked_fill(mask == 0, -100)}
    if family.head == "masked_lm":
        hidden = (torch.arange(tokens) % 2 == 0)[None] | (mask == 0)
        return {**batch, "labels": ids.masked_fill(hidden, -100)}
    if family.head == "question_answering":
        return {**batch, "start_positions": torch.arange(rows) % 2, "end_positions": torch.arange(rows) % 2 + 1}
    labels = torch.randint(FIRST_TOKEN, vocab, (rows, TARGETS), generator=generator)
    for i, length in enumerate(lengths):
        labels[i, TARGETS - (tokens - length) // 3 :] = -100
    return {**batch, "labels": labels}


def alone(batch: Mapping[str, Tensor], i: int) -> dict[str, Tensor]:
    """Example ``i`` in a batch of its own, without padding."""
    row = {name: value[i : i + 1] for name, value in batch.items()}
    length = int(row["attention_mask"].sum())
    cut = row["input_ids"].shape[1]
    row = {name: value[:, :length] if value.shape[1:2] == (cut,) else value for name, value in row.items()}
    labels = row.get("labels")
    if labels is not None and labels.dim() == 2 and labels.shape[1] == TARGETS != cut:
        row["labels"] = labels[:, : int((labels[0] != -100).sum())]
    return row
