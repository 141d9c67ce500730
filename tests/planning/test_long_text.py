"""Long context, host memory and sequence parallelism in plans: against real steps, and against closed forms."""

from __future__ import annotations

import gc
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

import dpft
from dpft.kernels import gram
from dpft.kernels.head import CPU_CHUNK
from dpft.long_context.install import install
from dpft.long_context.offload import HOST, HostCopies, Offloader
from dpft.planning.hardware import Hardware
from dpft.planning.long_text import _Exchange, find_long_context, install_on_meta, page_locked_bytes, total_bytes
from dpft.planning.longest import STEP, find_longest
from dpft.planning.plan import longest, plan
from dpft.planning.simulate import Sharding, simulate
from dpft.planning.step_meter import StepMeter
from dpft.planning.twin import make_twin
from tests.memory_meter import MemoryMeter
from tests.planning.models import VOCAB, built, llama

FP32, BF16 = torch.float32, torch.bfloat16
GPU = Hardware("card", 2**33, {FP32: 1e13, BF16: 1e14, torch.float64: 1e13}, 0.5, 1e12, 8e-6, True, "made up", 1e10)
# Bytes of the smallest tensor that is offloaded here: the inputs of layers are, nothing smaller.
LEAST = 1 << 15


class DeviceMeter(MemoryMeter):
    """Leaves out what stands for host memory, numpy's, of which it keeps the peak."""

    host = 0

    def _born(self, storage: torch.UntypedStorage) -> None:
        self.host = max(self.host, sum(HOST.values()))
        if storage.resizable():
            super()._born(storage)


def long(name: str, dtype: torch.dtype, **more: Any) -> nn.Module:
    """A small model with tiles, whose offloaded inputs go to other memory of the CPU."""
    return install(built(name, dtype=dtype, **more), "auto", Offloader(HostCopies, LEAST))


def measured(model: nn.Module, strategy: Any, examples: int, tokens: int) -> tuple[int, int, int, int]:
    """Device bytes at the peak of a step and of one more onto its gradient, host bytes, and FLOPs."""
    dpft.wrap(model, loss_chunk=CPU_CHUNK, **({"clipping": "none"} if strategy is None else {"strategy": strategy}))
    ids = torch.randint(0, VOCAB, (examples, tokens), generator=torch.Generator().manual_seed(1))
    for _ in range(4 if examples > 1 and strategy is not None else 1):  # with the isolation check
        model(input_ids=ids[:, :8], labels=ids[:, :8]).loss.backward()
    model.zero_grad(set_to_none=True)
    gc.collect()
    peaks = []
    # PyTorch's counter of FLOPs does not run where tiles call autograd.grad; this one has its formulas.
    with StepMeter([]) as counter, DeviceMeter([*model.parameters(), *model.buffers(), ids]) as meter:
        for _ in range(2):
            meter.reset_peak()
            counter.reset()
            model(input_ids=ids, labels=ids).loss.backward()
            peaks.append(meter.peak)
    return peaks[0], peaks[1], meter.host, counter.flops(attention=False)


