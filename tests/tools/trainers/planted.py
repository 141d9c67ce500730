"""Methods for benchmark_steps.py that are wrong, fail, or die: ``tests.tools.trainers.planted:NAME``."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from torch import Tensor

from tools.benchmarks.cases import Shape, Step, ours


def unclipped(model: Any, shape: Shape) -> Step:
    """Plain gradients."""
    return ours(clipping="none")(model, shape)


def small_parameter(model: Any, shape: Shape) -> Step:
    """The gradient of one normalisation's weight 2 % too large: hardly anything of the whole."""
    step = ours(strategy="two_pass")(model, shape)

    def wrong(ids: Tensor) -> dict[str, Tensor]:
        found = step(ids)
        next(g for name, g in found.items() if "norm" in name or "ln_" in name).mul_(1.02)
        return found

    return wrong


def wrong_when_long(model: Any, shape: Shape) -> Step:
    """Right at the oracle's size, 0.1 % too large at the whole length."""
    step = ours(strategy="two_pass")(model, shape)

    def wrong(ids: Tensor) -> dict[str, Tensor]:
        factor = 1.001 if ids.shape[1] == shape.tokens else 1.0
        return {name: factor * g for name, g in step(ids).items()}

    return wrong


def raises(model: Any, shape: Shape) -> Step:
    """Refuses the model."""
    raise NotImplementedError("no rule for this\nand a second line")


def dies(model: Any, shape: Shape) -> Step:
    """As a process that the operating system kills."""
    os._exit(7)


def allocates(model: Any, shape: Shape) -> Step:
    """Asks for more than any machine has."""
    step = ours(strategy="two_pass")(model, shape)

    def out(ids: Tensor) -> dict[str, Tensor]:
        if ids.shape[1] == shape.tokens:
            torch.empty(1 << 50)
        return step(ids)

    return out


def sleeps(model: Any, shape: Shape) -> Step:
    """Takes for ever."""
    while True:
        time.sleep(1.0)
