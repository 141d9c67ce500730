"""A tiny training with its sums and its optimiser in host memory, which the tests of `sums_device` share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpft.engines.host import HostOptimizer
from tests import zoo
from tests.training import Training

CLIP, STEPS = 0.5, 5
ADAM: dict[str, Any] = {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1}
QUIET: dict[str, Any] = {"noise_multiplier": 0, "max_grad_norm": CLIP, "num_steps": STEPS}


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, **ADAM)


def on_host(path: Path, **options: Any) -> Training:
    """AdamW on the host, if nothing else is given."""
    return Training(path, **{"sums_device": "cpu", "make": adamw, **options})


def host(training: Training) -> HostOptimizer:
    """The private optimiser inside of Accelerate's."""
    found = training.optimizer.optimizer
    assert isinstance(found, HostOptimizer)
    return found


def masters(training: Training) -> list[Tensor]:
    """In the order of the optimiser's groups."""
    return [p.detach() for group in training.inner.param_groups for p in group["params"]]


def one_layer(build: Callable[..., nn.Module], **more: Any) -> nn.Module:
    return zoo.seeded(lambda attention: build(attention, **more))()
