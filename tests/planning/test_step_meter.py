"""The meter: storages once, work by PyTorch's formulas, repeated work counted without being run."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dpft.planning.step_meter import Operation, StepMeter

MIB = 2**20


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_counts_storages_once(device: str) -> None:
    a = torch.ones(MIB // 4, device=device)
    with StepMeter([a]) as meter:
        a.view(2, -1).t()
        assert meter.peak == 0
        b = a * 2
        kept = [b.view(4, -1), b[10:], b.detach()]
        assert meter.live == meter.peak == MIB
        c = b + 1
        del c
        assert meter.live == MIB and meter.peak == 2 * MIB
        meter.reset()
        assert meter.peak == MIB and not meter.operations
        del kept, b
        assert meter.live == 0


def test_bytes_are_what_is_read_and_written() -> None:
    a, b = torch.ones(64, 32, device="meta"), torch.ones(32, 16, device="meta")
    with StepMeter([a, b]) as meter:
        a @ b
        a.add_(b[:1, :1].expand(64, 32))
        a.t()
        torch.empty_like(a)
    assert meter.operations == {
        Operation("mm", torch.float32, 2 * 64 * 32 * 16, 4 * (64 * 32 + 32 * 16 + 64 * 16)): 1,
        # the broadcast operand at its storage's size
        Operation("add_", torch.float32, 0, 4 * (2 * 64 * 32 + 32 * 16)): 1,
        Operation("empty_like", torch.float32, 0, 0): 1,
    }


def test_flops_are_the_counters() -> None:
    x, w = torch.ones(3, 8, 16), torch.ones(16, 4, requires_grad=True)
    with FlopCounterMode(display=False) as counter, StepMeter([x, w]) as meter:
        (torch.bmm(x, x.mT) @ (x @ w)).sum().backward()
    assert meter.flops() == counter.get_total_flops() > 0
    assert meter.flops(attention=False) == meter.flops()


def test_knows_causal_attention() -> None:
    q = torch.ones(1, 2, 8, 16, device="meta", requires_grad=True)
    for causal in (False, True):
        with StepMeter([q]) as meter:
            torch.ops.aten._scaled_dot_product_flash_attention(q, q, q, 0.0, causal)[0].sum().backward()
        attention = [op for op in meter.operations if op.attention]
        assert len(attention) == 2 and all(op.causal == causal for op in attention)
        assert meter.flops() - meter.flops(attention=False) == 7 * 2 * 2 * 8 * 8 * 16  # 2 products, then 5


def test_once_counts_what_running_again_would() -> None:
    """The same live bytes, peak and operations, whether a repeated function runs or is looked up."""

    def norm(x: torch.Tensor) -> torch.Tensor:
        return (x @ x.mT).square().sum(1)

    found = []
    for lookup in (False, True):
        x, runs = torch.ones(64, 32, device="meta"), 0
        with StepMeter([x]) as meter:
            for size in (64, 64, 32, 64):
                held = [torch.empty_like(x) for _ in range(runs)]
                part = x[:size]
                result = meter.once(part.shape, lambda part=part: norm(part)) if lookup else norm(part)
                runs += 1
                assert result.shape == (size,)
            found.append((meter.peak, meter.live, meter.operations))
            del held, result
    assert found[0] == found[1]
