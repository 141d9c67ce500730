"""Under every engine each rank draws the rows of its own users, afresh in each step, and clips users."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.engines.launching import ENGINES
from tests.engines.matrix_worker import CLIP, Examples
from tests.engines.models import plain_llama
from tests.engines.users_worker import MOST, OWNERS, STEPS, USERS
from tests.oracle import Grads, PerExample, oracle, relative_error

pytestmark = pytest.mark.slow


@cache
def rows() -> PerExample:
    return oracle(plain_llama(), Examples(len(OWNERS)).batch)


def of_users(drawn: list[int]) -> Grads:
    """The clipped sum in float64: for each user the mean gradient of the drawn rows."""
    total = {name: torch.zeros_like(g) for name, g in rows().grads[0].items()}
    for user in range(USERS):
        own = [rows().grads[i] for i in drawn if OWNERS[i] == user]
        mean = {name: torch.stack([g[name] for g in own]).mean(0) for name in total}
        norm = torch.stack([g.square().sum() for g in mean.values()]).sum().sqrt()
        for name, g in mean.items():
            total[name] += g * torch.clamp(CLIP / norm, max=1.0)
    return total


@pytest.mark.parametrize("engine", ENGINES)
def test_users(engine: str, launched: Callable[[str], Path]) -> None:
    output = launched(engine)
    ranks = [json.loads(path.read_text()) for path in sorted(output.glob("users_*.json"))]
    assert len(ranks) == (1 if engine == "single" else 2) and all(len(steps) == STEPS for steps in ranks)
    for step in range(STEPS):
        users = [sorted({OWNERS[i] for i in steps[step]}) for steps in ranks]
        assert sorted(user for own in users for user in own) == list(range(USERS)), "a user is drawn on one rank"
        drawn = [i for steps in ranks for i in steps[step]]
        for user in range(USERS):
            own = [i for i in drawn if OWNERS[i] == user]
            assert len(own) == len(set(own)) == min(MOST, OWNERS.count(user))
    first = [i for steps in ranks for i in steps[0]]
    for rank in range(len(ranks)):
        release = torch.load(output / f"users_{rank}.pt")
        assert relative_error(release, of_users(first)) <= 1e-5
    # users 0 and 1 have 10 and 6 pairs of rows: that all four steps draw the same of both has probability 5e-6
    pairs = {tuple(sorted(i for steps in ranks for i in steps[step] if OWNERS[i] in (0, 1))) for step in range(STEPS)}
    assert len(pairs) > 1
