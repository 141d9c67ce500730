"""`advise`: what it recommends keeps its epsilon, follows the theory, and says why."""

from __future__ import annotations

import functools
import itertools
import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf

import dpft
from dpft.planning.advice import MOST_FULL, TRAINED_BYTES, advise
from dpft.planning.advice_result import Setting
from dpft.planning.advice_rules import (
    FEWEST_STEPS,
    STEPS,
    WORTH_ITS_COST,
    WORTH_THE_STEPS,
    Cost,
    Settings,
    learning_rate,
)
from dpft.planning.result import Plan
from tests.planning.models import built, llama
from tests.planning.test_plan import plan_of

N, EPSILON, DELTA = 4096, 4.0, 1e-6
GIVEN: dict[str, Any] = {"target_epsilon": EPSILON, "target_delta": DELTA, "tokens": 64}


def advised(model: Any = 10**6, examples: int = N, **changes: Any) -> dpft.Advice:
    return advise(model, examples, **{**GIVEN, "grid": False, **changes})


@functools.cache
def settings(examples: int = N, epsilon: float = EPSILON) -> Settings:
    return Settings(examples, epsilon, DELTA, 1.0, 10**6, Cost(64, 1.0))


def at(batch: int, steps: int, examples: int = N, epsilon: float = EPSILON) -> Setting:
    found = settings(examples, epsilon).at(batch, steps)
    assert found is not None
    return found


def normal(x: float) -> float:
    """Distribution function of N(0, 1)."""
    return 0.5 * math.erfc(-x / math.sqrt(2))


@pytest.mark.slow
def test_the_recommended_training_keeps_its_epsilon() -> None:
    found = advised()
    for setting in (found.setting, *found.alternatives.values()):
        schedule = dpft.PrivacyConfig(
            noise_multiplier=setting.noise_multiplier,
            target_delta=DELTA,
            expected_batch_size=setting.batch,
            num_steps=setting.steps,
        ).resolve(N)
        assert schedule.epsilon == pytest.approx(setting.epsilon)
        assert 0.99 * EPSILON < schedule.epsilon <= EPSILON
    schedule = found.privacy().resolve(N)
    assert schedule.noise_multiplier == found.setting.noise_multiplier
    assert (schedule.num_steps, schedule.expected_batch_size) == (found.steps, found.batch)
    assert schedule.max_grad_norm == found.clip_norm
    assert found.privacy(secure_rng=True).secure_rng


def test_the_figures_of_a_setting() -> None:
    one = at(256, 400)
    sigma = one.noise_multiplier
    assert one.noise == pytest.approx(sigma / 256)
    assert one.noise_length == pytest.approx(sigma * 1000 / 256)
    assert one.signal_to_noise == pytest.approx(256 * 20 / sigma)
    assert (one.epochs, one.sample_rate, one.tokens) == (25, 1 / 16, 256 * 400 * 64)
    whole = at(N, 1)
    assert whole.share == pytest.approx(1.0)
    # One update on everything is the Gaussian mechanism: its delta by Balle and Wang 2018 (1805.06530), Theorem 8.
    sigma = whole.noise_multiplier
    shift = 1 / (2 * sigma)
    delta = normal(shift - EPSILON * sigma) - math.exp(EPSILON) * normal(-shift - EPSILON * sigma)
    assert 0.97 * DELTA < delta <= DELTA


def test_less_epsilon_is_more_noise_and_less_signal() -> None:
    loose, tight = at(256, 400), at(256, 400, epsilon=1.0)
    assert tight.noise > 1.5 * loose.noise and tight.signal_to_noise < loose.signal_to_noise / 1.5


def test_more_of_anything_is_a_higher_ratio_and_levels_off() -> None:
    by_batch = [at(b, STEPS).share for b in (128, 256, 512, 1024)]
    gains = [b / a for a, b in itertools.pairwise(by_batch)]
    assert all(gain > 1 for gain in gains) and gains == sorted(gains, reverse=True) and by_batch[-1] < 1
    assert at(256, 200).share < at(256, 400).share < at(256, 800).share
    assert at(256, 200).noise < at(256, 400).noise
    assert at(256, 400, examples=4 * N).noise < at(256, 400).noise


