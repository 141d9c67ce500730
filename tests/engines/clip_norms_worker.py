"""What one engine does with a clip norm that adapts, and with clip groups. ``engine_worker.py`` runs it."""

from __future__ import annotations

import json
import os
from typing import Any

import torch

import dpft
from tests.engines.matrix_worker import RATE, Bench, Examples, full_parameters
from tests.engines.models import MODELS, plain_llama
from tests.oracle import trainable

NUMBER, STEPS = 7, 3
ADAPTIVE: dict[str, Any] = {
    "adaptive_clip": dpft.AdaptiveClip(count_noise=1e-9, learning_rate=1.0, quantile=0.6),
    "num_steps": STEPS,
    "max_grad_norm": 0.2,
}
GROUPS: dict[str, Any] = {"clip_groups": "layer", "max_grad_norm": 0.5}


def run(bench: Bench) -> None:
    """Each rank writes what it has seen; the parameters are the same on all."""
    model = plain_llama()
    made = bench.private(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        Examples(NUMBER),
        privacy=ADAPTIVE,
        max_physical_batch_size=2,
    )
    physical = bench.train(*made)
    found: dict[str, Any] = {
        "clip_norm": made[3].privacy.clip_norm,
        "physical": physical,
        "ledger": str(made[3].privacy.ledger.path),
    }
    for name in ("tied", "gpt2"):
        model = MODELS[name]()
        before = {n: p.detach().clone().float() for n, p in trainable(model).items()}
        made = bench.private(
            model,
            torch.optim.SGD(model.parameters(), lr=RATE),
            Examples(NUMBER),
            privacy=GROUPS,
            max_physical_batch_size=2,
        )
        bench.train(*made)
        after = full_parameters(made[0], made[1])
        release = {n: (before[n] - after[n]) / RATE * NUMBER for n in before}
        torch.save(release, bench.output / f"groups_{name}_{os.environ.get('RANK', '0')}.pt")
    (bench.output / f"clip_norms_{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))
