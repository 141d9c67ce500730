"""AdamW with a corrected second moment under every engine, or a refusal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines.corrected_worker import ADAM, CLIP_NORM, NUMBER, SIGMA
from tests.engines.launching import ENGINES

pytestmark = pytest.mark.slow


def ranks(output: Path, engine: str) -> list[Any]:
    found = [torch.load(path) for path in sorted(output.glob("corrected_*.pt"))]
    assert len(found) == (1 if engine == "single" else 2)
    return found


@pytest.mark.parametrize("engine", ENGINES)
def test_corrected(engine: str, launched: Callable[[str], Path]) -> None:
    """After one release: what the moments are of its gradient, and the step of each element."""
    (beta1, beta2), phi = ADAM["betas"], (SIGMA * CLIP_NORM / NUMBER) ** 2
    for found in ranks(launched(engine), engine):
        if engine.startswith("zero"):
            assert f"AdamWBC under {engine.partition('_')[0]}" in found
            continue
        floored = 0.0
        for name, before in found["before"].items():
            g = found["exp_avg"][name].double() / (1 - beta1)
            left = g * g - phi
            torch.testing.assert_close(found["exp_avg_sq"][name].double(), (1 - beta2) * left, rtol=1e-4, atol=1e-7)
            floored += float((left < ADAM["floor"] * phi).double().mean()) / len(found["before"])
            step = g / left.clamp(min=ADAM["floor"] * phi).sqrt() + ADAM["weight_decay"] * before.double()
            want = before.double() - ADAM["lr"] * step
            torch.testing.assert_close(found["after"][name].double(), want, rtol=1e-4, atol=1e-5)
        assert 0.1 < floored < 0.9  # both sides of the floor were seen
