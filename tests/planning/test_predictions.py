"""What is predicted on meta tensors against what a real step on the CPU allocates and computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dpft.kernels import gram
from dpft.kernels.head import CPU_CHUNK
from dpft.planning.hardware import Hardware
from dpft.planning.plan import plan
from dpft.planning.simulate import simulate
from dpft.planning.twin import make_twin
from tests.planning.models import built, measured

FP32, BF16 = torch.float32, torch.bfloat16
# A CPU's: the chunk of the head is then the one that the measured step takes.
CPU = Hardware("test", 2**33, {FP32: 1e11, BF16: 1e11, torch.float64: 5e10}, 0.5, 1e10, 1e-5, False, "made up")

# Every strategy with and without checkpointing, in both dtypes and for both families, once; not their product.
STEPS = [
    # model, B, T, checkpointing, dtype, strategies
    ("llama", 1, 160, False, FP32, (None, "one_pass", "two_pass", "per_example")),
    ("llama-tied", 1, 160, True, BF16, (None, "one_pass", "two_pass")),
    ("llama-eager", 2, 96, False, FP32, (None, "one_pass")),
    ("gpt2", 1, 160, False, FP32, (None, "per_example")),
    # These take long.
    ("gpt2-untied", 4, 64, False, FP32, ("one_pass", "two_pass")),
    ("llama-tied", 4, 96, False, FP32, ("one_pass", "two_pass")),
    ("llama-wide-vocabulary", 1, 300, False, FP32, (None, "one_pass", "two_pass", "per_example")),
    ("llama-wide-vocabulary", 4, 64, False, BF16, ("one_pass", "two_pass")),
    ("llama", 3, 64, True, FP32, (None, "one_pass", "two_pass", "per_example")),
    ("gpt2", 4, 64, True, BF16, (None, "one_pass", "two_pass")),
    ("lora", 1, 160, True, FP32, (None, "one_pass")),
    ("lora", 2, 300, False, BF16, (None, "one_pass", "two_pass", "per_example")),
]


@pytest.fixture(autouse=True)
def nothing_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which norms are computed again in float64 depends on the data, of which a plan knows nothing."""
    monkeypatch.setattr(gram, "_TOLERATED", float("inf"))


@pytest.mark.parametrize(
    ("name", "examples", "tokens", "checkpointing", "dtype", "strategies"),
    [*STEPS[:-8], *(pytest.param(*step, marks=pytest.mark.slow) for step in STEPS[-8:])],
    ids=[f"{s[0]}-{s[1]}x{s[2]}-{'checkpointed-' * s[3]}{str(s[4])[6:]}" for s in STEPS],
)
def test_peak_and_flops_are_those_of_the_real_step(
    name: str, examples: int, tokens: int, checkpointing: bool, dtype: torch.dtype, strategies: tuple[Any, ...]
) -> None:
    """Peaks to 0.5 % (a layer norm's statistics in bf16 are wider on a meta device), FLOPs exactly."""
    twin = make_twin(built(name, checkpointing, dtype), None, None)
    for strategy in strategies:
        predicted = simulate(twin, examples, tokens, strategy, loss_chunk=CPU_CHUNK)
        first, second, flops = measured(built(name, checkpointing, dtype), strategy, examples, tokens)
        assert predicted.peak == pytest.approx(first, rel=0.005), strategy
        assert predicted.accumulating_peak == pytest.approx(second, rel=0.005), strategy
        # PyTorch's counter does not know the fused attention of a CPU
        assert predicted.flops(attention=False) == flops, strategy
        assert (predicted.flops() > flops) == (name != "llama-eager")


@pytest.mark.slow
@pytest.mark.parametrize(("examples", "tokens"), [(1, 160), (4, 96)])
def test_a_step_in_clip_groups(examples: int, tokens: int) -> None:
    """As the real one; it computes what one-pass does, and keeps less."""
    name, options = "llama", {"loss_chunk": CPU_CHUNK, "clip_groups": "layer"}
    twin = make_twin(built(name, True), None, None)
    predicted = simulate(twin, examples, tokens, "one_pass", **options)
    first, second, flops = measured(built(name, True), "one_pass", examples, tokens, "layer")
    assert (predicted.peak, predicted.accumulating_peak) == pytest.approx((first, second), rel=0.005)
    assert predicted.flops(attention=False) == flops
    whole = simulate(twin, examples, tokens, "one_pass", loss_chunk=CPU_CHUNK)
    assert whole.flops() == predicted.flops() and whole.accumulating_peak > predicted.accumulating_peak
    found = plan(built(name, True), examples, tokens, hardware=CPU, clip_groups="layer")
    assert found.choice == "one_pass" and "two_pass" not in found.predictions and found.allowance == 0
    assert all(layer.kept_bytes == 0 for layer in found.layers) and "clip group" in found.reason
    assert found.predictions["one_pass"].accumulating_peak_bytes == predicted.accumulating_peak
    with pytest.raises(ValueError, match="clip_groups with sequence_parallel"):
        plan(
            built(name),
            1,
            tokens,
            hardware=CPU,
            engine="fsdp2",
            world_size=2,
            sequence_parallel=2,
            clip_groups="layer",
        )


def test_a_plan_is_of_the_dtype_and_checkpointing_asked_for() -> None:
    """And says what was measured."""
    there = built("llama-wide-vocabulary", checkpointing=True)
    for p in there.parameters():
        p.data = p.data.to(BF16)
    found = plan(built("llama-wide-vocabulary"), 2, 300, dtype="bf16", checkpointing=True, memory=2**33, hardware=CPU)
    assert found.dtype == "bfloat16" and found.choice == "one_pass"
    first, second, flops = measured(there, "one_pass", 2, 300)
    predicted = found.predictions["one_pass"]
    assert (predicted.peak_bytes, predicted.accumulating_peak_bytes) == pytest.approx((first, second), rel=0.005)
    assert predicted.flops - predicted.attention_flops == flops
    at_rest = sum(t.numel() * t.element_size() for t in (*there.parameters(), *there.buffers()))
    assert predicted.total_bytes == at_rest + predicted.accumulating_peak_bytes


@pytest.mark.slow
def test_fused_attention_counts_as_pytorch_counts_it() -> None:
    """Fused or not, the same products: eager attention computes them with bmm, which the counter knows."""
    fused, eager = (plan(built(name), 2, 64, hardware=CPU).plain for name in ("llama-1", "llama-eager"))
    # the fused backward makes the scores again: five products instead of four
    layers, examples, heads, tokens, width = 1, 2, 4, 64, 16
    again = 2 * layers * examples * heads * tokens * tokens * width
    assert fused.flops == eager.flops + again
    assert eager.peak_bytes > fused.peak_bytes
