"""What follows from where elements lie: the parts of a bucket of DDP, and where the noise of an engine is drawn."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dpft import EngineError
from dpft.engines import correlated, sums
from dpft.engines.correlated import sums_device_of
from dpft.engines.ranks import Ranks


class OneOf(Ranks):
    """One rank of several, without communication: totals are as if all had the same."""

    def __init__(self, rank: int, world: int) -> None:
        super().__init__(torch.device("cpu"))
        self.rank, self.world = rank, world

    def total(self, value: int) -> int:
        return sum(self.everyone)

    everyone: tuple[int, ...] = ()


@pytest.mark.parametrize("world", [1, 2, 3, 7, 40])
def test_the_parts_of_all_ranks_are_every_element_once(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "BUCKET", 12)
    parameters = {f"p{i}": nn.Parameter(torch.zeros(size)) for i, size in enumerate((5, 1, 9, 12, 2))}
    found: list[tuple[int, int]] = []
    for rank in range(world):
        ranks = OneOf(rank, world)
        ranks.everyone = (29,)
        own = sums.ReplicatedSums(parameters, ranks)
        for names in own._buckets:
            part, mine = own._mine(names)
            for name, start, count in own._parts(names, rank * part, rank * part + mine):
                place = own.place(name, start)
                assert place.size == parameters[name].numel() and count > 0
                found += [(place.number, element) for element in range(place.start, place.start + count)]
    assert sorted(found) == [(i, e) for i, size in enumerate((5, 1, 9, 12, 2)) for e in range(size)]


def accelerator(**state: Any) -> Any:
    return SimpleNamespace(device=torch.device("cuda", 1), state=SimpleNamespace(**state))


def test_where_noise_is_drawn() -> None:
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

    def deepspeed(device: Any) -> Any:
        zero = {} if device is None else {"offload_optimizer": {"device": device}}
        return accelerator(deepspeed_plugin=SimpleNamespace(deepspeed_config={"zero_optimization": zero}))

    def fsdp(policy: Any) -> Any:
        return accelerator(fsdp_plugin=SimpleNamespace(cpu_offload=policy))

    cuda, cpu = torch.device("cuda", 1), torch.device("cpu")
    assert sums_device_of(accelerator(), "single", None) == sums_device_of(accelerator(), "ddp", None) == cuda
    assert sums_device_of(accelerator(), "single", "cpu") == cpu
    assert sums_device_of(fsdp(CPUOffloadPolicy()), "fsdp2", None) == cpu
    assert sums_device_of(fsdp(OffloadPolicy()), "fsdp2", None) == cuda
    for stage in ("zero1", "zero2", "zero3"):
        assert sums_device_of(deepspeed("cpu"), stage, None) == cpu  # type: ignore[arg-type]  # one of Kind
        assert sums_device_of(deepspeed("none"), stage, None) == cuda  # type: ignore[arg-type]  # one of Kind
        assert sums_device_of(deepspeed(None), stage, None) == cuda  # type: ignore[arg-type]  # one of Kind


def test_gpus_of_several_kinds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks: Any = Ranks(torch.device("cpu"))
    monkeypatch.setattr(ranks, "gather", lambda name: [name, "NVIDIA H200"])
    nothing: Any = None
    with pytest.raises(EngineError, match="on NVIDIA H200, cpu; expected one kind of device"):
        correlated.correlated_noise(nothing, ranks, nothing, nothing, nothing, "ddp", torch.device("cpu"), nothing)
