"""The method chosen per layer: never the Gram above its crossover T = 2 p d / (p + d)."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from dpft.clipping import strategy_choice
from dpft.kernels.linear import linear_sq_norm, method_flops
from dpft.rules.base import EmbeddingUse, LinearUse

size = st.integers(1, 4096)


@hypothesis.given(tokens=st.integers(1, 16384), p=size, d=size)
@hypothesis.settings(max_examples=300)
def test_gram_never_above_its_crossover(tokens: int, p: int, d: int) -> None:
    if strategy_choice.choose_method(tokens, p, d) in ("gram", "gram_full"):
        assert tokens * (p + d) < 2 * p * d


@hypothesis.given(tokens=st.integers(1, 4096), p=size, d=size)
@hypothesis.settings(max_examples=300)
def test_choice_is_the_cheapest(tokens: int, p: int, d: int) -> None:
    # The small products of the Gram method take 1.25 times the time of large ones.
    cost = {
        m: (1.25 if m == "gram" else 1) * method_flops(m, tokens, p, d) for m in ("gram", "feature", "materialise")
    }
    assert cost[strategy_choice.choose_method(tokens, p, d)] <= min(cost.values())


@pytest.mark.parametrize(("tokens", "p", "d"), [(8, 64, 64), (63, 64, 64), (65, 64, 64), (200, 64, 96), (129, 8, 512)])
@pytest.mark.parametrize("method", ["gram", "feature", "materialise", "auto"])
def test_flops_are_what_the_choice_assumes(method: str, tokens: int, p: int, d: int) -> None:
    """Counted by PyTorch, not by our own formula."""
    x, g = torch.ones(2, tokens, p), torch.ones(2, tokens, d)
    with FlopCounterMode(display=False) as counter:
        linear_sq_norm(x, g, method)
    named = strategy_choice.choose_method(tokens, p, d) if method == "auto" else method
    assert counter.get_total_flops() == pytest.approx(2 * method_flops(named, tokens, p, d), rel=0.02)
    if method == "auto":
        assert counter.get_total_flops() <= 2 * 1.02 * 2 * tokens * p * d


@hypothesis.given(tokens=st.integers(1, 4096), batch=st.integers(1, 16), p=st.integers(1, 512), d=st.integers(1, 512))
@hypothesis.settings(max_examples=200)
def test_the_choice_for_all_ranks_covers_every_length(tokens: int, batch: int, p: int, d: int) -> None:
    """Where it picks one-pass, what one-pass keeps fits, however long the batch that a rank meets."""
    uses = [LinearUse("a", d, p), EmbeddingUse("b", 100, d)]
    gradient = (p * d + 100 * d) * 4
    for allowed in (0, gradient // 2, gradient, 3 * gradient, 20 * gradient):
        for shards in (False, True):
            choice = strategy_choice.choose_for_all(uses, batch, 4, allowed, shards_gradients=shards, gathers=shards)
            kept = strategy_choice.kept_bytes(uses, batch, tokens, 4) - (0 if shards else gradient)
            assert choice.strategy == "two_pass" or kept <= allowed
            assert ("gathered once more" in choice.reason) == (shards and choice.strategy == "two_pass")


def test_the_choice_for_all_ranks_counts_the_whole_gradient_where_the_engine_shards_it() -> None:
    uses = [LinearUse("a", 64, 64)]
    assert strategy_choice.choose_for_all(uses, 1, 4, 0, shards_gradients=False, gathers=False).strategy == "one_pass"
    for allowed, strategy in ((64 * 64 * 4 - 1, "two_pass"), (64 * 64 * 4, "one_pass")):
        choice = strategy_choice.choose_for_all(uses, 1, 4, allowed, shards_gradients=True, gathers=True)
        assert choice.strategy == strategy


@hypothesis.given(tokens=st.integers(1, 4096), batch=st.integers(1, 8), p=st.integers(1, 512), d=st.integers(1, 512))
@hypothesis.settings(max_examples=100)
def test_details_add_up_to_what_is_kept(tokens: int, batch: int, p: int, d: int) -> None:
    """Per matrix what the whole is decided by; norms cost work of their own only where no gradient is made."""
    uses = [LinearUse("a", d, p), LinearUse("b", p, d, transposed=True), EmbeddingUse("c", 100, d)]
    kept = strategy_choice.use_details(uses, "one_pass", batch, tokens, 4)
    assert [detail.key for detail in kept] == ["a", "b", "c"]
    assert sum(detail.kept for detail in kept) == strategy_choice.kept_bytes(uses, batch, tokens, 4)
    for detail in kept[:2]:
        assert (detail.method == "materialise") == (detail.flops == 0)
        assert batch > 1 or detail.method == "materialise"
    for detail in strategy_choice.use_details(uses, "two_pass", batch, tokens, 4):
        assert detail.kept == 0 and detail.method != "materialise"
    for detail in strategy_choice.use_details(uses, "per_example", batch, tokens, 4):
        assert detail.kept == detail.flops == 0 and detail.method == "materialise"
    head = strategy_choice.use_details(uses[:1], "two_pass", batch, tokens, 4)[0]
    assert head.flops == batch * method_flops(strategy_choice.choose_method(tokens, p, d), tokens, p, d)
