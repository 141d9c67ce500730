"""What one engine does with a second moment that is corrected for the noise. ``engine_worker.py`` runs it."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

import dpft
from tests.engines.matrix_worker import Bench, Examples, plain_llama
from tests.oracle import trainable

NUMBER, STEPS = 7, 3
SIGMA, CLIP_NORM = 2.0, 0.5
ADAM: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1, "floor": 0.3}
PRIVACY = {"num_steps": STEPS, "noise_multiplier": SIGMA, "max_grad_norm": CLIP_NORM}


def whole(tensor: Any) -> Tensor:
    """All of a tensor that may be sharded. A collective."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone().float()


def weights(accelerator: Any, model: Any) -> dict[str, Tensor]:
    return {name: whole(p) for name, p in trainable(accelerator.unwrap_model(model)).items()}


def run(bench: Bench) -> None:
    """Each rank writes what it has seen."""
    found: Any
    try:
        found = corrected(bench)
    except dpft.EngineError as error:
        found = str(error)
    torch.save(found, bench.output / f"corrected_{os.environ.get('RANK', '0')}.pt")


def corrected(bench: Bench) -> dict[str, Any]:
    """Weights before and after the first release, and Adam's moments after it."""
    model = plain_llama()
    made: Any = bench.private(
        model, dpft.AdamWBC(model.parameters(), **ADAM), Examples(NUMBER), privacy=PRIVACY, max_physical_batch_size=2
    )
    accelerator, prepared, stepped, loader = made
    before = weights(accelerator, prepared)
    for batch in loader:
        accelerator.backward(prepared(**batch).loss)
        stepped.step()
        stepped.zero_grad()
        if loader.is_last:
            break
    loader.privacy.close()
    parameters = trainable(accelerator.unwrap_model(prepared))
    return {
        "before": before,
        "after": weights(accelerator, prepared),
        **{k: {n: whole(stepped.state[p][k]) for n, p in parameters.items()} for k in ("exp_avg", "exp_avg_sq")},
    }
