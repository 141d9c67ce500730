"""Under every engine: batches of balls and bins are one process's, and secure noise has the deviation of one process.

That the values of secure noise have the law of the others is judged in ``test_matrix.py``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dpft.noise import GaussianNoise
from dpft.privacy.samplers.sampler import BallsAndBinsSampler
from tests.engines.launching import ENGINES
from tests.engines.matrix_worker import ADAM, CLIP, Examples
from tests.engines.mechanisms_worker import BINS, NUMBER, SEED
from tests.engines.models import plain_llama
from tests.engines.test_matrix import flat
from tests.oracle import oracle, rows, trainable

pytestmark = pytest.mark.slow


@cache
def of_one_process() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters before and after, by the oracle and Adam in float64, one logical batch after another."""
    model = plain_llama().double()
    before = {n: p.detach().clone() for n, p in trainable(model).items()}
    optimizer = torch.optim.Adam(model.parameters(), **ADAM)
    sampler = BallsAndBinsSampler(NUMBER, BINS["expected_batch_size"], test_seed=SEED)
    for step in range(BINS["num_steps"]):
        drawn = sampler.draw(step).tolist()
        total = oracle(model, rows(Examples(NUMBER).batch, drawn)).clipped_sum(CLIP)
        for name, p in trainable(model).items():
            p.grad = total[name] / BINS["expected_batch_size"]
        optimizer.step()
    return before, {n: p.detach().clone() for n, p in trainable(model).items()}


@pytest.mark.parametrize("engine", ENGINES)
def test_balls_and_bins_and_secure_noise(engine: str, launched: Callable[[str], Path]) -> None:
    output, ranks = launched(engine), 1 if engine == "single" else 2
    before, after = of_one_process()
    moved = (flat(after) - flat(before)).norm()
    for rank in range(ranks):
        found = torch.load(output / f"bins_{rank}.pt")
        assert (flat(found) - flat(after)).norm() <= 1e-5 * moved
    sizes = [p.numel() for p in after.values()]
    expected = GaussianNoise(secure=True).for_release(3.0 * CLIP, CLIP, sum(sizes))
    assert expected > 3.0 * CLIP  # for the rounding of all values, on whichever rank
    added = [json.loads((output / f"secure_{rank}.json").read_text()) for rank in range(ranks)]
    assert {std for of_rank in added for std, _ in of_rank} == {expected}
    assert sum(count for of_rank in added for _, count in of_rank) == 3 * sum(sizes)
