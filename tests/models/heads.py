"""Tiny models with every head, and batches for them; what dpft has no rule for is frozen, by the names given."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from tests import zoo
from tests.oracle import Batch

VOCAB, TOKENS, EXAMPLES = 29, 7, 3
ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
DECODER = {
    **{name: ENCODER[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")},
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
}
SEQ2SEQ = {
    "vocab_size": VOCAB,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 20,
    "max_position_embeddings": 16,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
IMAGE = {
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 3,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def tokens(examples: int = EXAMPLES, length: int = TOKENS) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask [B, T]`` of rows of unequal lengths that end in token 2; one is full."""
    g = torch.Generator().manual_seed(examples)
    ids = torch.randint(3, VOCAB, (examples, length), generator=g)
    mask = torch.ones_like(ids)
    for i in range(1, examples):
        size = 3 + (i * 2) % (length - 3)
        ids[i, size:], mask[i, size:] = 0, 0
    ids[torch.arange(examples), mask.sum(1) - 1] = 2
    return {"input_ids": ids, "attention_mask": mask}


def pixels(examples: int = EXAMPLES) -> dict[str, Tensor]:
    """``pixel_values [B, 3, 8, 8]``."""
    return {"pixel_values": torch.randn(examples, 3, 8, 8, generator=torch.Generator().manual_seed(examples))}


def sounds(examples: int = EXAMPLES) -> dict[str, Tensor]:
    """``input_features [B, 8, 24]``."""
    return {"input_features": torch.randn(examples, 8, 24, generator=torch.Generator().manual_seed(examples))}


