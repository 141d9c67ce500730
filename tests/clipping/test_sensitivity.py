"""Neighbouring datasets: adding one example moves the clipped sum by at most C (1 + 1e-6), whatever the example.

In the manner of jax_privacy's `test_clip_sum_sensitivity`: no formula of ours, only two datasets. The sums are
float32; their difference is taken in float64.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import dpft
from dpft.errors import PrivacyConfigError
from tests import oracle, zoo
from tests.clipping.against_oracle import (
    FLOAT32_LIMIT,
    STRATEGIES,
    case_of,
    check,
    check_stats,
    make_case,
    private_loss,
)

SLACK = 1e-6
few = hypothesis.settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
)
CLIPS: tuple[dict[str, Any], ...] = (
    {"clip_function": "abadi"},
    {"clip_function": "automatic", "clip_gamma": 0.01},
    {"clip_function": "automatic", "clip_gamma": 1e-6},
    {"clip_function": "automatic", "clip_gamma": 1e-16},  # near the smallest: factors of up to 1e18
)


def clipped(entry: zoo.Entry, batch: oracle.Batch, **wrap: Any) -> dict[str, Tensor]:
    """The float32 clipped sum of a fresh model, as float64."""
    model = dpft.wrap(entry.build(), **wrap)
    private_loss(entry, model, batch, wrap["strategy"]).backward()
    return {n: g.double() for n, g in oracle.grads_of(model).items()}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return float(torch.stack([(a[n] - b[n]).square().sum() for n in a]).sum().sqrt())


def norm(a: dict[str, Tensor]) -> float:
    return distance(a, {n: torch.zeros_like(g) for n, g in a.items()})


@pytest.mark.parametrize("clip", CLIPS, ids=lambda c: "-".join(str(v) for v in c.values()))
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("entry", [zoo.LLAMA_TIED, zoo.GPT2, zoo.OPT, zoo.BERT], ids=str)
def test_random_examples(entry: zoo.Entry, strategy: str, clip: dict[str, Any]) -> None:
    """A batch, the batch without its last example, and that example alone; C well below every norm."""
    batch = entry.batch(examples=5, seed=11)
    for bound in (1e-3, 1.0):
        wrap = {"strategy": strategy, "max_grad_norm": bound, **clip}
        with_it = clipped(entry, batch, **wrap)
        without = clipped(entry, oracle.rows(batch, range(4)), **wrap)
        alone = clipped(entry, oracle.row(batch, 4), **wrap)
        assert distance(with_it, without) <= bound * (1 + SLACK)
        assert norm(alone) <= bound * (1 + SLACK)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_automatic_is_below_c_by_its_definition(strategy: str) -> None:
    """A gradient of norm n contributes C n / (n + gamma): of a bias, n is the scale of the loss."""
    entry = replace(ADVERSARY, build=zoo.seeded(lambda a: nn.Linear(4, 1)), losses=scaled_outputs)
    for scale in (0.0, 1e-20, 1e-12, 1e-3, 1.0, 1e6):
        batch = {"x": torch.zeros(1, 4), "scale": torch.tensor([scale])}
        for gamma in (1e-16, 0.01, 3.0):
            clip = {"clip_function": "automatic", "clip_gamma": gamma, "max_grad_norm": 2.0}
            alone = norm(clipped(entry, batch, strategy=strategy, **clip))
            assert alone == pytest.approx(2.0 * scale / (scale + gamma), rel=1e-6)
            assert alone <= 2.0 * (1 + SLACK)


@pytest.mark.parametrize(("gamma", "bound"), [(1e-45, 1.0), (1e-19, 1.0), (1e-16, 1e3)])
def test_a_gamma_that_leaves_float32_s_range_is_refused(gamma: float, bound: float) -> None:
    """Before it was, the contribution of a gradient of norm 0 was NaN at 1e-45, and infinite at norm 1e-38."""
    clip: dict[str, Any] = {"clip_function": "automatic", "clip_gamma": gamma, "max_grad_norm": bound}
    with pytest.raises(ValueError, match="would leave float32's range"):
        dpft.wrap(Adversary(), **clip)
    with pytest.raises(PrivacyConfigError, match="would leave float32's range"):
        dpft.PrivacyConfig(target_delta=1e-5, expected_batch_size=4, noise_multiplier=1, num_steps=1, **clip)
    dpft.wrap(Adversary(), clip_gamma=gamma, max_grad_norm=bound)  # not used


@pytest.mark.parametrize("clipping", ["flash", "ghost", "fast", "per_sample"])
def test_the_smallest_clip_norm_and_one_below_it(clipping: Any) -> None:
    """Before smaller ones were refused, the squares of entries of 1e-23 were 0 with "fast", and with them the norm: at
    a C of 1e-23 this gradient was not clipped, and its contribution was 500 times that.
    """
    bound, model = 2.0**-40, nn.Linear(500, 500, bias=False)
    dpft.wrap(model, clipping=clipping, max_grad_norm=bound)
    for entries in (1e-23, 1e-17, 1e-12, 1.0):
        model.zero_grad()
        dpft.clipped_loss(model, model(torch.ones(2, 500)).sum(-1) * entries, torch.tensor([1.0, 0.0])).backward()
        alone = float(model.weight.grad.double().norm())  # type: ignore[union-attr]  # there is one
        assert alone == pytest.approx(min(bound, 500 * entries), rel=1e-5)
    with pytest.raises(ValueError, match=r"expected at least 2\^-40"):
        dpft.wrap(Adversary(), max_grad_norm=bound / 2)
    with pytest.raises(PrivacyConfigError, match=r"expected at least 2\^-40"):
        dpft.PrivacyConfig(
            target_delta=1e-5, expected_batch_size=4, noise_multiplier=1, num_steps=1, max_grad_norm=bound / 2
        )


def scaled_outputs(model: nn.Module, batch: oracle.Batch) -> Tensor:
    return model(batch["x"]).sum(-1) * batch["scale"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_identical_examples(strategy: str) -> None:
    """Eight times the same example: rounding errors point the same way, and still the bound holds."""
    batch = oracle.rows(zoo.token_batch(examples=1), [0] * 8)
    wrap = {"strategy": strategy, "max_grad_norm": 0.5}
    sums = [clipped(zoo.LLAMA_TIED, oracle.rows(batch, range(k)), **wrap) for k in (1, 2, 7, 8)]
    assert norm(sums[0]) <= 0.5 * (1 + SLACK)
    assert distance(sums[1], sums[0]) <= 0.5 * (1 + SLACK)
    assert distance(sums[3], sums[2]) <= 0.5 * (1 + SLACK)


class Adversary(nn.Module):
    """Biases, norms, a shared scale: small enough for hypothesis to steer a gradient anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.norm = nn.LayerNorm(8)
        self.rms = nn.RMSNorm(8, eps=1e-6)
        self.last = nn.Linear(8, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.rms(torch.tanh(self.norm(self.first(x)))))


