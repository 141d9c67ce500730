"""Copies between a device and host memory: as late as they may happen, and on a GPU where there is one."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from accelerate import Accelerator
from dpft.engines import engine
from dpft.engines.host import Staging
from tests import zoo
from tests.engines.on_host import host, masters, on_host, one_layer
from tests.training import Training, tiny_llama, values


class Late(Staging):
    """Each copy happens when its end is waited for, as late as a GPU may make it; until then its target is NaN."""

    def __init__(self, device: torch.device, piece: int = 64) -> None:
        super().__init__(device, piece)
        self._direct = False
        self.waits = 0
        self._pending: list[Callable[[], None]] = []

    def _copy(self, target: Tensor, source: Tensor, stream: Any) -> Callable[[], None]:
        target.fill_(torch.nan)
        done = False

        def wait() -> None:
            nonlocal done
            if not done:
                self.waits += 1
                target.copy_(source)
                done = True

        self._pending.append(wait)
        return wait

    def synchronise(self) -> None:
        """What the device's stream does before it uses what it was sent."""
        for wait in self._pending:
            wait()
        self._pending.clear()


def test_copies_wait_for_each_other() -> None:
    """Two buffers, many pieces in both directions: nothing is read before it has arrived, or overwritten before."""
    g = torch.Generator().manual_seed(0)
    staging = Late(torch.device("cpu"))
    for round_ in range(20):
        sources = [torch.randn(int(n), generator=g) for n in torch.randint(0, 100, (6,), generator=g)]
        if round_ % 2:
            sources = [s.bfloat16() for s in sources]
        arrived = [torch.full_like(s, torch.inf) for s in sources]
        targets = [torch.zeros_like(s, dtype=torch.bfloat16) for s in sources]
        for source, out, target in zip(sources, arrived, targets, strict=True):

            def take(start: int, piece: Tensor, out: Tensor = out) -> None:
                out[start : start + len(piece)] = piece

            staging.to_host(source, take)
            staging.to_device(target, source)
        staging.settle()
        assert all(torch.equal(a, b) for a, b in zip(arrived, sources, strict=True))
        assert all(torch.equal(a, b.bfloat16()) for a, b in zip(targets, sources, strict=True))
    assert staging.waits > 100 and staging._buffers[0].nbytes == 64
    before = staging.waits
    staging.to_host(torch.ones(20), lambda *_: pytest.fail("what was forgotten is used"))
    staging.forget()
    assert staging.waits == before + 2  # before the tensor may be freed
    staging.settle()


def test_a_training_with_late_copies_is_bitwise_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(name: str) -> Training:
        return on_host(tmp_path / name, model=tiny_llama().bfloat16(), max_physical_batch_size=2)

    expected = train("direct").train()
    monkeypatch.setattr(engine, "Staging", lambda device: Late(device, 1 << 10))
    late = train("late")
    for batch in late.loader:
        staging: Any = host(late)._host_sums.staging
        staging.synchronise()
        late.backward(batch)
        late.optimizer.step()
        late.optimizer.zero_grad()
    staging.synchronise()
    assert staging.waits > 100
    assert torch.equal(values(late.model), values(expected.model))
    assert all(torch.equal(a, b) for a, b in zip(masters(late), masters(expected), strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies beside the computation need a GPU")
def test_on_a_gpu_the_device_has_the_parameters_alone(tmp_path: Path) -> None:
    ends = []
    for name in ("host", "again"):
        model = one_layer(zoo.llama, num_hidden_layers=4, vocab_size=20_000).bfloat16()
        training = on_host(
            tmp_path / name, model=model, accelerator=new_accelerator_on_gpu(), max_physical_batch_size=2
        ).train()
        assert all(p.device.type == "cuda" and p.grad is None for p in model.parameters())
        assert all(m.device.type == "cpu" for m in masters(training))
        for p, master in zip(model.parameters(), masters(training), strict=True):
            assert torch.equal(p.detach().cpu(), master.bfloat16())
        ends.append(values(model))
        held = sum(p.nbytes for p in model.parameters())
        del training, model
        gc.collect()
        torch.cuda.empty_cache()
        assert torch.cuda.memory_allocated() < held
    assert torch.equal(*ends)


def new_accelerator_on_gpu() -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator()
