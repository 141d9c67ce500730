"""The inputs of checkpoints in other memory: real copies on a CPU, and on a GPU where there is one."""

from __future__ import annotations

import gc

import pytest
import torch

import dpft
from dpft.long_context.install import install
from dpft.long_context.offload import HOST, HostCopies, Offloader
from tests import zoo
from tests.long_context.setups import gradients, tokens

LAYERS = 3
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory and side streams are of a GPU")


class Counted(HostCopies):
    """Copies that note what is done with them, in order."""

    events: list[tuple[str, int]]
    made = 0

    def __init__(self, t: torch.Tensor) -> None:
        super().__init__(t)
        self.number = Counted.made
        Counted.made += 1
        Counted.events.append(("parked", self.number))

    def fetch(self) -> None:
        if self._incoming is None:
            Counted.events.append(("fetched", self.number))
        super().fetch()

    def get(self) -> torch.Tensor:
        found = super().get()
        Counted.events.append(("used", self.number))
        return found


@pytest.fixture
def events() -> list[tuple[str, int]]:
    Counted.events, Counted.made = [], 0
    return Counted.events


def llama() -> torch.nn.Module:
    return zoo.seeded(lambda attention: zoo.llama(attention, num_hidden_layers=LAYERS))()


def test_values_are_bitwise_those_without(events: list[tuple[str, int]]) -> None:
    batch = zoo.LLAMA.batch()
    kept, parked = install(llama(), None, None), install(llama(), None, Offloader(Counted, least_bytes=0))
    expected = gradients(kept, zoo.LLAMA.losses(kept, batch))
    found = gradients(parked, zoo.LLAMA.losses(parked, batch))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # one input for each layer, and the one before is on its way when a layer begins
    assert events == [
        *(("parked", i) for i in range(LAYERS)),
        ("fetched", 2),
        ("used", 2),
        ("fetched", 1),
        ("used", 1),
        ("fetched", 0),
        ("used", 0),
    ]
    del kept, parked
    gc.collect()
    assert not HOST, "copies outlive their graph"


def test_two_traversals_and_the_check_of_isolation_fetch_again(events: list[tuple[str, int]]) -> None:
    batch, norms = zoo.LLAMA.batch(), []
    for offloader in (None, Offloader(Counted, least_bytes=0)):
        model = dpft.wrap(install(llama(), 4, offloader), max_grad_norm=0.5, strategy="two_pass")
        model(**batch).loss.backward()
        norms.append(dpft.stats(model).norms)
    assert torch.equal(norms[0], norms[1])
    assert [number for what, number in events if what == "used"] == [2, 1, 0] * 3


def test_prefetch_does_not_reach_into_an_earlier_forward(events: list[tuple[str, int]]) -> None:
    model, ids = install(llama(), None, Offloader(Counted, least_bytes=0)), tokens(1, 8)
    first, second = (model(input_ids=ids, labels=ids).loss for _ in range(2))
    second.backward()
    assert ("fetched", LAYERS - 1) not in events
    first.backward()
    assert [number for what, number in events if what == "used"] == [5, 4, 3, 2, 1, 0]


def test_what_is_small_or_of_a_cpu_stays(events: list[tuple[str, int]]) -> None:
    ids = tokens(1, 8)
    model = install(llama(), None, Offloader(Counted))
    model(input_ids=ids, labels=ids).loss.backward()
    assert not events, "8 tokens are not worth a transfer"
    model = install(llama(), None, Offloader(least_bytes=0))
    t = torch.ones(4)
    assert Offloader(least_bytes=0).pack(t) is t
    model(input_ids=ids, labels=ids).loss.backward()
    assert not HOST


def test_a_parked_tensor_keeps_what_it_was_parked_with() -> None:
    offloader, t = Offloader(HostCopies, least_bytes=0), torch.arange(4.0)
    packed = offloader.pack(t)
    t.zero_()
    for _ in range(2):
        assert torch.equal(Offloader.unpack(packed), torch.arange(4.0))
    half = offloader.pack(torch.ones(2, 3, dtype=torch.bfloat16))
    assert Offloader.unpack(half).dtype == torch.bfloat16


@needs_gpu
def test_on_a_gpu_the_inputs_are_on_the_host() -> None:
    ids = tokens(1, 512).cuda()
    found, memory = [], []
    for offloader in (None, Offloader(least_bytes=0)):
        model = install(llama().cuda(), None, offloader)
        torch.cuda.reset_peak_memory_stats()
        loss = model(input_ids=ids, labels=ids).loss
        memory.append(torch.cuda.memory_allocated())
        loss.backward(retain_graph=True)
        model.zero_grad()
        loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert memory[1] < memory[0]


@needs_gpu
def test_on_a_gpu_a_change_in_place_in_transit_is_refused() -> None:
    offloader = Offloader(least_bytes=0)
    t = torch.zeros(1 << 26, device="cuda")
    packed = offloader.pack(t)
    t.add_(1)
    with pytest.raises(dpft.ClippingError, match="in place"):
        for _ in range(4):
            offloader.pack(torch.zeros(1 << 20, device="cuda"))
    del packed