@pytest.mark.parametrize(
    ("name", "examples", "tokens", "dtype", "strategies"),
    [
        ("llama", 1, 300, FP32, ("one_pass",)),
        ("llama-tied", 1, 300, FP32, (None,)),
        ("lora", 1, 300, BF16, ("one_pass",)),
        ("llama-1", 2, 300, FP32, ("two_pass",)),
    ],
)
def test_device_and_host_are_those_of_the_real_step(
    name: str, examples: int, tokens: int, dtype: torch.dtype, strategies: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Device peaks to 0.5 %, as without long context; host bytes and FLOPs exactly."""
    monkeypatch.setattr(gram, "_TOLERATED", float("inf"))
    twin = make_twin(long(name, dtype), None, None)
    for strategy in strategies:
        predicted = simulate(twin, examples, tokens, strategy, loss_chunk=CPU_CHUNK, in_transit=0)
        first, second, host, flops = measured(long(name, dtype), strategy, examples, tokens)
        assert predicted.peak == pytest.approx(first, rel=0.005), strategy
        assert predicted.accumulating_peak == pytest.approx(second, rel=0.005), strategy
        assert total_bytes(predicted.offloaded) == host > 0, strategy
        assert predicted.flops(attention=False) == flops, strategy
        # what each byte is, adds up to the peak
        assert sum(predicted.parts.values()) == predicted.accumulating_peak
        assert any(part.startswith("one tile of") for part in predicted.parts) or predicted.at_peak == "head and loss"


def test_blocks_found_by_shapes_are_those_found_by_values() -> None:
    """Of a model on meta, and of the same one with values."""
    by_values = find_long_context(long("llama", FP32))
    twin = make_twin(built("llama"), None, None)
    install_on_meta(twin)
    by_shapes = find_long_context(twin)
    assert by_values is not None and by_shapes is not None

    def seen(blocks: Any) -> Any:
        return [(type(b.owner), b.method, b.cost, len(b.members)) for b in blocks]

    assert seen(by_shapes.blocks) == seen(by_values.blocks) != []


@pytest.mark.slow
def test_a_deep_model_is_that_of_shallow_ones_with_offload() -> None:
    """Two inputs in transit, so that blocks differ by their place up to the third."""
    twin = make_twin(install(llama(7), None, Offloader(HostCopies, LEAST)), None, None)
    whole, found = (simulate(twin, 1, 140, "one_pass", whole=w, in_transit=2, gpu=True) for w in (True, False))
    assert (found.peak, found.accumulating_peak) == (whole.peak, whole.accumulating_peak)
    assert found.offloaded == whole.offloaded and found.flops() == whole.flops()
    assert sum(found.parts.values()) == found.accumulating_peak and found.at_peak == whole.at_peak


@pytest.mark.usefixtures("simulated_once")
def test_host_bytes_are_named_and_counted() -> None:
    """Inputs of checkpoints, rounded up as page-locked memory is; sums, masters and moments. To the last byte."""
    model = llama(1, hidden_size=1024)
    tokens = 300  # an input is above the least that is offloaded
    size, each = sum(p.numel() for p in model.parameters()), tokens * 1024 * 4
    host = {
        "checkpoint inputs": each,
        "rounded up to powers of two": 2**21 - each,
        "clipped sums": 4 * size,
        "float32 masters": 4 * size,
        "optimiser states": 8 * size,
        "page-locked buffers": 2**27,
    }
    options: dict[str, Any] = {"hardware": GPU, "long_context": True, "sums_device": "cpu", "optimizer": "adamw"}
    found, short = (plan(model, 1, tokens, host_memory=sum(host.values()) - less, **options) for less in (0, 1))
    assert found.long is not None and found.long.transfer is not None
    assert found.long.host == host and found.fits
    assert not short.fits and "DOES NOT FIT: too much in host memory" in short.reason
    assert "optimiser states" not in found.resting
    move = found.long.transfer
    assert move.seconds == each / GPU.link and move.binds == (move.seconds > move.forward_seconds)
    assert 0 < move.forward_seconds < move.backward_seconds
    assert sum(found.long.device.values()) == found.predictions[found.choice].total_bytes
    text = str(found)
    assert all(word in text for word in ("page-locked buffers", "offload: an input", "most in"))
    assert all(len(line) <= 119 for line in text[text.index("device:") : text.index("* one")].splitlines())


def test_page_locked_memory_is_rounded_up() -> None:
    assert page_locked_bytes(Counter({8: 1, 9: 2, 16: 1})) == 8 + 2 * 16 + 16


def test_sequence_parallel_divides_tokens_attention_and_gradients() -> None:
    """FLOPs of a rank are 1 / S of the whole, attention's too; it keeps 1 / W of the sums."""
    twin = make_twin(llama(2, num_key_value_heads=1), None, None)
    install_on_meta(twin)
    whole = simulate(twin, 1, 1200, "one_pass", Sharding("zero2", 4), gpu=True)
    rank = simulate(twin, 1, 1200, "one_pass", Sharding("zero2", 4, sequence=4), gpu=True)
    attention = [s.flops() - s.flops(attention=False) for s in (whole, rank)]
    assert attention[0] == 4 * attention[1] > 0
    # the head's chunks and the norms of shares do not divide: norms are no products
    assert whole.flops(attention=False) == 4 * rank.flops(attention=False)
    owned = sum(-(-p.numel() // 4) * 4 for p in twin.parameters())
    assert rank.parts["clipped sums"] == owned
    assert rank.peak < whole.peak / 2


def test_the_exchange_has_the_shapes_and_bytes_of_ulysses() -> None:
    """``[B, h, t, D]`` to ``[B, h / S, t S, D]`` and back; fewer heads of keys than ranks are repeated."""
    exchange = _Exchange(4)
    q, k = torch.empty(1, 8, 6, 2, device="meta"), torch.empty(1, 2, 6, 2, device="meta")
    assert exchange.gather(q, 2).shape == (1, 2, 24, 2) and exchange.gather(k, 1).shape == (1, 1, 24, 2)
    assert exchange.spread(exchange.gather(q, 2)).shape == q.shape


class Line:
    """A predictor whose margin is a function of T."""

    tried: list[int]

    def __init__(self, margin: Any) -> None:
        self.function, self.tried, self.units = margin, [], 0

    def restart(self, seq_len: int) -> None:
        self.units = seq_len // STEP

    def margin(self, batch_size: int) -> float:
        self.tried.append(self.units)
        return float(self.function(self.units))

    def host_limit(self, batch_size: int, step: int, most: int) -> int:
        return most

    def short(self, batch_size: int) -> str:
        return f"short at {self.units}"

    def plan(self, *_: Any) -> Any:
        return self.units


@pytest.mark.parametrize(
    ("margin", "expected"),
    [
        (lambda n: 1 - n / 300.5, 300),
        (lambda n: 1 - n / 300, 300),
        (lambda n: 0.4 - n / 9000 if n < 700 else -0.5, 699),  # another strategy, rounding to powers of two
        (lambda n: 1 - (1 << (n - 1).bit_length()) / 1024, 1024),
        (lambda n: 0.9 - (n / 5000) ** 2, 4743),
        (lambda n: 1 - n / 1.5, 1),
        (lambda n: 1.0, 1 << 14),
    ],
)
def test_the_longest_fits_and_the_next_does_not(margin: Any, expected: int) -> None:
    line: Any = Line(margin)
    found = find_longest(line, 1, 1 << 24, "", None)
    assert found.seq_len == expected * STEP and found.plan == expected  # type: ignore[comparison-overlap]  # Line has no Plan
    assert found.binds == ("nothing" if expected == 1 << 14 else f"short at {expected + 1}")
    assert len(line.tried) == len(set(line.tried)) <= 30


@pytest.mark.slow
@pytest.mark.usefixtures("simulated_once")
def test_longest_of_a_model_is_where_its_plans_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("plan", "longest"):
        monkeypatch.setattr(f"dpft.planning.{module}.STEP", 40)
    model = llama(1)
    room = plan(model, 1, 80, hardware=GPU, long_context=True, optimizer="sgd").predictions["one_pass"]
    found = longest(model, memory=room.total_bytes, hardware=GPU, optimizer="sgd", most=160)
    assert found.seq_len == 80 and found.plan.fits and found.binds.startswith(f"{found.plan.choice} needs the device")
    assert "longest text that fits: 80 tokens" in str(found)
    with pytest.raises(ValueError, match="not even 40 tokens fit"):
        longest(model, memory=1000, hardware=GPU)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sequence_parallel": 0}, "sequence_parallel is 0"),
        ({"sequence_parallel": 2}, "expected fsdp2"),
        ({"sequence_parallel": 3, "engine": "fsdp2", "world_size": 4}, "a divisor of world_size 4"),
        ({"sequence_parallel": 8, "engine": "fsdp2", "world_size": 8}, "4 heads and 2 of keys"),
        ({"sequence_parallel": 2, "engine": "zero3", "world_size": 2, "batch_size": 2}, "expected 1 under sequence"),
        ({"host_memory": 0}, "host_memory is 0"),
        ({"sums_device": "cuda"}, "sums_device is 'cuda'"),
        ({"sums_device": "cpu", "engine": "ddp", "world_size": 2}, "is of one process"),
        ({"long_context": True, "checkpointing": False}, "checkpointing is False"),
    ],
)
def test_refuses(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(llama(1), **kwargs)
