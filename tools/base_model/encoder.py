"""The recipes' small public encoder: a BERT, trained by masked tokens on the same text as the Llama."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from tools.base_model.card import encoder_card
from tools.base_model.text import MASK
from tools.base_model.training import Task, windows_of

SHARE_MASKED = 0.15


def masked(ids: Tensor, mask_id: int, vocabulary: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """BERT's task: inputs ``[B, T]`` in which some tokens are hidden, and labels ``[B, T]``, -100 elsewhere.

    Of the 15 % that are to be predicted, 8 in 10 become the mask, 1 in 10 a random token (Devlin et al. 2019).
    """
    draw = torch.rand(ids.shape, generator=generator)
    chosen = draw < SHARE_MASKED
    labels = ids.masked_fill(~chosen, -100)
    inputs = ids.masked_fill(draw < 0.8 * SHARE_MASKED, mask_id)
    other = torch.randint(4, vocabulary, ids.shape, generator=generator)
    return torch.where((draw >= 0.8 * SHARE_MASKED) & (draw < 0.9 * SHARE_MASKED), other, inputs), labels


@torch.no_grad()
def _masked_loss(model: Any, tokenizer: PreTrainedTokenizerFast, stream: Tensor, seq_len: int) -> float:
    """Mean loss in nats a hidden token, over a stream cut into windows; the same tokens are hidden every time."""
    model.eval()
    windows = windows_of(stream, seq_len)
    inputs, labels = masked(windows, tokenizer.mask_token_id, len(tokenizer), torch.Generator().manual_seed(7))
    pairs = zip(inputs.split(16), labels.split(16), strict=True)
    total = sum(float(model(input_ids=i, labels=t).loss) * len(i) for i, t in pairs)
    model.train()
    return total / len(windows)


def _bert(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> BertForMaskedLM:
    return BertForMaskedLM(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.hidden,
            intermediate_size=args.intermediate,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            max_position_embeddings=256,
            type_vocab_size=1,
            pad_token_id=tokenizer.pad_token_id,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def _hidden(windows: Tensor, tokenizer: PreTrainedTokenizerFast, generator: torch.Generator) -> dict[str, Tensor]:
    inputs, labels = masked(windows, tokenizer.mask_token_id, len(tokenizer), generator)
    return {"input_ids": inputs, "labels": labels}


ENCODER = Task(
    special=MASK,
    build=_bert,
    batch=_hidden,
    loss=_masked_loss,
    of="hidden token",
    second_beta=0.98,
    card=encoder_card,
)
