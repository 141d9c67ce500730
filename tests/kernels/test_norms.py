"""The kernels against the float64 reference, and where rounding could understate a norm."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dpft
from dpft.kernels import embedding_sq_norm, linear_sq_norm, reference
from dpft.kernels.embedding import head_rows_at_tokens, weighted_embedding_grad
from dpft.kernels.linear import sq_norm
from dpft.kernels.weighted import weighted_linear_grad

METHODS = ("auto", "gram", "gram_full", "feature", "materialise")


def pair(batch: int, tokens: int, p: int, d: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, p, generator=generator), torch.randn(batch, tokens, d, generator=generator)


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=25)
@given(shape=st.tuples(st.integers(0, 4), st.integers(0, 300), st.integers(1, 40), st.integers(1, 40)))
def test_linear_sq_norm(method: str, shape: tuple[int, int, int, int]) -> None:
    x, g = pair(*shape)
    torch.testing.assert_close(linear_sq_norm(x, g, method), reference.linear_sq_norm(x, g), rtol=3e-6, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_wide_layers_are_tiled(method: str) -> None:
    x, g = pair(2, 70, 5000, 700)
    torch.testing.assert_close(linear_sq_norm(x, g, method), reference.linear_sq_norm(x, g), rtol=3e-6, atol=0)
    torch.testing.assert_close(linear_sq_norm(g, x, method), reference.linear_sq_norm(x, g), rtol=3e-6, atol=0)


def test_shapes_that_do_not_fit_are_refused() -> None:
    x, g = pair(2, 3, 4, 5)
    for bad in ((x[:1], g), (x, g[:, :2]), (x[0], g[0])):
        with pytest.raises(ValueError, match="expected x"):
            linear_sq_norm(*bad)
    with pytest.raises(ValueError, match="method"):
        linear_sq_norm(x, g, "flash")  # type: ignore[arg-type]  # what is tested


def test_squares_of_millions_of_elements_are_exact() -> None:
    """torch's float32 vector_norm over one such run is off by 5e-4 on a CPU."""
    v = torch.randn(2, 5_000_001, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sq_norm(v), v.double().square().sum(1), rtol=3e-7, atol=0)


@pytest.mark.parametrize("method", ["gram", "gram_full"])
def test_gradients_that_cancel_are_not_understated(method: str) -> None:
    """Tokens alike in x and opposite in g: a Gram sum of 16,000 terms of size 1e4 whose value is some 1e2."""
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(1, 1, 96, generator=generator) + 1e-3 * torch.randn(1, 128, 96, generator=generator)
        g = torch.randn(1, 1, 96, generator=generator) * torch.tensor([1.0, -1.0]).repeat(64).view(1, -1, 1)
        exact = reference.linear_sq_norm(x, g)
        assert (linear_sq_norm(x, g, method) >= exact * (1 - 1e-6)).all(), seed


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("strategy", ["one_pass", "two_pass"])
def test_bf16_contributions_stay_within_c(strategy: str, batch: int) -> None:
    """What is released of one example has norm at most C, though norm and gradient are rounded to bf16 separately."""
    worst = 0.0
    for seed in range(40):
        torch.manual_seed(seed)
        model = torch.nn.Linear(24, 24, bias=False).bfloat16()
        dpft.wrap(model, strategy=strategy, max_grad_norm=1e-3)  # type: ignore[arg-type]  # mypy takes it for a str
        model.weight.grad_dtype = torch.float32  # as DPOptimizer sets it: the sum is not rounded
        x = torch.randn(batch, 6, 24).bfloat16()
        losses = (model(x).float() * torch.randn(batch, 6, 24)).sum((1, 2))
        dpft.clipped_loss(model, losses, torch.eye(batch)[0]).backward()
        assert model.weight.grad is not None
        worst = max(worst, float(model.weight.grad.double().norm()))
    assert worst <= 1e-3 * (1 + 1e-6), worst
    assert worst >= 1e-3 * (1 - 2.0**-7), "clipped far more than the rounding needs"


@pytest.mark.parametrize(("batch", "tokens"), [(1, 40), (3, 40), (3, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_16_bit_products_are_not_rounded_to_16_bits(batch: int, tokens: int, dtype: torch.dtype) -> None:
    """Each contribution is bounded by its norm; a sum that is rounded after clipping may be larger."""
    x, g = (t.to(dtype) for t in pair(batch, tokens, 12, 20))
    factors = torch.rand(batch, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    exact = torch.einsum("b,bdp->dp", factors, reference.linear_grad(x, g))
    found = weighted_linear_grad(x, g, factors, torch.float32).double()
    assert (found - exact).norm() <= 1e-6 * exact.norm()


def test_an_example_that_is_dropped_leaves_no_nan() -> None:
    x, g = pair(3, 5, 4, 6)
    x[1], g[1, 2] = torch.inf, torch.nan
    factors = torch.tensor([0.5, 0.0, 1.0], dtype=torch.float64)
    expected = 0.5 * reference.linear_grad(x[:1], g[:1])[0] + reference.linear_grad(x[2:], g[2:])[0]
    for repeats in (1, 40):  # one product of copies, and one product per example
        xs, gs = x.repeat(1, repeats, 1), g.repeat(1, repeats, 1)
        torch.testing.assert_close(
            weighted_linear_grad(xs, gs, factors, torch.float32), (expected * repeats).float(), rtol=1e-5, atol=1e-4
        )


@pytest.mark.parametrize("padding_idx", [None, 4])
def test_embeddings(padding_idx: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 9, (3, 40), generator=generator)
    g, h, g_head = (torch.randn(3, n, m, generator=generator) for n, m in ((40, 6), (11, 6), (11, 9)))
    alone = reference.embedding_sq_norm(ids, g, 9, padding_idx)
    torch.testing.assert_close(embedding_sq_norm(ids, g, padding_idx), alone, rtol=3e-6, atol=0)
    rows = head_rows_at_tokens(ids, h, g_head, padding_idx)
    tied = alone + linear_sq_norm(h, g_head) + 2 * (rows.double() * g).sum((1, 2))
    torch.testing.assert_close(tied, reference.tied_sq_norm(ids, g, h, g_head, padding_idx), rtol=3e-6, atol=0)
    factors = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    expected = torch.einsum("b,bvd->vd", factors, reference.embedding_grad(ids, g, 9, padding_idx))
    got = weighted_embedding_grad(ids, g, factors, torch.zeros(9, 6), padding_idx)
    torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-5)
