"""Chooses the strategy of a batch from its shape, dtype and memory, with a reason in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import psutil
import torch

from dpft.kernels.linear import choose_method, method_flops
from dpft.rules.base import EmbeddingUse, LinearUse, MatrixUse
from dpft.rules.experts import ExpertsUse
from dpft.rules.head import HeadUse

Strategy = Literal["one_pass", "two_pass", "per_example"]

# Fraction of the free memory, when a shape is first seen, that one-pass may use for the tensors it keeps.
FREE_MEMORY_SHARE = 0.5

__all__ = [
    "Choice",
    "Strategy",
    "UseDetail",
    "allowance",
    "choose_for_all",
    "choose_method",
    "choose_strategy",
    "describe_uses",
    "free_memory",
    "gradient_bytes",
    "kept_bytes",
    "use_details",
]


@dataclass(frozen=True)
class Choice:
    """A strategy, and the reason for it as text with figures."""

    strategy: Strategy
    reason: str


def kept_bytes(uses: Iterable[MatrixUse], batch_size: int, seq_len: int, itemsize: int) -> int:
    """Bytes that one-pass keeps for a batch: per matrix the smaller of ``[B, d, p]`` and the pair ``(x, g)``."""
    total = 0
    for use in uses:
        gradient = batch_size * use.grad_numel() * itemsize
        head = use.kept_bytes(batch_size, seq_len, itemsize) if isinstance(use, HeadUse) else None
        if head is not None:
            total += head
        elif isinstance(use, LinearUse):
            pair = batch_size * seq_len * (use.in_features + use.out_features) * itemsize
            total += gradient if batch_size == 1 else min(gradient, pair)
        elif isinstance(use, ExpertsUse):
            pair = batch_size * seq_len * use.slots * (use.in_features + use.out_features) * itemsize
            total += gradient if batch_size == 1 else min(gradient, pair)
        elif isinstance(use, EmbeddingUse):
            total += min(gradient, batch_size * seq_len * (use.dim * itemsize + 8))
    return total


@dataclass(frozen=True)
class UseDetail:
    """How one strategy treats one trainable matrix, for one physical batch.

    Attributes:
        key: full name of the weight.
        shape: what it is, as text.
        method: how its per-example norms are taken.
        flops: of those norms beyond a plain step; 0 if they are computed from the gradient itself.
        kept: bytes that one-pass keeps for it; 0 under two-pass.
    """

    key: str
    shape: str
    method: str
    flops: int
    kept: int


def use_details(
    uses: Iterable[MatrixUse], strategy: Strategy, batch_size: int, seq_len: int, itemsize: int
) -> list[UseDetail]:
    """What ``strategy`` does with each matrix; see :func:`kept_bytes` and :func:`choose_method` for the arguments."""
    found = []
    for use in uses:
        kept = kept_bytes([use], batch_size, seq_len, itemsize) if strategy == "one_pass" else 0
        if isinstance(use, LinearUse):
            d, p = use.out_features, use.in_features
            pair = batch_size * seq_len * (p + d)
            materialised = strategy == "one_pass" and (batch_size == 1 or batch_size * p * d <= pair)
            if isinstance(use, HeadUse) and use.kept_bytes(batch_size, seq_len, itemsize) is not None:
                found.append(UseDetail(use.key, f"head {p} -> {d}", "materialise, with the loss in chunks", 0, kept))
                continue
            if materialised or strategy == "per_example":
                found.append(UseDetail(use.key, f"linear {p} -> {d}", "materialise", 0, kept))
                continue
            method = choose_method(seq_len, p, d)
            flops = batch_size * method_flops(method, seq_len, p, d)
            found.append(UseDetail(use.key, f"linear {p} -> {d}", method, flops, kept))
        elif isinstance(use, ExpertsUse):
            d, p = use.out_features, use.in_features
            shape = f"{use.experts} experts {p} -> {d}"
            gradient = batch_size * use.grad_numel() * itemsize
            if strategy == "per_example" or (strategy == "one_pass" and kept == gradient):
                found.append(UseDetail(use.key, shape, "materialise", 0, kept))
                continue
            tokens = -(-seq_len * use.slots // use.experts)  # of an expert, if all get as many
            method = choose_method(tokens, p, d)
            flops = batch_size * use.experts * method_flops(method, tokens, p, d)
            found.append(UseDetail(use.key, shape, method, flops, kept))
        elif isinstance(use, EmbeddingUse):
            # Additions without products, which a count of FLOPs leaves out.
            how = "materialise" if strategy == "per_example" else "segment sums"
            shape = f"embedding {use.num_embeddings} x {use.dim}"
            found.append(UseDetail(use.key, shape, how, 0, kept))
    return found


def describe_uses(
    uses: Iterable[MatrixUse], strategy: Strategy, batch_size: int, seq_len: int, itemsize: int
) -> list[str]:
    """One line per kind of matrix: how its norm is computed, and what one-pass keeps for it."""
    kinds: Counter[str] = Counter()
    for detail in use_details(uses, strategy, batch_size, seq_len, itemsize):
        kept = f", keeps {detail.kept / 2**20:.2f} MiB" if strategy == "one_pass" else ""
        kinds[f"{detail.shape}: {detail.method}{kept}"] += 1
    return [f"{count} x {text}" for text, count in kinds.items()]


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on ``device``."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free) + int(cached)
    return int(psutil.virtual_memory().available)


def allowance(memory: int | None, device: torch.device) -> int:
    """Bytes that one-pass may keep: ``memory``, or a fraction of what ``device`` has free."""
    return int(FREE_MEMORY_SHARE * free_memory(device)) if memory is None else memory


def gradient_bytes(uses: Iterable[MatrixUse], itemsize: int) -> int:
    """Bytes of one gradient of the matrices, shared ones counted once."""
    return sum({use.key: use.grad_numel() for use in uses}.values()) * itemsize


def choose_strategy(
    uses: Iterable[MatrixUse],
    batch_size: int,
    seq_len: int,
    itemsize: int,
    memory: int | None,
    device: torch.device,
    sums_elsewhere: bool = False,
) -> Choice:
    """One-pass if the tensors it keeps fit, else two-pass.

    One-pass takes the FLOPs of a plain step (1.00 x); two-pass takes 1.67 x and keeps nothing.

    Args:
        uses: the model's trainable matrices.
        batch_size: B of the physical batch.
        seq_len: T.
        itemsize: bytes per element of activations.
        memory: bytes that one-pass may keep beyond one gradient; None depends on what ``device`` has free.
        device: of the model.
        sums_elsewhere: the sums are in host memory, so that the device has no other gradient than the kept ones.
    """
    uses = list(uses)
    gradient = 0 if sums_elsewhere else gradient_bytes(uses, itemsize)
    extra = max(0, kept_bytes(uses, batch_size, seq_len, itemsize) - gradient)
    allowed = allowance(memory, device)
    beyond = "" if sums_elsewhere else f" beyond one gradient of {gradient / 2**20:.1f} MiB"
    numbers = (
        f"B={batch_size}, T={seq_len}: one-pass keeps {extra / 2**20:.1f} MiB{beyond}; "
        f"{allowed / 2**20:.1f} MiB allowed"
    )
    if extra <= allowed:
        return Choice("one_pass", f"one_pass: 1.00 x the FLOPs of a plain step. {numbers}")
    return Choice("two_pass", f"two_pass: 1.67 x the FLOPs of a plain step, nothing kept. {numbers}")


def choose_for_all(
    uses: Iterable[MatrixUse], max_batch_size: int, itemsize: int, allowed: int, shards_gradients: bool, gathers: bool
) -> Choice:
    """The strategy of every batch of a run on several ranks, whose batches have different lengths.

    Ranks with different strategies would wait for each other's collectives for ever, so one is chosen for all, by a
    bound that holds for any length: one-pass keeps for a matrix at most its per-example gradients.

    Args:
        uses: the model's trainable matrices.
        max_batch_size: rows of the largest physical batch.
        itemsize: bytes per element of activations.
        allowed: bytes that one-pass may keep, the minimum over all ranks.
        shards_gradients: whether plain training under this engine never holds a whole gradient.
        gathers: whether each traversal of the graph gathers the parameters again.
    """
    uses = list(uses)
    gradient = gradient_bytes(uses, itemsize)
    extra = gradient * (max_batch_size - (0 if shards_gradients else 1))
    # A chunked head's per-example gradients are float32, whatever the model's dtype.
    wider = max(0, 4 - itemsize)
    extra += max_batch_size * sum(use.grad_numel() * wider for use in uses if isinstance(use, HeadUse))
    numbers = (
        f"physical batches of at most {max_batch_size}: one-pass keeps at most {extra / 2**20:.1f} MiB more than "
        f"plain training under this engine holds (a whole gradient is {gradient / 2**20:.1f} MiB); "
        f"{allowed / 2**20:.1f} MiB allowed on every rank"
    )
    if extra <= allowed:
        return Choice("one_pass", f"one_pass: 1.00 x the FLOPs of a plain step. {numbers}")
    again = ", the parameters gathered once more" if gathers else ""
    return Choice("two_pass", f"two_pass: 1.67 x the FLOPs of a plain step, nothing kept{again}. {numbers}")
