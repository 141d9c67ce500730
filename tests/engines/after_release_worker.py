"""What one engine does with an average of the weights, and with a second moment that is corrected for the noise.

``engine_worker.py`` runs it.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

import dpft
from tests.engines.matrix_worker import Bench, Examples, plain_llama
from tests.oracle import trainable

NUMBER, STEPS, DECAY = 7, 3, 0.15
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
    found: dict[str, Any] = {}
    for name, act in (("average", average), ("corrected", corrected)):
        try:
            found[name] = act(bench)
        except dpft.EngineError as error:
            found[name] = str(error)
    torch.save(found, bench.output / f"after_release_{os.environ.get('RANK', '0')}.pt")


def average(bench: Bench) -> dict[str, Any]:
    """Weights after each release, and the averaged ones, with the losses of both."""
    model = plain_llama()
    made: Any = bench.private(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        Examples(NUMBER),
        privacy=PRIVACY,
        max_physical_batch_size=2,
    )
    accelerator, prepared, stepped, loader = made
    try:
        ema = dpft.WeightEMA(accelerator, prepared, stepped, DECAY)
    except dpft.EngineError:
        loader.privacy.close()
        raise
    seen = [weights(accelerator, prepared)]
    for batch in loader:
        accelerator.backward(prepared(**batch).loss)
        stepped.step()
        stepped.zero_grad()
        if loader.is_last:
            seen.append(weights(accelerator, prepared))
    loader.privacy.close()
    batch = {name: value.to(accelerator.device) for name, value in Examples(NUMBER).batch.items()}

    @torch.no_grad()
    def loss() -> float:
        return float(prepared(**batch).loss)

    losses = [loss()]
    with ema.applied():
        losses.append(loss())
        applied = weights(accelerator, prepared)
        exported = {name: value.clone() for name, value in (accelerator.get_state_dict(prepared) or {}).items()}
    losses.append(loss())
    left, kept = weights(accelerator, prepared), ema.state_dict()
    other = {
        name: torch.full_like(a, 0.5) + torch.arange(a.numel()).view(a.shape) for name, a in kept["averages"].items()
    }
    ema.load_state_dict({"updates": 5, "averages": other})
    again = ema.state_dict()
    return {
        "seen": seen,
        "applied": applied,
        "exported": exported,
        "left": left,
        "losses": losses,
        "kept": kept,
        "loaded": again["updates"] == 5 and all(torch.equal(again["averages"][n], a) for n, a in other.items()),
    }


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
