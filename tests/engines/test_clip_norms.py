"""Under every engine the clip norm follows the count of all ranks, and groups of parameters are clipped apart."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.clipping.test_clip_groups import clipped_apart
from tests.engines.clip_norms_worker import ADAPTIVE, GROUPS, NUMBER, STEPS
from tests.engines.launching import ENGINES
from tests.engines.matrix_worker import Examples
from tests.engines.models import MODELS, plain_llama
from tests.oracle import Grads, oracle, relative_error, trainable

pytestmark = pytest.mark.slow


@cache
def norms() -> list[float]:
    """C of each release and after the last, by the oracle and SGD in float64."""
    model, found = plain_llama().double(), [float(ADAPTIVE["max_grad_norm"])]
    for _ in range(STEPS):
        exact = oracle(model, Examples(NUMBER).batch)
        total = exact.clipped_sum(found[-1])
        with torch.no_grad():
            for name, p in trainable(model).items():
                p -= total[name] / NUMBER
        below = float((exact.norms <= found[-1]).double().mean())
        found.append(found[-1] * math.exp(-(below - ADAPTIVE["adaptive_clip"].quantile)))
    return found


@cache
def groups_of(name: str) -> Grads:
    exact = oracle(MODELS[name](), Examples(NUMBER).batch)
    return clipped_apart(exact, GROUPS["clip_groups"], GROUPS["max_grad_norm"])


@pytest.mark.parametrize("engine", ENGINES)
def test_clip_norms(engine: str, launched: Callable[[str], Path]) -> None:
    output = launched(engine)
    ranks = [json.loads(path.read_text()) for path in sorted(output.glob("clip_norms_*.json"))]
    assert len(ranks) == (1 if engine == "single" else 2) and len(set(norms())) > 2
    for rank, found in enumerate(ranks):
        assert found["clip_norm"] == ranks[0]["clip_norm"] == pytest.approx(norms()[-1], rel=1e-6)
        assert found["physical"] == ranks[0]["physical"] and min(found["physical"]) > 1
        for name in ("tied", "gpt2"):
            release = torch.load(output / f"groups_{name}_{rank}.pt")
            assert relative_error(release, groups_of(name)) <= 1e-5
    lines = Path(ranks[0]["ledger"]).read_text().splitlines()
    written = [json.loads(line)["next_clip_norm"] for line in lines if '"release"' in line]
    assert written == pytest.approx(norms()[1:], rel=1e-6)