def classes(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """One class of three for each example."""
    return {**batch, "labels": torch.arange(_size(batch)) % 3}


def several(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Any of three classes for each example."""
    return {**batch, "labels": (torch.arange(3 * _size(batch)).view(-1, 3) % 2).float()}


def numbers(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A number for each example."""
    return {**batch, "labels": torch.arange(_size(batch)) * 0.7 - 0.4}


def tags(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """One class of three for each token; of some examples less than all."""
    labels = (batch["input_ids"] % 3).masked_fill(batch["attention_mask"] == 0, -100)
    labels[0, :2] = -100
    return {**batch, "labels": labels}


def spans(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Where an answer starts and ends."""
    start = torch.arange(_size(batch)) % 2
    end = start + 1
    return {**batch, "start_positions": start, "end_positions": end}


def masked(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every second token is to be predicted."""
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100).clone()
    labels[:, ::2] = -100
    return {**batch, "labels": labels}


def texts(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Another text to be written, of unequal lengths."""
    examples = _size(batch)
    labels = torch.randint(3, VOCAB, (examples, 5), generator=torch.Generator().manual_seed(7))
    for i in range(1, examples):
        labels[i, 5 - i :] = -100
    return {**batch, "labels": labels}


def pairs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Masked tokens, and whether the second sentence follows: a sum of two losses."""
    return {**masked(batch), "next_sentence_label": torch.arange(_size(batch)) % 2}


def following(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tokens, to be predicted from those before them; images come first."""
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return {**batch, "labels": labels.masked_fill(labels == 3, -100)}


def replaced(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whether each token was replaced by another."""
    return {**batch, "labels": batch["input_ids"] % 2}


def choices(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Two texts for each example, ``[B, 2, T]``, of which one is right."""
    both = {name: torch.stack([value, value.roll(1, 0)], 1) for name, value in batch.items()}
    return {**both, "labels": torch.arange(_size(batch)) % 2}


def two_heads(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same, with a loss of each text besides."""
    both = choices(batch)
    return {**both, "mc_labels": both["labels"], "labels": both["input_ids"]}


def _size(batch: dict[str, Tensor]) -> int:
    return len(next(iter(batch.values())))


def image_and_text() -> dict[str, Tensor]:
    """An image in front of each text, as four tokens."""
    text = tokens()
    image = torch.full((EXAMPLES, 4), 3)
    text["input_ids"] = torch.cat([image, text["input_ids"].masked_fill(text["input_ids"] == 3, 4)], 1)
    text["attention_mask"] = torch.cat([torch.ones_like(image), text["attention_mask"]], 1)
    return {**text, **pixels()}


def own_losses(model: nn.Module, batch: Batch) -> Tensor:
    """``[B]`` what transformers computes as the loss of each example alone, run alone.

    The answer of a question is one of all positions: there, alone also means without padding.
    """
    losses = []
    for i in range(_size(batch)):
        row = {name: value[i : i + 1] for name, value in batch.items()}
        if "start_positions" in row:
            length = int(row["attention_mask"].sum())
            row |= {name: row[name][:, :length] for name in ("input_ids", "attention_mask")}
        losses.append(model(**row).loss.reshape(()))
    return torch.stack(losses)


def _encoder(cls: Any, **more: Any) -> Callable[[], Any]:
    return lambda: cls(**{**ENCODER, "num_labels": 3, **more})


def _deberta(**more: Any) -> Callable[[], Any]:
    return _encoder(hf.DebertaV2Config, **more)


def _decoder(cls: Any, **more: Any) -> Callable[[], Any]:
    return lambda: cls(**{**DECODER, "num_labels": 3, "classifier_dropout": 0.0, **more})


def _seq2seq(cls: Any, **more: Any) -> Callable[[], Any]:
    return lambda: cls(**{**SEQ2SEQ, "num_labels": 3, **more})


def _gpt2() -> Any:
    sizes = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "num_labels": 3}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "classifier_dropout": 0.0}
    return hf.GPT2Config(**sizes, **dropout, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def _distilbert() -> Any:
    sizes = {"vocab_size": VOCAB, "dim": 16, "hidden_dim": 20, "n_layers": 2, "n_heads": 2, "num_labels": 3}
    dropout = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0, "qa_dropout": 0.0}
    return hf.DistilBertConfig(**sizes, **dropout, max_position_embeddings=16)


def _xlnet() -> Any:
    sizes = {"vocab_size": VOCAB, "d_model": 16, "d_inner": 20, "n_layer": 2, "n_head": 2, "num_labels": 3}
    return hf.XLNetConfig(**sizes, dropout=0.0, summary_last_dropout=0.0, pad_token_id=0, bos_token_id=1)


def _t5() -> Any:
    sizes = {"vocab_size": VOCAB, "d_model": 16, "d_kv": 8, "d_ff": 20, "num_layers": 2, "num_heads": 2}
    ids = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    return hf.T5Config(**sizes, **ids, dropout_rate=0.0, classifier_dropout=0.0, num_labels=3)


def _whisper() -> Any:
    sizes = {"num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 16, "classifier_proj_size": 12}
    return hf.WhisperConfig(**{**SEQ2SEQ, **sizes, "num_labels": 3, "suppress_tokens": None})


def _modernbert(**more: Any) -> Callable[[], Any]:
    dropout = {"embedding_dropout": 0.0, "mlp_dropout": 0.0, "attention_dropout": 0.0, "classifier_dropout": 0.0}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    return _encoder(hf.ModernBertConfig, **dropout, **ids, **more)


def _vit() -> Any:
    return hf.ViTConfig(**IMAGE, num_labels=3)


def _dinov2() -> Any:
    return hf.Dinov2Config(**IMAGE, num_labels=3)


def _siglip() -> Any:
    sizes = {name: value for name, value in IMAGE.items() if "prob" not in name}
    return hf.SiglipConfig(vision_config=sizes, text_config={"vocab_size": VOCAB, "hidden_size": 16}, num_labels=3)


def _llava() -> Any:
    sizes = {name: value for name, value in IMAGE.items() if "prob" not in name}
    vision, text = hf.CLIPVisionConfig(**sizes, projection_dim=16), hf.LlamaConfig(**DECODER)
    return hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=3, vision_feature_layer=-1)


def head(
    name: str,
    cls: Any,
    config: Callable[[], Any],
    batch: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    inputs: Callable[[], dict[str, Tensor]] = tokens,
    frozen: str | None = None,
    **options: Any,
) -> zoo.Entry:
    """A model with a head.

    Args:
        name: of the architecture and the task.
        cls: of the model.
        config: makes its configuration.
        batch: adds targets to ``inputs()``.
        inputs: makes the rest of a batch.
        frozen: pattern of the names of parameters that are not trained, since dpft has no rule for them.
        **options: set in the configuration.
    """

    def build(attention: str) -> nn.Module:
        made = config()
        for option, value in options.items():
            setattr(made, option, value)
        made._attn_implementation = "sdpa" if cls._supports_sdpa else "eager"
        model: nn.Module = cls(made)
        with torch.no_grad():
            for parameter_name, p in model.named_parameters():
                p.add_(0.1 * torch.randn_like(p))
                p.requires_grad_(frozen is None or re.search(frozen, parameter_name) is None)
        return model

    return zoo.Entry(name, zoo.seeded(build), lambda **_: batch(inputs()), own_losses)


_HEADS = {"ForSequenceClassification": classes, "ForTokenClassification": tags, "ForMaskedLM": masked}


def _all(prefix: str, config: Callable[[], Any], *tasks: str) -> list[zoo.Entry]:
    """A family's heads for text."""
    made = [head(f"{prefix}{task}", getattr(hf, prefix + task), config, _HEADS[task]) for task in tasks or _HEADS]
    name = f"{prefix}ForQuestionAnswering"
    return made if tasks else [*made, head(name, getattr(hf, name), config, spans, num_labels=2)]


_BERT = _encoder(hf.BertConfig)
_electra = _encoder(hf.ElectraConfig, embedding_size=16)
_SEQUENCES, _TAGS = "ForSequenceClassification", "ForTokenClassification"

_RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}

EXACT = [
    *_all("Bert", _BERT),
    head("Bert, several labels", hf.BertForSequenceClassification, _BERT, several),
    head("Bert, regression", hf.BertForSequenceClassification, _BERT, numbers, num_labels=1),
    head("Bert, sentence pairs", hf.BertForPreTraining, _BERT, pairs),
    head("Bert, multiple choice", hf.BertForMultipleChoice, _BERT, choices),
    head("DistilBert, multiple choice", hf.DistilBertForMultipleChoice, _distilbert, choices),
    *_all("Roberta", _encoder(hf.RobertaConfig)),
    *_all("DebertaV2", _deberta()),
    *_all("DistilBert", _distilbert),
    *_all("Electra", _electra),
    *_all("ModernBert", _modernbert()),
    *_all("GPT2", _gpt2, _SEQUENCES, _TAGS),
    head("GPT2, regression", hf.GPT2ForSequenceClassification, _gpt2, numbers, num_labels=1),
    *_all("Llama", _decoder(hf.LlamaConfig), _SEQUENCES, _TAGS),
    head("Llama, several labels", hf.LlamaForSequenceClassification, _decoder(hf.LlamaConfig), several),
    head("Llama, regression", hf.LlamaForSequenceClassification, _decoder(hf.LlamaConfig), numbers, num_labels=1),
    head("LlamaForQuestionAnswering", hf.LlamaForQuestionAnswering, _decoder(hf.LlamaConfig), spans),
    *_all("Qwen3", _decoder(hf.Qwen3Config), _SEQUENCES),
    head("T5, text to text", hf.T5ForConditionalGeneration, _t5, texts),
    head("T5, classes", hf.T5ForSequenceClassification, _t5, classes),
    head("T5, tags", hf.T5ForTokenClassification, _t5, tags),
    head("T5, answers", hf.T5ForQuestionAnswering, _t5, spans, num_labels=2),
    head("Bart, text to text", hf.BartForConditionalGeneration, _seq2seq(hf.BartConfig), texts),
    head("Bart, classes", hf.BartForSequenceClassification, _seq2seq(hf.BartConfig), classes),
    head("Bart, answers", hf.BartForQuestionAnswering, _seq2seq(hf.BartConfig), spans),
    head("M2M100", hf.M2M100ForConditionalGeneration, _seq2seq(hf.M2M100Config), texts),
    head("Whisper, sound to text", hf.WhisperForConditionalGeneration, _whisper, texts, sounds),
    head("Whisper, sounds", hf.WhisperForAudioClassification, _whisper, classes, sounds),
    head("ViT", hf.ViTForImageClassification, _vit, classes, pixels),
    head("Dinov2", hf.Dinov2ForImageClassification, _dinov2, classes, pixels),
    head("Siglip", hf.SiglipForImageClassification, _siglip, classes, pixels),
    head("DebertaV2, distances", hf.DebertaV2ForTokenClassification, _deberta(**_RELATIVE), tags),
    head("Llava", hf.LlavaForConditionalGeneration, _llava, following, image_and_text),
]

_ROWS = "first dimension is not the batch"

REFUSED = [
    (head("XLNet, tags", hf.XLNetForTokenClassification, _xlnet, tags), _ROWS),
    (head("Electra, masked selection", hf.ElectraForPreTraining, _electra, replaced), "a selection of tokens"),
    (
        head("ModernBert, masked selection", hf.ModernBertForMaskedLM, _modernbert(), masked, sparse_prediction=True),
        "a selection of tokens",
    ),
    (
        head("DebertaV2, own formula", hf.DebertaV2ForSequenceClassification, _deberta(), several),
        "computed its own loss",
    ),
    (head("GPT2, two heads", hf.GPT2DoubleHeadsModel, _gpt2, two_heads), "several rows per example"),
]
