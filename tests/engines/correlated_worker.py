"""A run with correlated noise under one engine, over two starts; ``engine_worker.py`` runs it.

    correlated_worker.py OUTPUT_FOLDER

run by itself is a third start, with another number of processes, of the runs in that folder.

The examples have no gradient and every start begins with weights of zero, so that these are what was released.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.engines.matrix_worker import CLIP, Bench, Examples, full_parameters
from tests.engines.models import plain_llama

BATCH, SIGMA, NUMBER = 3, 1.5, 9
STARTS = (3, 2, 2)  # the steps of each
STEPS = sum(STARTS)
_PLAN: dict[str, Any] = {
    **{"noise_multiplier": SIGMA, "expected_batch_size": BATCH, "num_steps": STEPS, "sample_rate": None},
    **{"max_grad_norm": CLIP, "target_delta": 1e-3},
}
MECHANISMS: dict[str, dict[str, Any]] = {
    "bandmf": {**_PLAN, "mechanism": "bandmf", "bands": 3, "sampler": "cyclic_poisson"},
    "blt": {**_PLAN, "mechanism": "blt", "buffers": 2, "sampler": "fixed_order"},
}


def start(
    bench: Bench, mechanism: str, number: int, title: str, build: Callable[[], torch.nn.Module] = plain_llama
) -> None:
    """One start of a run; rank r writes the weights after each step into ``correlated_TITLE_START_r.pt``."""
    model, examples = build(), Examples(NUMBER)
    examples.batch["labels"] = torch.full_like(examples.batch["labels"], -100)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    accelerator, prepared, optimizer, loader = bench.private(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        examples,
        privacy=MECHANISMS[mechanism],
        max_physical_batch_size=2,
        ledger_path=bench.output / f"correlated_{title}.jsonl",
        continue_ledger=number > 0,
    )
    rows: list[dict[str, torch.Tensor]] = []
    for batch in loader:
        accelerator.backward(prepared(**batch).loss)
        optimizer.step()
        last = loader.is_last
        optimizer.zero_grad()
        if last:
            rows.append(full_parameters(accelerator, prepared))
            if len(rows) == STARTS[number]:
                break
    loader.privacy.close()
    torch.save(rows, bench.output / f"correlated_{title}_{number}_{os.environ.get('RANK', '0')}.pt")


def run(bench: Bench) -> None:
    """The first two starts of each run."""
    for mechanism in MECHANISMS:
        for number in range(2):
            start(bench, mechanism, number, mechanism)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not bench.hybrid:
        bench.offload = True
        for number in range(2):
            start(bench, "bandmf", number, "offloaded")
        bench.offload = False


if __name__ == "__main__":
    folder = Bench(Path(sys.argv[1]))
    for kind in MECHANISMS:
        start(folder, kind, 2, kind)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
