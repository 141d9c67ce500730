"""The planner's choice per layer: never the Gram above its crossover T = 2 p d / (p + d)."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from dpft.clipping import planner
from dpft.kernels.linear import linear_sq_norm, method_flops

size = st.integers(1, 4096)


@hypothesis.given(tokens=st.integers(1, 16384), p=size, d=size)
@hypothesis.settings(max_examples=300)
def test_gram_never_above_its_crossover(tokens: int, p: int, d: int) -> None:
    if planner.choose_method(tokens, p, d) in ("gram", "gram_full"):
        assert tokens * (p + d) < 2 * p * d


@hypothesis.given(tokens=st.integers(1, 4096), p=size, d=size)
@hypothesis.settings(max_examples=300)
def test_choice_is_the_cheapest(tokens: int, p: int, d: int) -> None:
    # Gram products are made in float64 and count twice.
    cost = {m: (2 if m == "gram" else 1) * method_flops(m, tokens, p, d) for m in ("gram", "feature", "materialise")}
    assert cost[planner.choose_method(tokens, p, d)] <= min(cost.values())


@pytest.mark.parametrize(("tokens", "p", "d"), [(8, 64, 64), (63, 64, 64), (65, 64, 64), (200, 64, 96), (129, 8, 512)])
@pytest.mark.parametrize("method", ["gram", "feature", "materialise", "auto"])
def test_flops_are_what_the_planner_thinks(method: str, tokens: int, p: int, d: int) -> None:
    """Counted by PyTorch, not by our own formula."""
    x, g = torch.ones(2, tokens, p), torch.ones(2, tokens, d)
    with FlopCounterMode(display=False) as counter:
        linear_sq_norm(x, g, method)
    named = planner.choose_method(tokens, p, d) if method == "auto" else method
    assert counter.get_total_flops() == pytest.approx(2 * method_flops(named, tokens, p, d), rel=0.02)
    if method == "auto":
        assert counter.get_total_flops() <= 2 * 1.02 * 2 * tokens * p * d
