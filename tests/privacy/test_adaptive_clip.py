"""A clip norm that adapts: its budget, its update, its lines in the ledger, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from dpft.errors import LedgerError, PrivacyConfigError
from dpft.privacy import AdaptiveClip, Ledger, Mechanism, PrivacyConfig
from dpft.privacy.ledger_file import encode

MECHANISM = Mechanism(sampler="poisson", noise_multiplier=1.0, sample_rate=0.1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger"


def config(**changes: Any) -> PrivacyConfig:
    values = {"target_delta": 1e-3, "noise_multiplier": 1.0, "num_steps": 3, "expected_batch_size": 6, **changes}
    return PrivacyConfig(**values)


# --- the budget: what the sum gets, so that both together have the run's noise multiplier


def test_golden_values() -> None:
    """Andrew et al. 2021, Theorem 1; z = 1 with a deviation of 5 is 1 / sqrt(0.99)."""
    clip = AdaptiveClip(count_noise=5.0)
    assert clip.sum_noise_multiplier(1.0, 100) == pytest.approx(1.005037815259212, rel=1e-14)
    assert AdaptiveClip(count_noise=1.0).sum_noise_multiplier(1.2, 100) == pytest.approx(1.5, rel=1e-14)
    assert AdaptiveClip().count_std(1.0, 2000) == 100.0  # m / 20, as in the paper
    assert AdaptiveClip().count_std(2.0, 20) == 10.0


@hypothesis.given(
    z=st.floats(0.05, 100), batch=st.floats(1, 1e6), count=st.none() | st.floats(1e-3, 1e3), more=st.floats(1.01, 10)
)
@hypothesis.settings(deadline=None, derandomize=True, max_examples=200)
def test_limits(z: float, batch: float, count: float | None, more: float) -> None:
    """Never less noise on the sum than without a count; the more on the count, the less on the sum, down to z."""
    clip = AdaptiveClip(count_noise=count)
    std = clip.count_std(z, batch)
    if z >= 2 * std:
        with pytest.raises(PrivacyConfigError, match="would spend the budget"):
            clip.sum_noise_multiplier(z, batch)
        return
    of_sum = clip.sum_noise_multiplier(z, batch)
    assert of_sum >= z and of_sum >= AdaptiveClip(count_noise=more * std).sum_noise_multiplier(z, batch)
    if count is None:
        assert of_sum <= 1.0051 * z
    assert clip.sum_noise_multiplier(0.0, batch) == 0.0


def test_the_update_finds_the_quantile_and_stays_finite() -> None:
    norms = torch.linspace(0.1, 10, 1000)
    clip, current = AdaptiveClip(quantile=0.8), 0.01
    for _ in range(300):
        below = (norms <= current).sum().item()
        current = clip.next_clip_norm(current, below - 500, 1000)
    assert current == pytest.approx(float(norms.quantile(0.8)), rel=0.01)
    for count in (1e12, -1e12):
        assert 0 < clip.next_clip_norm(current, count, 1) < math.inf


# --- the ledger


def test_a_torn_line_counts_and_its_norm_is_the_one_before(path: Path) -> None:
    """Whatever part of the line of release 3 reached the disk: the release counts, its noised count is not used."""
    norms = [1.0, 0.9, 0.8, 0.75]
    with Ledger.open(path, "new", mechanism=MECHANISM) as ledger:
        for norm in norms[1:]:
            ledger.record(norm)
    whole, last = path.read_bytes(), len(path.read_bytes().splitlines(keepends=True)[-1])
    for cut in range(1, last, 7):
        path.write_bytes(whole[: len(whole) - cut])
        content = Ledger.read(path)
        assert content.count == 3
        assert content.clip_norm_after(3) == (norms[3] if cut == 1 else norms[2])
    with Ledger.open(path, "resume", mechanism=MECHANISM) as ledger:
        assert ledger.clip_norm_after(3) == norms[2]
    assert Ledger.read(path).clip_norm_after(3) == norms[2]


def test_a_norm_that_is_none_is_damage(path: Path) -> None:
    with Ledger.open(path, "new", mechanism=MECHANISM) as ledger:
        ledger.record(0.5)
    with open(path, "ab") as file:
        file.write(encode({"release": 2, "segment": 0, "next_clip_norm": -1.0}))
    with pytest.raises(LedgerError, match=r"has the clip norm -1\.0"):
        Ledger.read(path)


# --- the configuration


def test_configuration_goes_to_a_file_and_back() -> None:
    adaptive = config(adaptive_clip=AdaptiveClip(count_noise=7))
    again = PrivacyConfig.from_dict(json.loads(json.dumps(adaptive.to_dict())))
    assert again == adaptive and again.fingerprint() == adaptive.fingerprint() != config().fingerprint()
    assert "adaptive_clip" not in config().to_dict()
    with pytest.raises(PrivacyConfigError, match="not an AdaptiveClip"):
        PrivacyConfig.from_dict({**adaptive.to_dict(), "adaptive_clip": {"quantil": 0.5}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unit": "user", "examples_per_user": 2}, "its count is accounted for"),
        ({"sampler": "shuffle"}, "its count is accounted for"),
        ({"sampler": "balls_and_bins"}, "its count is accounted for"),
        ({"sampler": "cyclic_poisson", "mechanism": "bandmf", "bands": 2}, "its count is accounted for"),
        ({"sampler": "fixed_order", "mechanism": "blt", "buffers": 2}, "its count is accounted for"),
        ({"clip_function": "automatic"}, "its count is accounted for"),
        ({"adaptive_clip": 0.5}, "expected a dpft.AdaptiveClip"),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PrivacyConfigError, match=message):
        config(**{"adaptive_clip": AdaptiveClip(), **changes})


@pytest.mark.parametrize("bad", [{"quantile": 1.0}, {"quantile": 0}, {"learning_rate": math.nan}, {"count_noise": -1}])
def test_values_out_of_range(bad: dict[str, Any]) -> None:
    with pytest.raises(PrivacyConfigError, match="AdaptiveClip: "):
        AdaptiveClip(**bad)


def test_too_little_noise_on_the_count_is_refused_before_training() -> None:
    with pytest.raises(PrivacyConfigError, match="would spend the budget"):
        config(adaptive_clip=AdaptiveClip(count_noise=0.5)).resolve(12)
