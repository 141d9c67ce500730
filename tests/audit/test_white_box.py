"""The white-box audit of the real loop: what it recovers, what it refuses, and that it sees half the noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dpft import GaussianNoise, PrivacyConfig, PrivacyConfigError
from dpft.audit import plot, white_box
from dpft.audit.expected import ExpectedGradients
from tests.fixed_draws import fixed_draws
from tests.oracle import oracle
from tests.training import collate, config, examples, new_accelerator, tiny_llama

EXAMPLES = 60


def audited(privacy: PrivacyConfig | None = None, model: Any = None, **options: Any) -> Any:
    with fixed_draws(0):
        return white_box(
            new_accelerator,
            tiny_llama() if model is None else model,
            examples(EXAMPLES),
            privacy or config(max_grad_norm=0.5),
            **{"collate_fn": collate, "steps": 20, "canaries": 4, "max_physical_batch_size": 4, **options},
        )


def test_expected_gradients_are_the_oracles() -> None:
    model, items = tiny_llama(), examples(3)
    schedule = config(max_grad_norm=0.5, expected_batch_size=2).resolve(3)
    expected = ExpectedGradients(model, items, collate, schedule)
    exact = oracle(model, collate(items))
    total = torch.cat([p.flatten() for p in exact.clipped_sum(0.5).values()])
    # both take the cross entropy of float32 logits, as transformers does, over rows of another shape
    assert torch.allclose(sum(expected.of(i) for i in range(3)), total, rtol=1e-6, atol=3e-8)


@pytest.mark.parametrize("clip", ["abadi", pytest.param("automatic", marks=pytest.mark.slow)])
def test_a_sound_run_is_recovered(clip: str, tmp_path: Path) -> None:
    found = audited(config(max_grad_norm=0.5, clip_function=clip, noise_multiplier=0.7))
    assert not found.violated, found.describe()
    assert found.measured["noise_multiplier"] == pytest.approx(0.7, rel=0.01)
    assert found.measured["max_grad_norm"] == pytest.approx(0.5, rel=0.3)
    assert found.epsilon_lower < found.claimed["epsilon"]
    assert len(found.members) + len(found.others) == 20 * 4
    json.dumps(found.to_dict(), allow_nan=False)
    plot(found, tmp_path / "audit.png")
    assert (tmp_path / "audit.png").read_bytes().startswith(b"\x89PNG")


def test_half_the_noise_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    add = GaussianNoise.add_
    monkeypatch.setattr(GaussianNoise, "add_", lambda self, tensor, std, place=None: add(self, tensor, std / 2, place))
    found = audited(restart=False)
    assert found.violated and found.measured["noise_multiplier"] == pytest.approx(0.5, rel=0.02)
    assert "VIOLATED" in found.describe() and "noise multiplier" in [check.name for check in found.failed]


@pytest.mark.parametrize("sampler", [{"sampler": "fixed_size", "accountant": "rdp"}, {"sampler": "shuffle"}])
def test_other_samplers(sampler: dict[str, str]) -> None:
    found = audited(config(max_grad_norm=0.5, **sampler))
    assert not found.violated, found.describe()


def test_what_cannot_be_audited_is_refused() -> None:
    with pytest.raises(PrivacyConfigError, match="noise above 0"):
        audited(config(noise_multiplier=0.0))
    with pytest.raises(ValueError, match="expected float32"):
        audited(model=tiny_llama().bfloat16())
    with pytest.raises(ValueError, match="no loss"):
        audited(collate_fn=lambda items: {"input_ids": collate(items)["input_ids"]})
