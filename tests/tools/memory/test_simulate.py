"""tools/profile_memory.py --simulate: the very bytes of a real step, and what a rank of an engine holds of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import transformers as hf

import dpft
from tests.tools.memory.measured import MIB, TINY, TOKENS, VOCAB, WIDTH, at, measured
from tools.memory.options import find_experiments
from tools.memory.setup import EXPERIMENTS, make_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A GPT-2, whose head is tied and whose attention has dropout, as `save_pretrained` leaves it."""
    config = hf.GPT2Config(
        vocab_size=VOCAB, n_embd=WIDTH, n_layer=1, n_head=2, n_positions=128, bos_token_id=0, eos_token_id=0
    )
    path = tmp_path_factory.mktemp("gpt2")
    hf.GPT2LMHeadModel(config).save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_from_a_folder(folder: str, dtype: str) -> None:
    """Weights that are mapped from a file count; a tied one once; simulated in the dtype that is asked for."""
    real = measured("flash_clip", model=folder, dtype=dtype)
    size = (VOCAB + 128 + 12 * WIDTH + 13 + 2) * WIDTH  # embeddings, a block's matrices, its vectors, the last norm
    assert real["parameters"] == size
    assert at(real, "0_model_loaded")["model_parameters"] == size * (4 if dtype == "float32" else 2)
    simulated = measured("flash_clip", model=folder, dtype=dtype, simulate=True)
    assert simulated["peak_memory_mb"] == pytest.approx(real["peak_memory_mb"], rel=0.05)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("vanilla", {}),
        ("ghost", {"batch_size": 2}),
        ("flash_clip", {}),
        ("flash_clip", {"batch_size": 2, "gradient_checkpointing": True}),
        # One block: what 16 bits and two passes change, they change in each, and both take long.
        ("flash_clip", {"batch_size": 2, "dtype": "bfloat16", "strategy": "two_pass", "num_layers": 1}),
        ("opacus_per_sample", {"batch_size": 2}),
    ],
    ids=str,
)
def test_simulated_as_real(name: str, changes: dict[str, Any]) -> None:
    """Within 5 %, in the whole and in each component."""
    real = measured(name, **changes)["breakdown"]
    simulated = measured(name, **changes, simulate=True)["breakdown"]
    assert simulated["total_allocated_mb"] == pytest.approx(real["total_allocated_mb"], rel=0.05)
    for key, mb in real.items():
        assert simulated[key] == pytest.approx(mb, abs=0.05 * real["total_allocated_mb"]), key


def test_simulated_as_planned() -> None:
    """`dpft.plan` counts the same steps with another meter."""
    model = make_model(replace(TINY, num_layers=1), EXPERIMENTS["vanilla"])
    plan = dpft.plan(model, batch_size=1, seq_len=TOKENS, optimizer="adamw")
    for name, expected in (("vanilla", plan.plain), ("flash_clip", plan.predictions["one_pass"])):
        phases = measured(name, simulate=True, strategy="one_pass", num_layers=1)["phases"]
        peak = max(p["peak_mb"] for p in phases if p["name"] in ("iter0_forward", "iter0_backward")) * MIB
        assert peak == pytest.approx(sum(plan.resting.values()) + expected.peak_bytes, rel=0.01)


def test_simulated_ranks_divide_what_their_engine_divides() -> None:
    whole = measured("flash_clip", simulate=True, num_layers=1)["snapshots"][-1]["components"]
    for engine, divided in (
        ("zero1", ["optimizer_states"]),
        ("zero2", ["optimizer_states", "gradients"]),
        ("fsdp2", ["optimizer_states", "gradients"]),
    ):
        found = measured("flash_clip", simulate=True, num_layers=1, engine=engine, world_size=4)
        rank = found["snapshots"][-1]["components"]
        copies = 1.5 if engine.startswith("zero") else 1.0  # DeepSpeed steps on a float32 copy besides two moments
        for component in ("optimizer_states", "gradients", "activation_hooks"):
            factor = 0.25 if component in divided else 1.0
            factor *= copies if component == "optimizer_states" else 1.0
            assert rank[f"{component}_mb"] == pytest.approx(factor * whole[f"{component}_mb"], rel=0.01), component
        assert found["peak_memory_mb"] == pytest.approx(found["breakdown"]["total_allocated_mb"])


@pytest.mark.slow
def test_long_context_on_the_device_and_on_the_host() -> None:
    """An input of 1,100 x 256 float32 is offloaded, and in no total; simulated as real, plain and private."""
    changes: dict[str, Any] = {"long_context": True, "hidden_dim": 256, "seq_len": 1100, "num_layers": 1}
    for name in ("vanilla", "flash_clip"):
        real, simulated = (measured(name, **changes, simulate=on) for on in (False, True))
        for found in (real, simulated):
            assert found["host"]["peak_mb"] * MIB == 1100 * 256 * 4
            assert max(mb for _, mb in found["host"]["points"]) == found["host"]["peak_mb"]
        assert simulated["tracked_peak_mb"] == pytest.approx(real["tracked_peak_mb"], rel=0.001)
        # a CPU's kernel of attention takes memory inside itself
        assert simulated["peak_memory_mb"] == pytest.approx(real["peak_memory_mb"], rel=0.05)
        # the allocator has not seen the host's copy
        assert abs(real["breakdown"]["unattributed_mb"]) < 0.01 * real["peak_memory_mb"]
    assert measured("vanilla")["host"] is None


def test_long_context_is_refused_where_checkpoints_are_reentrant() -> None:
    assert find_experiments(["vanilla", "flash_clip"], long_context=True) == ["vanilla", "flash_clip"]
    with pytest.raises(ValueError, match="opacus_fast needs reentrant checkpoints"):
        find_experiments(["vanilla", "opacus_fast"], long_context=True)
