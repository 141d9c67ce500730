"""Each warning of a run comes in its case, once, and none in a healthy run."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from finetune.loop import WeightWatch
from finetune.watch import PATIENCE, Finding, RunWatch

STEPS = 30


def healthy(step: int) -> dict[str, Any]:
    """Losses that fall, and differ from step to step by 0.4."""
    return {
        "step": step,
        "loss": 4.0 - 0.01 * step + 0.2 * (-1) ** step,
        "clipped_share": 0.6,
        "median_norm": 1.1,
        "learning_rate": 1e-3,
        "unchanged_share": 0.1,
    }


def found(changes: Any = lambda step: {}, steps: int = STEPS) -> list[tuple[int, Finding]]:
    """The warnings with their steps."""
    watch = RunWatch(max_grad_norm=1.0, learning_rate=1e-3)
    rows = [healthy(step) | changes(step) for step in range(1, steps + 1)]
    return [(row["step"], finding) for row in rows for finding in watch.look(row)]


@pytest.mark.parametrize(
    "changes",
    [
        lambda step: {},
        lambda step: {"validation_loss": 3.0},
        lambda step: {"loss": None, "clipped_share": None, "median_norm": None},  # empty batches
        lambda step: {"clipped_share": 1.0 if step % PATIENCE else 0.9},
        lambda step: {"clipped_share": 0.0 if step % PATIENCE else 0.1},
        lambda step: {"unchanged_share": 0.9 if step % PATIENCE else 0.1},
        lambda step: {"learning_rate": 0.0 if step in (1, STEPS) else 1e-3},  # a warm-up; the end of a schedule
        lambda step: {"learning_rate": 0.0 if step == 1 else 1e-3, "unchanged_share": 1.0 if step == 1 else 0.0},
        lambda step: {"loss": 4.0 + 0.2 * (-1) ** step},  # no progress, and no rise
        lambda step: {"loss": 4.0 + 0.005 * step + 0.2 * (-1) ** step},  # within its spread
    ],
)
def test_nothing_is_said_of_a_healthy_run(changes: Any) -> None:
    assert found(changes) == []


@pytest.mark.parametrize(
    ("changes", "step", "words", "of_records"),
    [
        (lambda step: {"clipped_share": 0.995}, 10, r"median norm 1\.1, C 1\)\. No fault", True),
        (lambda step: {"clipped_share": 0.0}, 10, r"median norm 1\.1, C 1\): the noise", True),
        (lambda step: {"clipped_share": None if step % 2 else 1.0}, 20, "No fault", True),  # some batches are empty
        (lambda step: {"unchanged_share": 0.51}, 10, "bfloat16", False),
        (lambda step: {"learning_rate": 0.0, "unchanged_share": 1.0}, 2, "learning rate is 0", False),
        (lambda step: {"learning_rate": 0.0 if step > 20 else 1e-3}, 22, "the schedule ends", False),
        (lambda step: {"loss": math.nan if step == 7 else 4.0}, 7, "loss of step 7 is nan", True),
        (lambda step: {"loss": math.inf if step > 7 else 4.0}, 8, "loss of step 8 is inf", True),
        (lambda step: {"validation_loss": math.nan} if step == 5 else {}, 5, "validation_loss of step 5", True),
        (lambda step: {"loss": 4.0 + 0.2 * step}, 12, "mean of the last third of 12 steps", True),
        (lambda step: {"loss": 4.0 + max(0, step - 15) + 0.1 * (-1) ** step}, 16, "the loss rises", True),
    ],
)
def test_each_warning_comes_once_in_its_case(changes: Any, step: int, words: str, of_records: bool) -> None:
    ((when, finding),) = found(changes)
    assert when == step and finding.of_records == of_records
    assert "\n" not in finding.words
    assert str(finding) == ("note: " if "No fault" in words else "warning: ") + finding.words
    assert re.search(words, finding.words)
    assert finding.row(3) == {"step": 3, "warning": finding.words, "not_for_publication": of_records}


def test_the_share_of_weights_that_an_update_leaves() -> None:
    """In bfloat16 an update below 2^-9 of a weight is lost; the next comparison is with the weights as they are."""
    model = torch.nn.Linear(100, 4, dtype=torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.bias.fill_(1.0)
    watch = WeightWatch(model, elements=1000)
    with torch.no_grad():
        model.weight[:2] += 0.9 * 2**-9
        model.weight[2:] += 0.1
    assert watch.unchanged() == pytest.approx((200 + 4) / 404)
    assert watch.unchanged() == 1.0
    model.weight.data = model.weight.data[:2]  # as a shard
    assert watch.unchanged() == pytest.approx(4 / 404)
