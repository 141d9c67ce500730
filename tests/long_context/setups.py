"""What the tests of long contexts share: small tiles, and an offload that really copies, on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dpft.long_context.blocks import Block
from dpft.long_context.install import install
from dpft.long_context.offload import HostCopies, Offloader
from dpft.wrap import LONG_CONTEXT
from tests import zoo

TILE = 4  # the batches of the tests have 9 tokens: two whole tiles and a rest
QWEN3_MOE = zoo.Entry("qwen3-moe", zoo.seeded(zoo.qwen3_moe), zoo.token_batch)
MODELS = (zoo.LLAMA, zoo.LLAMA_TIED, QWEN3_MOE, zoo.GPT2, zoo.GEMMA3, zoo.BERT, zoo.LORA)


def long(model: nn.Module, tile: Any = TILE) -> nn.Module:
    """The model with small tiles, and with all inputs of checkpoints copied."""
    return install(model, tile, Offloader(HostCopies, least_bytes=0))


def blocks_of(model: nn.Module) -> list[Block]:
    """Those that run in tiles."""
    found: list[Block] = model.__dict__[LONG_CONTEXT].blocks
    return found


def gradients(model: nn.Module, losses: Tensor) -> dict[str, Tensor]:
    """Of the sum of the losses, by plain training."""
    model.zero_grad(set_to_none=True)
    losses.sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def without_checkpoints(model: nn.Module) -> nn.Module:
    """The same with checkpointing off, where a test only looks at attention."""
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False
    return model


def tokens(examples: int, length: int, vocab: int = zoo.VOCAB, seed: int = 0) -> Tensor:
    """Random tokens ``[B, T]``."""
    return torch.randint(3, vocab, (examples, length), generator=torch.Generator().manual_seed(seed))
