"""Neighbouring datasets for a clip norm that adapts: one example moves sum and count, in units of noise, by 1 / z."""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import dpft
from dpft.clipping.factors import ClipCount
from tests import oracle, zoo
from tests.oracle import Batch
from tests.training import config


class Votes(nn.Module):
    """Its gradient is what the batch says."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def joint(batch: Batch, strategy: Any, schedule: dpft.PrivacySchedule) -> Tensor:
    """Sum and count of a batch, float64, in units of their noise: what the Gaussian mechanism gets."""
    assert schedule.count_noise is not None
    model = dpft.wrap(zoo.seeded(lambda a: Votes())(), strategy=strategy, max_grad_norm=schedule.max_grad_norm)
    state = model.__dict__["_dpft_state"]
    state.count = ClipCount()
    if strategy == "per_example":
        losses: Any = [(model(x[None]).sum() * s) for x, s in zip(batch["x"], batch["scale"], strict=True)]
    else:
        losses = model(batch["x"]).sum(1) * batch["scale"]
    dpft.clipped_loss(model, losses, batch.get("example_weight")).backward()
    total = torch.cat([g.double().flatten() for g in oracle.grads_of(model).values()])
    count = torch.tensor([state.count.take() / 2], dtype=torch.float64)
    return torch.cat([total / (schedule.sum_noise_multiplier * schedule.max_grad_norm), count / schedule.count_noise])


magnitude = st.sampled_from([0.0, 1e-30, 1e-3, 0.1, 1.0, 1e4, 1e19, 3e38, float("inf"), float("nan")])


@hypothesis.given(
    strategy=st.sampled_from(["one_pass", "two_pass", "per_example"]),
    z=st.sampled_from([0.3, 1.0, 4.0]),
    share=st.sampled_from([0.51, 0.7, 5.0]),
    others=st.integers(1, 4),
    inputs=magnitude,
    scale=magnitude,
    seed=st.integers(0, 3),
)
@hypothesis.settings(
    deadline=None, derandomize=True, max_examples=15, suppress_health_check=list(hypothesis.HealthCheck)
)
def test_one_example_moves_sum_and_count_by_at_most_one_over_z(
    strategy: str, z: float, share: float, others: int, inputs: float, scale: float, seed: int
) -> None:
    schedule = config(
        noise_multiplier=z, max_grad_norm=0.5, adaptive_clip=dpft.AdaptiveClip(count_noise=share * z)
    ).resolve(12)
    g = torch.Generator().manual_seed(seed)
    batch = {"x": torch.randn(others + 1, 4, generator=g), "scale": torch.ones(others + 1)}
    batch["x"][-1] *= inputs
    batch["scale"][-1] = scale
    with_it = joint(batch, strategy, schedule)
    without = joint(oracle.rows(batch, range(others)), strategy, schedule)
    distance = float((with_it - without).norm())
    assert distance <= (1 + 1e-6) / z
    moved = abs(float(with_it[-1] - without[-1])) * share * z
    assert moved == pytest.approx(0.5)  # a vote each, also of what is not finite
    if scale == 1e4 and inputs == 1.0:
        assert distance >= (1 - 1e-6) / z  # the bound is reached: no noise is wasted
    # One example that replaces another: both vectors are bounded.
    other = oracle.rows(batch, [*range(others), 0])
    assert float((joint(other, strategy, schedule) - with_it).norm()) <= 2 * (1 + 1e-6) / z


def test_padding_rows_do_not_vote() -> None:
    schedule = config(adaptive_clip=dpft.AdaptiveClip()).resolve(12)
    batch = {"x": torch.ones(4, 4), "scale": torch.full((4,), 1e-3)}
    weights = {"example_weight": torch.tensor([1.0, 0.0, float("nan"), 1.0])}
    for strategy in ("one_pass", "two_pass", "per_example"):
        assert float(joint({**batch, **weights}, strategy, schedule)[-1]) * 5.0 == 1.0  # two of four
