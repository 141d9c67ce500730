"""Opacus's own grad-sample tests, which its wheel ships, run against dpft's norms and clipped sums.

The shapes are those of Opacus's hypothesis strategies; ``run_test``, through which all of its tests go, is replaced by
one that judges dpft. Opacus compares with float32 microbatches and returns early on an empty batch; here the oracle is
float64, one example at a time, and an empty batch must come out as zero.
"""

from __future__ import annotations

import copy
import functools
import unittest
from typing import Any

import pytest
import torch
from opacus.tests.grad_samples import common, embedding_test, layer_norm_test, linear_test, rms_norm_test
from torch import Tensor, nn

import dpft

CASES = (
    (linear_test.Linear_test, "test_input_bias"),
    (embedding_test.Embedding_test, "test_input_across_dims"),
    (layer_norm_test.LayerNorm_test, "test_input_norm"),
    (rms_norm_test.RMSNorm_test, "test_input_norm"),
)
ROUTES = (("flash", "one_pass"), ("flash", "two_pass"), ("ghost", "two_pass"), ("flash", "per_example"))
ROUTE_IDS = [f"{clipping}-{strategy}" for clipping, strategy in ROUTES]
LAYERS = (nn.Linear(5, 7), nn.Embedding(9, 5), nn.LayerNorm(5), nn.RMSNorm(5))
TOLERANCE = 1e-5  # of the whole gradient, float32 against float64; Opacus's own is 1e-4 and 1e-5 absolute


@functools.cache
def instance(case: type[unittest.TestCase], method: str) -> Any:
    """One instance for all routes: hypothesis objects to a test method that several instances run."""
    return case(method)


def losses_of(out: Tensor, reduction: str) -> Tensor:
    """Per-example losses ``[B]``: Opacus's L1 distance from zero, over each example's own output."""
    distances = out.abs().flatten(1)
    return distances.sum(1) if reduction == "sum" else distances.mean(1)


def oracle(module: nn.Module, x: Tensor, reduction: str) -> list[dict[str, Tensor]]:
    """Gradient of each example alone, in float64."""
    module = copy.deepcopy(module).double()
    gradients = []
    for i in range(len(x)):
        x_i = x[i : i + 1]
        loss = losses_of(module(x_i.double() if x.is_floating_point() else x_i), reduction).sum()
        names, parameters = zip(*module.named_parameters(), strict=True)
        gradients.append(dict(zip(names, torch.autograd.grad(loss, parameters), strict=True)))
    return gradients


def norm_of(gradient: dict[str, Tensor]) -> float:
    return sum(float(g.double().square().sum()) for g in gradient.values()) ** 0.5


def check(x: Tensor, module: nn.Module, reduction: str, clipping: Any, strategy: Any) -> None:
    """Hold dpft's norms, clip factors and clipped sum of one layer against the oracle. ``x`` is ``[B, ...]``."""
    gradients = oracle(module, x, reduction)
    norms = [norm_of(g) for g in gradients]
    max_grad_norm = 0.9 * sum(norms) / len(norms) if any(norms) else 1.0  # clips some examples, of one the only one
    factors = [min(1.0, max_grad_norm / n) if n else 1.0 for n in norms]

    model = copy.deepcopy(module)
    dpft.wrap(model, clipping=clipping, max_grad_norm=max_grad_norm, strategy=strategy)
    dpft.clipped_loss(model, losses_of(model(x), reduction)).backward()

    got = dpft.stats(model)
    assert got.norms.shape == got.clip_factors.shape == (len(x),)
    assert got.norms.dtype == got.clip_factors.dtype == torch.float32
    torch.testing.assert_close(got.norms.double(), torch.tensor(norms, dtype=torch.float64), rtol=TOLERANCE, atol=1e-6)
    torch.testing.assert_close(
        got.clip_factors.double(), torch.tensor(factors, dtype=torch.float64), rtol=TOLERANCE, atol=1e-6
    )
    expected: dict[str, Tensor] = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in module.named_parameters()}
    for factor, gradient in zip(factors, gradients, strict=True):
        for name, g in gradient.items():
            expected[name] += factor * g
    difference = {n: p.grad.double() - expected[n] for n, p in model.named_parameters() if p.grad is not None}
    if len(x):
        assert difference.keys() == expected.keys(), "a parameter was left without a gradient"
    # By what was added up, not by the sum: examples may cancel, and rounding does not cancel with them.
    assert norm_of(difference) <= TOLERANCE * sum(f * n for f, n in zip(factors, norms, strict=True))


@pytest.mark.parametrize(("clipping", "strategy"), ROUTES[:2], ids=ROUTE_IDS[:2])
@pytest.mark.parametrize(("case", "method"), CASES, ids=[case.__name__ for case, _ in CASES])
def test_opacus_grad_sample(
    case: type[unittest.TestCase], method: str, clipping: str, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_sizes = []

    def run_test(self: unittest.TestCase, x: Tensor, module: nn.Module, batch_first: bool = True, **_: Any) -> None:
        if not batch_first:
            x = x.transpose(0, 1)  # dpft takes the batch first; that another order is refused is tested below
        batch_sizes.append(len(x))
        for reduction in ("sum", "mean"):
            check(x, module, reduction, clipping, strategy)

    monkeypatch.setattr(common.GradSampleHooks_test, "run_test", run_test)
    getattr(instance(case, method), method)()
    assert len(batch_sizes) >= 20, "the adapter was hardly called: did Opacus rename run_test?"


@pytest.mark.parametrize(("clipping", "strategy"), ROUTES, ids=ROUTE_IDS)
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_empty_batch(layer: nn.Module, clipping: str, strategy: str) -> None:
    x = torch.zeros(0, 3, dtype=torch.long) if isinstance(layer, nn.Embedding) else torch.zeros(0, 3, 5)
    for reduction in ("sum", "mean"):
        check(x, layer, reduction, clipping, strategy)


def test_checker_notices_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum that is off by one part in ten thousand does not pass."""
    x, module = torch.randn(3, 4, 5), nn.Linear(5, 7)
    check(x, module, "sum", "flash", "two_pass")
    right = dpft.clipped_loss
    monkeypatch.setattr(dpft, "clipped_loss", lambda model, losses: right(model, losses) * 1.0001)
    with pytest.raises(AssertionError):
        check(x, module, "sum", "flash", "two_pass")


class _BatchSecond(nn.Module):
    """Calls its layer with the batch in the second dimension, as Opacus's ``batch_first=False`` does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x.transpose(0, 1)).transpose(0, 1)
        return out


def test_batch_in_second_place_is_refused() -> None:
    model = dpft.wrap(_BatchSecond(), clipping="flash", strategy="two_pass")
    with pytest.raises((ValueError, RuntimeError), match="batch"):
        dpft.clipped_loss(model, losses_of(model(torch.randn(2, 3, 5)), "sum")).backward()