def test_without_a_budget_the_batch_is_the_smallest_of_which_more_is_not_worth_it() -> None:
    found = advised()
    assert found.steps == STEPS
    more, half = (found.alternatives[f"{name} the batch"] for name in ("twice", "half"))
    ratio = found.setting.signal_to_noise
    assert more.signal_to_noise < WORTH_ITS_COST * ratio and ratio >= WORTH_ITS_COST * half.signal_to_noise
    assert advised(examples=16 * N).batch > found.batch


@pytest.mark.slow  # 25 calibrations
def test_a_budget_is_kept_and_prefers_large_batches() -> None:
    for epochs in (0.5, 2, 8):
        found = advised(token_budget=epochs * N * 64)
        assert 0.9 * epochs <= found.setting.epochs <= epochs
        assert found.setting.tokens <= epochs * N * 64
        assert found.steps >= FEWEST_STEPS
        half = at(found.batch // 2, 2 * found.steps)
        assert half.signal_to_noise * WORTH_THE_STEPS < found.setting.signal_to_noise
        assert "tokens" in found.reasons["steps"]
    assert advised(token_budget=1e12).setting == advised().setting


def test_reasons_have_the_numbers_they_rest_on() -> None:
    found = advised()
    setting = found.setting
    more = found.alternatives["twice the batch"].signal_to_noise / setting.signal_to_noise
    for part in (
        f"q = {setting.sample_rate:.3g}",
        f"{setting.noise:.2e}",
        f"{setting.share:.0%}",
        f"{more:.2f} times",
        f"{setting.noise_length:.2g} times the clip norm",
    ):
        assert part in found.reasons["batch"]
    assert f"{setting.epochs:.3g} epochs" in found.reasons["steps"]
    assert f"sqrt({found.steps})" in found.reasons["learning_rate"]
    assert f"{setting.noise:.1e}" in found.reasons["clip_norm"]
    assert f"{found.parameters:,}" in found.reasons["method"]
    for reason in found.reasons.values():
        assert reason.endswith(".") and "\n" not in reason
    assert any("treated as public" in note for note in found.notes)


def test_table_and_text() -> None:
    calls: list[int] = []
    found = advised(progress=calls.append)
    assert calls == list(range(1, len(calls) + 1)) and len(calls) >= 5
    table = found.table().splitlines()
    assert len(table) == 6 and table[1].startswith("recommended") and f"{found.setting.share:.0%}" in table[1]
    assert all(reason in str(found) for reason in found.reasons.values())
    assert json.loads(json.dumps(found.to_dict()))["setting"]["batch"] == found.batch
    assert found.grid == []


@pytest.mark.slow  # 50 calibrations
def test_the_grid_surrounds_the_recommendation() -> None:
    found = advised(grid=True)
    assert len(found.grid) == 25 and found.setting in found.grid
    assert set(found.alternatives.values()) <= set(found.grid)
    small = advised(examples=40, target_epsilon=1.0, grid=True)
    assert max(setting.batch for setting in small.grid) <= 40


def test_what_trains() -> None:
    assert advised(MOST_FULL).method == "full"
    large = advised(MOST_FULL + 1)
    assert (large.method, large.trainable) == ("lora", None) and math.isnan(large.setting.noise_length)
    assert f"{TRAINED_BYTES * MOST_FULL / 1e9:.0f} GB" in large.reasons["method"]
    small = advised(llama())
    assert small.method == "full" and small.trainable == small.parameters
    adapters = advised(built("lora"))
    assert adapters.method == "as given" and adapters.trainable < 0.3 * adapters.parameters
    config = hf.LlamaConfig(vocab_size=600, hidden_size=64, intermediate_size=160, num_hidden_layers=2,
                            num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    assert advised(config).parameters == small.parameters
    torch.manual_seed(0)  # a config is built on meta tensors, whatever the generator
    assert advised(config).setting.flops == advised(small.parameters).setting.flops


def test_learning_rates() -> None:
    assert learning_rate(100, 10**6, False) == 2 * learning_rate(400, 10**6, False)
    assert learning_rate(1, 10**6, False) == learning_rate(2, 10**6, False)
    assert learning_rate(400, 10**9, False) == pytest.approx(learning_rate(400, 124 * 10**6, False) / 2, rel=0.01)
    assert learning_rate(400, 10**9, True) == pytest.approx(2 * learning_rate(400, 10**9, False))


def test_a_plan_gives_seconds_and_decides_what_trains() -> None:
    plan: Plan = plan_of("llama")
    found = advised(llama(), tokens=None, plan=plan)
    one = plan.predictions[plan.choice]
    assert found.tokens == plan.seq_len
    assert found.setting.seconds == pytest.approx(found.steps * math.ceil(found.batch / 2) * one.seconds)
    assert found.setting.flops == pytest.approx(found.steps * found.batch * one.flops / 2)
    spread = advised(llama(), tokens=None, plan=replace(plan, world_size=4))
    assert spread.setting.seconds == pytest.approx(found.setting.seconds / 4, rel=0.05)
    crowded = replace(plan, memory=1, predictions={plan.choice: replace(one, fits=False)})
    without = advised(llama(), tokens=None, plan=crowded)
    assert without.method == "lora" and without.setting.seconds is None
    assert without.trainable == 8 * sum(
        m.in_features + m.out_features for n, m in llama().named_modules() if n.endswith("_proj")
    )
    assert without.learning_rate > found.learning_rate
    with pytest.raises(ValueError, match="does not fit"):
        advised(llama(), tokens=None, plan=crowded, seconds=10.0)


@pytest.mark.slow  # 12 calibrations
def test_seconds_are_kept() -> None:
    plan, free = plan_of("llama"), advised(llama(), tokens=None, plan=plan_of("llama")).setting.seconds
    assert free is not None
    for share in (0.1, 0.01):
        found = advised(llama(), tokens=None, plan=plan, seconds=share * free)
        assert found.setting.seconds is not None and 0.8 * share * free < found.setting.seconds <= share * free
        assert "seconds" in found.reasons["steps"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": 0}, "model is 0"),
        ({"model": True}, "model is True"),
        ({"model": "llama"}, "model is a str"),
        ({"model": torch.nn.Linear(2, 2).requires_grad_(False)}, "unfreeze"),
        ({"examples": 1}, "examples is 1"),
        ({"examples": 10.0}, "examples is 10.0"),
        ({"target_epsilon": 0.0}, "target_epsilon is 0.0"),
        ({"target_epsilon": math.inf}, "target_epsilon is inf"),
        ({"target_delta": math.nan}, "target_delta is nan"),
        ({"target_delta": 1 / N}, "expected less than 1 / 4,096"),
        ({"tokens": None}, "tokens and plan are None"),
        ({"tokens": 0}, "tokens is 0"),
        ({"token_budget": -1.0}, "token_budget is -1.0"),
        ({"token_budget": 64.0}, "expected at least 10"),
        ({"seconds": 0.0}, "seconds is 0.0"),
        ({"seconds": 60.0}, "without a plan"),
        ({"plan": "h100"}, "plan is a str"),
        ({"lora_rank": 0}, "lora_rank is 0"),
        ({"grid": 5}, "grid is 5"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named_in_one_line(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("(", r"\(")) as error:
        advised(**changes)
    assert "\n" not in str(error.value)


def test_a_plan_of_other_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="tokens is 64, and the plan is of 48"):
        advised(llama(), plan=plan_of("llama"))


def test_an_epsilon_that_needs_no_noise_is_refused() -> None:
    with pytest.raises(dpft.AccountingError, match="protects nothing"):
        advised(target_epsilon=10_000.0)
