"""What is audited: a small GPT-2 with tied embeddings, random records, and a private training of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import dpft
from dpft.audit import WhiteBoxAudit, white_box

VOCABULARY, TOKENS, OTHERS, EXAMPLES = 96, 12, 3, 160
PHYSICAL = 6  # three physical batches for a logical one, the last of them padded


def model() -> nn.Module:
    """One layer, always the same weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        size = {"vocab_size": VOCABULARY, "n_embd": 24, "n_layer": 1, "n_head": 2, "n_positions": TOKENS}
        return GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0))


def records(seed: int) -> list[dict[str, Tensor]]:
    """Random: one token again and again, and then a few others.

    In such a record the two gradients of a tied embedding point in the same direction, and their cross term is a
    quarter of the squared norm. In records of independent tokens it averages out, and a mechanism that forgets it
    would not be noticed.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (EXAMPLES, TOKENS), generator=generator)
    ids[:, : TOKENS - OTHERS] = ids[:, :1]
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows of one length."""
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def accelerator() -> Any:
    """On the CPU."""
    from accelerate import Accelerator

    return Accelerator(cpu=True)


def configuration(noise_multiplier: float = 1.0) -> dpft.PrivacyConfig:
    """q = 0.1, C below the norms of all gradients."""
    return dpft.PrivacyConfig(
        target_delta=1e-5,
        expected_batch_size=EXAMPLES // 10,
        noise_multiplier=noise_multiplier,
        num_steps=1,
        max_grad_norm=0.5,
    )


def audited(steps: int, canaries: int, seed: int, privacy: dpft.PrivacyConfig | None = None) -> WhiteBoxAudit:
    """One audit of dpft as it is at this moment."""
    return white_box(
        accelerator,
        model(),
        records(seed),
        configuration() if privacy is None else privacy,
        collate_fn=collate,
        steps=steps,
        canaries=canaries,
        seed=seed,
        max_physical_batch_size=PHYSICAL,
        static_shapes=True,
    )