def adversary_losses(model: nn.Module, batch: oracle.Batch) -> Tensor:
    y = model(batch["x"])
    return (y.square().sum(-1) + y.sum(-1)) * batch["scale"]


ADVERSARY = zoo.Entry(
    "adversary",
    zoo.seeded(lambda a: Adversary()),
    zoo.vector_batch,
    adversary_losses,
    causal=False,
    checkpointing=False,
)
magnitude = st.sampled_from([0.0, 1e-30, 1e-12, 1e-4, 1.0, 1e4, 1e12, 1e19, 1e30, 3e38, float("inf"), float("nan")])


@hypothesis.given(
    strategy=st.sampled_from(STRATEGIES),
    clip=st.sampled_from(CLIPS),
    bound=st.sampled_from([1e-4, 1.0, 100.0]),
    others=st.integers(0, 4),
    inputs=magnitude,
    losses=magnitude,
    negative=st.booleans(),
    seed=st.integers(0, 5),
)
@hypothesis.settings(few, max_examples=80)
def test_adversarial_example(
    strategy: str,
    clip: dict[str, Any],
    bound: float,
    others: int,
    inputs: float,
    losses: float,
    negative: bool,
    seed: int,
) -> None:
    """Inputs and losses of any magnitude, NaN and infinity among them."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(others + 1, 4, generator=g)
    scale = torch.ones(others + 1)
    x[-1] *= inputs
    scale[-1] = -losses if negative else losses
    batch = {"x": x, "scale": scale}
    wrap = {"strategy": strategy, "max_grad_norm": bound, **clip}
    with_it = clipped(ADVERSARY, batch, **wrap)
    assert all(bool(t.isfinite().all()) for t in with_it.values())
    if others:
        without = clipped(ADVERSARY, oracle.rows(batch, range(others)), **wrap)
    else:
        without = {n: torch.zeros_like(t) for n, t in with_it.items()}
    assert distance(with_it, without) <= bound * (1 + SLACK)


@hypothesis.given(
    strategy=st.sampled_from(STRATEGIES),
    tokens=st.lists(st.integers(0, zoo.VOCAB - 1), min_size=2, max_size=10),
    repeat=st.booleans(),
    tied=st.booleans(),
)
def test_adversarial_tokens(strategy: str, tokens: list[int], repeat: bool, tied: bool) -> None:
    """Repeated tokens and a tied head: the cross term of the embedding is where a norm is easily too small."""
    entry = zoo.LLAMA_TIED if tied else zoo.LLAMA_GQA
    ids = torch.tensor([tokens[:1] * len(tokens) if repeat else tokens])
    batch = {"input_ids": ids, "labels": ids}
    alone = clipped(entry, batch, strategy=strategy, max_grad_norm=0.1)
    assert norm(alone) <= 0.1 * (1 + SLACK)


@hypothesis.given(
    entry=st.sampled_from([zoo.LLAMA_TIED, zoo.GEMMA, zoo.GPT2, zoo.OPT, zoo.BERT, zoo.LORA, zoo.MLP_TOKENS]),
    strategy=st.sampled_from(STRATEGIES),
    examples=st.integers(1, 6),
    tokens=st.integers(2, 33),
    seed=st.integers(0, 3),
)
@hypothesis.settings(few, max_examples=30)
def test_shapes(entry: zoo.Entry, strategy: str, examples: int, tokens: int, seed: int) -> None:
    """Any shape agrees with the oracle."""
    check(case_of(entry, examples=examples, tokens=tokens, seed=seed), strategy=strategy)


@hypothesis.given(
    examples=st.integers(1, 4),
    tokens=st.integers(1, 20),
    inputs=st.integers(1, 20),
    outputs=st.integers(1, 20),
    bias=st.booleans(),
    extra=st.booleans(),
    strategy=st.sampled_from(STRATEGIES),
)
@hypothesis.settings(few, max_examples=40)
def test_linear_shapes(
    examples: int, tokens: int, inputs: int, outputs: int, bias: bool, extra: bool, strategy: str
) -> None:
    """One linear layer on both sides of every crossover, also with a dimension more ([B, T, 2, p])."""
    shape = (examples, tokens, 2, inputs) if extra else (examples, tokens, inputs)
    g = torch.Generator().manual_seed(examples * 1000 + tokens)

    def losses_of(m: nn.Module, batch: oracle.Batch) -> Tensor:
        return m(batch["x"]).square().flatten(1).sum(1)

    entry = zoo.Entry(
        "linear",
        zoo.seeded(lambda a: nn.Linear(inputs, outputs, bias=bias)),
        zoo.vector_batch,
        losses_of,
        False,
        False,
    )
    case = make_case(entry, {"x": torch.randn(shape, generator=g)})
    model = dpft.wrap(case.build(), strategy=strategy, max_grad_norm=case.max_grad_norm)
    private_loss(entry, model, case.batch, strategy).backward()
    # Of so few numbers plain PyTorch's own error is a matter of luck, from 0 to a few ulps: only the absolute limit.
    assert oracle.relative_error(oracle.grads_of(model), case.exact.clipped_sum(case.max_grad_norm)) <= FLOAT32_LIMIT
    check_stats(case, model)
