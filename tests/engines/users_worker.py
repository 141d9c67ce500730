"""What one engine does with a dataset of users, of whose rows each rank draws. ``engine_worker.py`` runs it."""

from __future__ import annotations

import json
import os
from typing import Any

import torch

import dpft
from tests.engines.matrix_worker import RATE, Bench, Examples, full_parameters
from tests.engines.models import plain_llama
from tests.oracle import trainable

OWNERS = [0, 1, 2, 1, 0, 3, 1, 4, 0, 1, 0, 3, 4, 0]  # 5, 4, 1, 2 and 2 rows
USERS, MOST, STEPS = 5, 2, 4


class Read(Examples):
    """Rows that note which of them are read."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.read: list[int] = []

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        self.read.append(i)
        return super().__getitem__(i)


def run(bench: Bench) -> None:
    """The rows that this rank has drawn in each step, and what the first one released."""
    rank = int(os.environ.get("RANK", "0"))
    model, rows = plain_llama(), Read(len(OWNERS))
    before = {n: p.detach().clone().float() for n, p in trainable(model).items()}
    made: Any = bench.private(
        model,
        torch.optim.SGD(model.parameters(), lr=RATE),
        dpft.by_user(rows, OWNERS, rows=MOST),  # type: ignore[arg-type]  # another dataset
        privacy={"num_steps": STEPS},
        max_physical_batch_size=3,  # an empty physical batch would read rows of the first user, with weight 0
    )
    accelerator, prepared, stepped, loader = made
    rows.read.clear()
    drawn, released = [], False
    for batch in loader:
        accelerator.backward(prepared(**batch).loss)
        stepped.step()
        stepped.zero_grad()
        if not loader.is_last:
            continue
        drawn.append(list(rows.read))
        rows.read.clear()
        if not released:
            after = full_parameters(accelerator, prepared)
            release = {n: (before[n] - after[n]) / RATE * USERS for n in before}
            torch.save(release, bench.output / f"users_{rank}.pt")
            released = True
    loader.privacy.close()
    (bench.output / f"users_{rank}.json").write_text(json.dumps(drawn))
