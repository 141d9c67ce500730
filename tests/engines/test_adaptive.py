"""Under every engine the clip norm follows the count of all ranks, and every rank clips to it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from tests.engines.adaptive_worker import NUMBER, SETTINGS, STEPS
from tests.engines.launching import launch, succeed
from tests.engines.matrix_worker import Examples, plain_llama
from tests.oracle import oracle, trainable

pytestmark = pytest.mark.slow


def expected() -> list[float]:
    """C of each release and after the last, by the oracle and SGD in float64."""
    model, norms = plain_llama().double(), [float(SETTINGS["max_grad_norm"])]
    for _ in range(STEPS):
        exact = oracle(model, Examples(NUMBER).batch)
        total = exact.clipped_sum(norms[-1])
        with torch.no_grad():
            for name, p in trainable(model).items():
                p -= total[name] / NUMBER
        fraction = float((exact.norms <= norms[-1]).double().mean())
        norms.append(norms[-1] * math.exp(-(fraction - 0.6)))
    return norms


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3"])
def test_every_rank_has_the_norm_of_all_examples(engine: str, tmp_path: Path) -> None:
    succeed(launch(engine, Path(__file__).with_name("adaptive_worker.py"), str(tmp_path), scratch=tmp_path))
    ranks = [json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(2)]
    norms = expected()
    assert len(set(norms)) > 2
    assert ranks[0]["clip_norm"] == ranks[1]["clip_norm"] == pytest.approx(norms[-1], rel=1e-6)
    assert ranks[0]["physical"] == ranks[1]["physical"] and max(ranks[0]["physical"]) > 1
    ledger = (tmp_path / "ledger_1.jsonl").read_text().splitlines()
    written = [json.loads(line)["next_clip_norm"] for line in ledger if '"release"' in line]
    assert written == pytest.approx(norms[1:], rel=1e-6)
