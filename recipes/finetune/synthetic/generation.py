"""Texts of a causal language model for given headers, in batches, each rank its share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import GenerationConfig, PreTrainedTokenizerBase

from accelerate import Accelerator
from finetune.materials import pad_token


@dataclass(frozen=True)
class Sampling:
    """How texts are drawn.

    Attributes:
        temperature: of the softmax, above 0.
        top_p: the likeliest tokens that have this probability together are drawn from; 1: all.
        max_new_tokens: of a text, at most.
        batch_size: texts at once.
        seed: public; the texts follow from it, whatever the number of ranks.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 128
    batch_size: int = 64
    seed: int = 0


@dataclass(frozen=True)
class Generated:
    """One text.

    Attributes:
        position: of its header.
        text: what follows the header.
        ended: whether the model ended it; else it was cut at ``max_new_tokens``.
    """

    position: int
    text: str
    ended: bool


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    headers: Sequence[str],
    sampling: Sampling,
    rank: int = 0,
    ranks: int = 1,
) -> list[Generated]:
    """This rank's share of the texts: every ``ranks``-th batch.

    Each batch is drawn from a seed of its own, so that a text does not depend on the rank that draws it. The global
    random state is left as it was.

    Args:
        model: a bare causal language model, on this rank's device.
        tokenizer: its tokenizer.
        headers: one for each text.
        sampling: how.
        rank: of this process.
        ranks: that share the batches.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    pad = pad_token(tokenizer)
    ends = {tokenizer.eos_token_id}
    # in the place of the model's own settings, some of which (a penalty of repetition ...) the card would not name
    own, model.generation_config = (
        model.generation_config,
        GenerationConfig(
            do_sample=True,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=0,
            max_new_tokens=sampling.max_new_tokens,
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
            use_cache=True,
        ),
    )
    found = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for number, start in enumerate(range(0, len(headers), sampling.batch_size)):
            if number % ranks != rank:
                continue
            rows = [tokenizer(header)["input_ids"] for header in headers[start : start + sampling.batch_size]]
            length = max(map(len, rows))
            # padded on the left: what is generated follows the header at once
            ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows], device=device)
            mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
            torch.manual_seed(sampling.seed * 1_000_003 + number)
            drawn = model.generate(input_ids=ids, attention_mask=mask)
            for i, row in enumerate(drawn[:, length:].tolist()):
                text = tokenizer.decode(row, skip_special_tokens=True)
                found.append(Generated(start + i, text, bool(ends & set(row))))
    model.generation_config = own
    model.train(was_training)
    return found


def gathered(accelerator: Accelerator, share: list[Generated]) -> list[Generated]:
    """All ranks' texts, in the order of the headers, on every rank. A collective."""
    return sorted(gather_object(share), key=lambda text: text.position)
