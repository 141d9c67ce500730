"""Gram norms from float32 products: never below the norm of what is released, whatever the rounding."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import dpft
from dpft.kernels import gram, reference
from dpft.kernels.devices import double_cost, from_table
from dpft.kernels.gram import InputCache, gram_single
from dpft.kernels.impl import resolve_impl
from dpft.kernels.linear import linear_sq_norm, upper_sq_norm
from dpft.kernels.weighted import weighted_linear_grad

ELEMENTS = 1 << 19


@pytest.fixture(autouse=True)
def always_single(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for products that are so small that they are made in float64."""
    monkeypatch.setattr(gram, "_SMALL", 0)


def hostile(tokens: int, p: int, d: int, seed: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Pairs ``[2, T, p]``, ``[2, T, d]`` whose rounding errors point the same way, or whose Gram sum cancels."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    signs = torch.ones(1, tokens, 1)
    signs[:, 1::2] = -1
    halves = torch.ones(1, tokens, 1)
    halves[:, tokens // 2 :] = -1
    ramp = torch.linspace(0, 1e-4, tokens).view(1, tokens, 1)
    ones = torch.ones(2, tokens, 1)
    yield "random", normal(2, tokens, p), normal(2, tokens, d)
    yield "alike and opposite", normal(2, 1, p) + 1e-3 * normal(2, tokens, p), normal(2, 1, d) * signs
    yield "two groups", normal(2, 1, p) + 1e-2 * normal(2, tokens, p), normal(2, 1, d) * halves
    yield (
        "equal terms",
        (ones + ramp).expand(-1, -1, p).contiguous(),
        ((1 + ramp) * signs).expand(2, -1, d).contiguous(),
    )
    yield "tiny and huge", 1e-25 * normal(2, tokens, p), 1e15 * normal(2, tokens, d)


@pytest.mark.parametrize(("tokens", "p", "d"), [(33, 96, 64), (128, 512, 96), (150, 64, 2048)])
def test_the_bound_covers_the_error(tokens: int, p: int, d: int) -> None:
    """Without computing anything again: the estimate and its bound alone."""
    for seed in range(2):
        for name, x, g in hostile(tokens, p, d, seed):
            sq, error, sizes = gram._single(x, g, ELEMENTS, None)
            exact = reference.linear_sq_norm(x, g)
            assert (sq + error >= exact).all(), name
            expected = (x.double().norm(dim=2) * g.double().norm(dim=2)).sum(1)
            if name == "random":
                assert (error <= 2e-4 * exact).all()
                torch.testing.assert_close(sizes, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["alike and opposite", "two groups", "equal terms", "tiny and huge"])
def test_what_float32_cannot_tell_is_computed_again(name: str) -> None:
    for kind, x, g in hostile(128, 256, 64, 1):
        if kind == name:
            exact = reference.linear_sq_norm(x, g)
            assert (upper_sq_norm(x, g, "gram") >= exact * (1 - 1e-12)).all()
            torch.testing.assert_close(linear_sq_norm(x, g, "gram"), exact, rtol=1e-3, atol=0)


def test_only_the_examples_that_need_it_are_computed_again() -> None:
    x, g = torch.randn(4, 64, 32), torch.randn(4, 64, 32)
    x[2], g[2, 1::2] = x[2, :1], -g[2, ::2]
    again = []

    def counted(x: Tensor, g: Tensor) -> Tensor:
        again.append(len(x))
        return reference.linear_sq_norm(x, g)

    sums = gram_single(x, g, ELEMENTS, counted)
    torch.testing.assert_close(sums.sq, reference.linear_sq_norm(x, g), rtol=1e-5, atol=1e-6)
    assert again == [1] and sums.error[2] == 0 and (sums.error[[0, 1, 3]] > 0).all()


def test_infinity_and_nan_stay_with_their_example() -> None:
    x, g = torch.randn(3, 20, 8), torch.randn(3, 20, 8)
    x[0, 3, 1], g[2, 5] = torch.inf, torch.nan
    found = upper_sq_norm(x, g, "gram")
    assert not found[0].isfinite() and not found[2].isfinite()
    torch.testing.assert_close(found[1:2], reference.linear_sq_norm(x[1:2], g[1:2]), rtol=1e-4, atol=0)


def test_products_of_an_input_are_remembered_only_while_it_is_the_same() -> None:
    cache = InputCache()
    x, g, h = torch.randn(2, 24, 96), torch.randn(2, 24, 64), torch.randn(2, 24, 64)
    assert torch.equal(upper_sq_norm(x, g, inputs=cache), upper_sq_norm(x, g))
    made = cache.get(x, "gram", list)
    assert made and cache.get(x.view(2, 24, 96), "gram", list) is made, "a view of the same memory"
    assert torch.equal(upper_sq_norm(x, h, inputs=cache), upper_sq_norm(x, h))
    x.mul_(2)
    assert torch.equal(upper_sq_norm(x, g, inputs=cache), upper_sq_norm(x, g))


@pytest.mark.parametrize("strategy", ["one_pass", "two_pass"])
@pytest.mark.parametrize("kind", ["random", "alike and opposite", "two groups", "equal terms"])
def test_a_neighbour_moves_the_sum_by_at_most_c(kind: str, strategy: str) -> None:
    """One product over the tokens of all examples, of scaled operands: what that rounds is in the norm."""
    bound = 1e-2
    for seed in range(3):
        x, g = next((x, g) for name, x, g in hostile(64, 48, 40, seed) if name == kind)
        x, g = torch.cat([x, torch.randn(2, 64, 48)]), torch.cat([g, torch.randn(2, 64, 40)])
        sums = []
        for keep in ([1.0, 1, 1, 1], [0.0, 1, 1, 1]):
            layer = nn.Linear(48, 40, bias=False)
            dpft.wrap(layer, strategy=strategy, max_grad_norm=bound)  # type: ignore[arg-type]  # mypy takes it for a str
            dpft.clipped_loss(layer, (layer(x) * g).sum((1, 2)), torch.tensor(keep)).backward()
            assert layer.weight.grad is not None
            sums.append(layer.weight.grad.double())
        assert float((sums[0] - sums[1]).norm()) <= bound * (1 + 1e-6)


@pytest.mark.parametrize(("p", "d"), [(20, 50), (50, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_product_is_the_weighted_sum(p: int, d: int, dtype: torch.dtype) -> None:
    """Whichever operand is scaled, in one piece or several, with rows that are dropped or known to be finite."""
    x, g = torch.randn(5, 700, p).to(dtype), torch.randn(5, 700, d).to(dtype)
    factors = torch.tensor([0.3, 0.0, 1.0, 1e-6, 0.7], dtype=torch.float64)
    out = torch.float64 if dtype == torch.float64 else torch.float32
    exact = torch.einsum("b,bdp->dp", factors, reference.linear_grad(x, g))
    for inputs in (None, InputCache()):
        for finite in (True, False):
            found = weighted_linear_grad(x, g, factors, out, finite, inputs)
            assert (found - exact).norm() <= 1e-6 * exact.norm()
            if inputs is not None:
                inputs.clear()
    x[1, 3], g[1, 5] = torch.inf, torch.nan
    found = weighted_linear_grad(x, g, factors, out)
    assert found.isfinite().all() and (found - exact).norm() <= 1e-6 * exact.norm()


def test_devices() -> None:
    ratio = {
        name: from_table("float32_over_float64", name)
        for name in ("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-40GB", "NVIDIA A10G", "Tesla T4", "NVIDIA L40S", "new")
    }
    assert list(ratio.values()) == [1, 1, 64, 32, 64, None]
    assert from_table("float32_over_float64", "NVIDIA GeForce RTX 4090") == 64
    assert double_cost(torch.device("cpu")) == 2


def test_auto_takes_what_was_verified_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(1)
    assert resolve_impl(x, "auto")[0] == "torch"
    monkeypatch.setattr("dpft.kernels.impl.fastest_impl", lambda device: "triton")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert resolve_impl(x, "auto") == ("triton", "the fastest that was verified on such a device")


@pytest.mark.parametrize("strategy", ["one_pass", "two_pass"])
def test_scaling_an_operand_does_not_overflow(strategy: str) -> None:
    """Automatic clipping multiplies small gradients by far more than 1, also one of huge inputs and tiny gradients."""
    x, g = torch.randn(3, 16, 48), torch.randn(3, 16, 56)
    x[0], g[0] = 1e36 * x[0], 1e-43 * g[0]
    layer = nn.Linear(48, 56, bias=False)
    dpft.wrap(
        layer,
        strategy=strategy,  # type: ignore[arg-type]  # mypy takes it for a str
        max_grad_norm=100.0,
        clip_function="automatic",
        clip_gamma=1e-6,
        isolation="off",
    )
    dpft.clipped_loss(layer, (layer(x) * g).sum((1, 2))).backward()
    assert layer.weight.grad is not None and bool(layer.weight.grad.isfinite().all())
