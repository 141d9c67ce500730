"""Under every engine: the averaged weights, and AdamW with a corrected second moment, or a refusal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines.after_release_worker import ADAM, CLIP_NORM, DECAY, NUMBER, SIGMA, STEPS
from tests.engines.launching import ENGINES

pytestmark = pytest.mark.slow


def ranks(output: Path, engine: str) -> list[dict[str, Any]]:
    found = [torch.load(path) for path in sorted(output.glob("after_release_*.pt"))]
    assert len(found) == (1 if engine == "single" else 2)
    return found


@pytest.mark.parametrize("engine", ENGINES)
def test_average(engine: str, launched: Callable[[str], Path]) -> None:
    """Another loss with the averaged weights, and then the one before again, whatever the engine has gathered."""
    for found in (rank["average"] for rank in ranks(launched(engine), engine)):
        if engine == "zero3":
            assert "WeightEMA under ZeRO-3" in found
            continue
        assert len(found["seen"]) == STEPS + 1 and found["kept"]["updates"] == STEPS
        for name in found["seen"][0]:
            want = found["seen"][0][name].double()
            for t, weights in enumerate(found["seen"][1:]):
                decay = min(DECAY, (1 + t) / (10 + t))
                want = decay * want + (1 - decay) * weights[name].double()
            for got in (found["applied"], found["kept"]["averages"]):
                torch.testing.assert_close(got[name].double(), want, rtol=1e-5, atol=1e-5)
            assert torch.equal(found["left"][name], found["seen"][-1][name])
            assert not torch.equal(found["left"][name], found["applied"][name])
            if found["exported"]:  # of rank 0
                assert torch.equal(found["exported"][name].float(), found["applied"][name])
        own, averaged, again = found["losses"]
        assert own == again != averaged and found["loaded"]
    assert engine == "zero3" or ranks(launched(engine), engine)[0]["average"]["exported"]


@pytest.mark.parametrize("engine", ENGINES)
def test_corrected(engine: str, launched: Callable[[str], Path]) -> None:
    """After one release: what the moments are of its gradient, and the step of each element."""
    (beta1, beta2), phi = ADAM["betas"], (SIGMA * CLIP_NORM / NUMBER) ** 2
    for found in (rank["corrected"] for rank in ranks(launched(engine), engine)):
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
