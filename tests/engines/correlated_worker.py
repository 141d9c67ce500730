"""A training with correlated noise under DDP, on each rank; ``test_correlated.py`` launches it, twice for each run.

    correlated_worker.py FOLDER MECHANISM STEPS

Writes what was released in these steps, times the divisor, as ``FOLDER/MECHANISM-RANK-FIRST.npy``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState

import dpft
from tests import zoo
from tests.engines.on_cpu import make_accelerator

STEPS, BATCH = 7, 3
MECHANISMS: dict[str, Any] = {
    "bandmf": {"mechanism": "bandmf", "bands": 3, "sampler": "cyclic_poisson"},
    "blt": {"mechanism": "blt", "buffers": 2, "sampler": "fixed_order"},
}


def privacy(mechanism: str) -> dpft.PrivacyConfig:
    """sigma = 1, C = 1."""
    return dpft.PrivacyConfig(
        noise_multiplier=1.0, target_delta=1e-3, num_steps=STEPS, expected_batch_size=BATCH, **MECHANISMS[mechanism]
    )


class Silent:
    """Nine examples without a gradient."""

    def __init__(self) -> None:
        self.batch = zoo.token_batch(9, 5)
        self.batch["labels"] = torch.full_like(self.batch["labels"], -100)

    def __len__(self) -> int:
        return 9

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {name: value[i] for name, value in self.batch.items()}


def main(folder: Path, mechanism: str, steps: int) -> None:
    """Some steps of a run, new or resumed."""
    accelerator = make_accelerator()
    model = zoo.seeded(lambda attention: zoo.llama(attention, num_hidden_layers=1))("sdpa")
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    ledger = folder / f"{mechanism}.jsonl"
    model, optimizer, loader = dpft.prepare(
        accelerator,
        model,
        inner,
        Silent(),
        privacy(mechanism),
        max_physical_batch_size=2,
        ledger_path=ledger,
        continue_ledger=ledger.exists(),
    )
    first, rows = loader.privacy.steps, []
    for batch in loader:
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        if loader.is_last:
            parts = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            rows.append(torch.cat(parts).double().numpy() * BATCH)
            if len(rows) == steps:
                break
        optimizer.zero_grad()
    np.save(folder / f"{mechanism}-{accelerator.process_index}-{first}.npy", np.array(rows))
    AcceleratorState._reset_state()  # for the next training in the same process group
    GradientState._reset_state()


if __name__ == "__main__":
    for name in sys.argv[2].split(","):
        main(Path(sys.argv[1]), name, int(sys.argv[3]))
    dist.destroy_process_group()
