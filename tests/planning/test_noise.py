"""`plan(privacy=...)`: vectors that correlated noise keeps, where they are, and the time of drawing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dpft
from dpft.planning.hardware import HARDWARE, Hardware, measure
from dpft.planning.noise import EARLIER, NoiseCost, noise_cost
from dpft.planning.plan import plan
from dpft.planning.simulate import ENGINES, EngineName, Sharding
from tests.planning.models import llama
from tests.training import Training

FP32 = torch.float32
PLAN: dict[str, Any] = {"noise_multiplier": 1.0, "target_delta": 1e-5, "expected_batch_size": 2, "num_steps": 20}
CHANGES: dict[str, dict[str, Any]] = {
    "dp_sgd": {},
    "secure": {"secure_rng": True},
    "bandmf": {"mechanism": "bandmf", "bands": 5, "sampler": "cyclic_poisson"},
    "blt": {"mechanism": "blt", "buffers": 3, "sampler": "fixed_order"},
}
CONFIGS = {name: dpft.PrivacyConfig(**PLAN, **changes) for name, changes in CHANGES.items()}
# A value takes a second to draw on the host, and a byte one to move.
SLOW_CPU = Hardware("cpu", 2**40, {FP32: 1e9}, 0.5, 1.0, 1.0, False, "made up", host_draw=1.0)
SLOW_GPU = Hardware("gpu", 2**40, {FP32: 1e9}, 0.5, 1.0, 1.0, True, "made up", link=0.5, host_draw=1.0)


def model(dtype: torch.dtype = FP32) -> nn.Module:
    frozen = nn.Linear(7, 7).requires_grad_(False)
    return nn.Sequential(nn.Linear(10, 9, bias=False, dtype=dtype), frozen)  # 90 trainable


def cost(name: str, sharding: Sharding = Sharding(), machine: Hardware = SLOW_GPU, **options: Any) -> NoiseCost:  # noqa: B008 - it is frozen
    return noise_cost(model(**options), sharding, machine, CONFIGS[name])


@pytest.mark.parametrize(("name", "vectors"), [("dp_sgd", 0), ("secure", 0), ("bandmf", 4), ("blt", 3)])
def test_vectors_are_those_that_the_strategy_keeps(name: str, vectors: int) -> None:
    found, strategy = cost(name), CONFIGS[name].resolve(40).strategy
    assert found.vectors == vectors == (0 if strategy is None else strategy.memory)
    assert found.kept_bytes == vectors * 90 * 4 and found.elements == 90 and not found.on_host
    assert cost(name, dtype=torch.bfloat16).kept_bytes == vectors * 90 * 4  # the sums are float32
    assert cost(name, dtype=torch.float64).kept_bytes == vectors * 90 * 8


@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine != "single"])
def test_ranks_divide_the_noise(engine: EngineName) -> None:
    found = cost("blt", Sharding(engine, 4))
    assert found.elements == math.ceil(90 / 4) and found.kept_bytes == 3 * 23 * 4
    assert found.seconds == pytest.approx(cost("blt").seconds * 23 / 90)


@pytest.mark.parametrize(
    ("name", "bytes_of_a_value"), [("dp_sgd", 16), ("bandmf", 28 + 4 * 12), ("blt", 28 + 3 * 32), ("secure", 264)]
)
def test_time_is_that_of_moving_bytes_and_of_the_hosts_draws(name: str, bytes_of_a_value: int) -> None:
    assert cost(name).seconds == pytest.approx(90 * bytes_of_a_value)
    assert cost(name, dtype=torch.float64).seconds == pytest.approx(90 * 2 * bytes_of_a_value)
    if name != "secure":
        assert cost(name, machine=SLOW_CPU).seconds == pytest.approx(90 * (1 + bytes_of_a_value))
        on_host = cost(name, Sharding(sums_on_host=True))
        assert on_host.seconds == pytest.approx(90 * (1 + 2 * bytes_of_a_value)) and on_host.on_host
    else:
        assert cost(name, machine=SLOW_CPU).seconds == pytest.approx(1.2 * cost("dp_sgd", machine=SLOW_CPU).seconds)


@pytest.mark.slow
@pytest.mark.usefixtures("simulated_once")
def test_the_plan_has_to_hold_them() -> None:
    base: dict[str, Any] = {"hardware": HARDWARE["h100"], "optimizer": "adamw", "memory": 2**34}
    plain = plan(llama(1), 1, 16, **base)
    assert plain.noise is None and EARLIER not in plain.resting
    found = plan(llama(1), 1, 16, **base, privacy=CONFIGS["bandmf"])
    assert found.noise is not None and found.resting[EARLIER] == found.noise.kept_bytes > 0
    for name, prediction in found.predictions.items():
        assert prediction.total_bytes == plain.predictions[name].total_bytes + found.noise.kept_bytes
        assert prediction.seconds == plain.predictions[name].seconds
    assert "noise (bandmf): keeps 4 vectors" in str(found) and found.to_dict()["noise"]["vectors"] == 4
    assert "keeps" not in str(cost("dp_sgd"))
    least = plain.predictions[plain.choice].total_bytes
    assert not plan(llama(1), 1, 16, **{**base, "memory": least}, privacy=CONFIGS["blt"]).fits


@pytest.mark.slow
def test_with_the_sums_they_are_in_host_memory() -> None:
    found = plan(llama(1), 1, 16, hardware="h100", privacy=CONFIGS["blt"], sums_device="cpu")
    assert EARLIER not in found.resting and found.long is not None and found.noise is not None
    assert found.long.host[EARLIER] == found.noise.kept_bytes and "in host memory" in str(found)


def test_the_hosts_draws_are_measured() -> None:
    assert 1e-10 < measure(torch.device("cpu")).host_draw < 1e-6


class Bytes(TorchDispatchMode):
    """Counts what the operations on values read and write."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        name = func.overloadpacket.__name__
        if name in ("zeros", "copy_", "add_", "sub_", "mul_"):
            read = tensors[1:] if name == "copy_" else tensors
            self.total += sum(t.numel() * t.element_size() for t in [*read, out])
        elif name not in ("slice", "view", "detach", "alias", "lift_fresh"):
            raise AssertionError(f"an operation that is not counted: {name}")
        return out


@pytest.mark.parametrize("name", ["bandmf", "blt", "dp_sgd"])
def test_bytes_of_a_value_are_those_of_the_operations(name: str, tmp_path: Path) -> None:
    """On the host numpy writes the draws, 4 bytes of each; the rest is torch's."""
    training = Training(tmp_path / "ledger", changes={**PLAN, **CHANGES[name]}, test_seed=None)
    noise, values = training.optimizer.optimizer.noise, torch.zeros(1000)
    for _ in range(6):
        counted = Bytes()
        training.run.ledger.record()
        with noise.release(), counted:
            noise.add_(values, 1.0)
    training.close()
    assert (counted.total + 4 * 1000) / 1000 == cost(name).seconds / 90
