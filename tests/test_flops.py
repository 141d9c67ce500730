"""FLOPs of a private step, against plain training of the same model on the same batch, by PyTorch's own counter."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dpft
from tests.test_memory import LONG as TOKENS
from tests.test_memory import VOCAB, model_of

LAYERS = 4


@functools.cache
def flops(strategy: str, checkpointing: bool, examples: int = 1, clipping: str = "flash") -> int:
    """FLOPs of a forward and a backward."""
    model = model_of(checkpointing, LAYERS)
    if strategy != "plain":
        dpft.wrap(model, strategy=strategy, clipping=clipping)
    ids = torch.randint(0, VOCAB, (examples, TOKENS), generator=torch.Generator().manual_seed(1))
    warm = ids[:, :8]
    for _ in range(2):  # the isolation checks; backward 3 has none
        model(input_ids=warm, labels=warm).loss.backward()
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    return counter.get_total_flops()


def test_plain_step_is_what_theory_says() -> None:
    """2 FLOPs per multiply-add, forward and twice that backward: the counter sees every product."""
    linear = sum(m.weight.numel() for m in model_of(False, LAYERS).modules() if isinstance(m, torch.nn.Linear))
    assert 1.0 <= flops("plain", False) / (6 * linear * TOKENS) < 1.5  # the rest is attention


@pytest.mark.parametrize(
    ("strategy", "checkpointing", "allowed"),
    [("one_pass", False, 1.001), ("one_pass", True, 1.001), ("two_pass", False, 1.55), ("two_pass", True, 1.62)],
)
def test_against_plain_training(strategy: str, checkpointing: bool, allowed: float) -> None:
    ratio = flops(strategy, checkpointing) / flops("plain", checkpointing)
    assert 0.99 < ratio <= allowed, f"{ratio:.3f} x"


def test_per_example_costs_no_more_than_plain() -> None:
    """One forward and one backward of each example."""
    ratio = flops("per_example", False, 2) / flops("plain", False, 2)
    assert ratio <= 1.01, f"{ratio:.3f} x"


def test_ghost_baseline_really_builds_the_gram() -> None:
    """A baseline that is quietly faster than what it stands for would flatter nobody: T^2 (p + d) per layer."""
    assert flops("two_pass", False, 1, "ghost") > 1.2 * flops("two_pass", False)
