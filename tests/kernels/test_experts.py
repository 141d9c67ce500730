"""Segments of one expert and one example: products, gradients, norms and their bound, against a loop over pairs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dpft.kernels import experts
from dpft.kernels.experts import Routing, regroup, route, segments
from dpft.kernels.weighted import RowWeights

E, K, B, T = 5, 2, 3, 40


def index_of(kind: str) -> Tensor:
    """``[B * T, k]``; some slots are of no expert, and expert 3 is empty."""
    g = torch.Generator().manual_seed(3)
    index = torch.randint(0, E + 1, (B * T, K), generator=g)
    if kind == "uneven":
        index = torch.where(torch.rand(index.shape, generator=g) < 0.8, 1, index)
    index[T : 2 * T] = index[T : 2 * T].clamp(max=2)  # example 1 never uses the last expert
    return torch.where(index == 3, 0, index)


def hostile() -> Iterator[tuple[str, Tensor, Tensor]]:
    """Pairs in the batch's order: random ones, and tokens that are alike with gradients that cancel."""
    g = torch.Generator().manual_seed(4)
    x, y = torch.randn(B * T * K, 24, generator=g), torch.randn(B * T * K, 16, generator=g)
    signs = torch.ones(len(y), 1)
    signs[::2] = -1
    yield "random", x, y
    yield "cancels", x[:1] + 1e-3 * x, y[:1] * signs
    yield "equal terms", torch.ones_like(x), signs * torch.linspace(1, 1 + 1e-4, len(y)).unsqueeze(1).expand_as(y)


def grads_of(index: Tensor, x: Tensor, g: Tensor, owner: list[int]) -> Tensor:
    """``[examples, E, d, p]`` float64, pair by pair; ``owner``: the example of each row."""
    out = torch.zeros(max(owner) + 1, E, g.shape[1], x.shape[1], dtype=torch.float64)
    for n, e in enumerate(index.flatten().tolist()):
        if e < E:
            out[owner[n // (T * K)], e] += torch.outer(g[n].double(), x[n].double())
    return out


@pytest.fixture(params=["whole", "in chunks", "alone"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether segments fit into one batch, into several, or are so long that each comes alone."""
    elements = {"whole": 1 << 19, "in chunks": 2200, "alone": 1}[request.param]
    monkeypatch.setattr(experts, "edge_and_elements", lambda x: (16, elements))
    return str(request.param)


def sorted_pairs(kind: str, x: Tensor, g: Tensor) -> tuple[Routing, Tensor, Tensor]:
    routing = route(index_of(kind), E, B)
    return routing, x[routing.order], g[routing.order]


@pytest.mark.parametrize("kind", ["spread", "uneven"])
def test_every_pair_is_in_one_segment(kind: str, tiles: str) -> None:
    """Of its expert and its example; what is behind a segment is zero, whatever is there in the batch."""
    index = index_of(kind)
    number = torch.arange(1.0, B * T * K + 1).unsqueeze(1)
    routing, x, g = sorted_pairs(kind, number, number.clone())
    nowhere = routing.chosen == E
    x[nowhere], g[nowhere] = torch.nan, torch.nan
    seen, sizes = [], []
    for which, xs, gs in segments(routing, x, g, product=False):
        assert torch.equal(xs, gs)
        sizes.append(len(which))
        for s, row in zip(which.tolist(), xs[:, :, 0], strict=True):
            pairs = row[row != 0].long() - 1
            assert (index.flatten()[pairs] == s // B).all() and (pairs // (T * K) == s % B).all()
            seen += pairs.tolist()
    assert sorted(seen) == (index.flatten() < E).nonzero().flatten().tolist()
    assert (max(sizes) > 1) == (tiles != "alone")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["spread", "uneven"])
def test_gradients_and_sums(kind: str, dtype: torch.dtype, tiles: str) -> None:
    _, x, g = next(hostile())
    routing, xs, gs = sorted_pairs(kind, x.to(dtype), g.to(dtype))
    exact = grads_of(index_of(kind), x.to(dtype), g.to(dtype), list(range(B)))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2.0**-8}[dtype]
    grads, sq = experts.experts_grad_sq_norm(routing, xs, gs, "auto")
    torch.testing.assert_close(grads.double(), exact, rtol=tolerance, atol=tolerance * float(exact.abs().max()))
    torch.testing.assert_close(sq, grads.double().square().sum((1, 2, 3)), rtol=1e-6, atol=0)
    twice = experts.add_experts_grad(routing, xs, gs, grads.double())
    torch.testing.assert_close(twice, 2 * exact, rtol=2 * tolerance, atol=2 * tolerance * float(exact.abs().max()))
    factors = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    wide = torch.promote_types(dtype, torch.float32)
    released = experts.weighted_experts_grad(routing, xs, gs, RowWeights(factors), wide)
    expected = (factors.view(-1, 1, 1, 1) * exact).sum(0)
    assert released.dtype == wide
    error = float((released.double() - expected).norm() / expected.norm())
    assert error <= (1e-12 if dtype == torch.float64 else 1e-6)  # products in 16 bits are not rounded to them


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["spread", "uneven"])
def test_the_norm_bounds_what_is_released(
    kind: str, dtype: torch.dtype, single: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each example, by a factor that scaling rounds, also where its terms cancel; and by how little it is above."""
    if single:
        monkeypatch.setattr("dpft.kernels.gram._SMALL", 0)
    for name, x, g in hostile():
        routing, xs, gs = sorted_pairs(kind, x.to(dtype), g.to(dtype))
        upper = experts.experts_upper_sq_norm(routing, xs, gs, None, "auto").sqrt()
        exact = grads_of(index_of(kind), x.to(dtype), g.to(dtype), list(range(B)))
        for i in range(B):
            factors = torch.zeros(B, dtype=torch.float64)
            factors[i] = 1 / 3
            released = experts.weighted_experts_grad(routing, xs, gs, RowWeights(factors), torch.float32)
            assert released.double().norm() / factors[i] <= upper[i], name
        if name == "random":
            slack = 1e-5 if dtype == torch.float32 else 2.0**-7
            assert (upper <= exact.flatten(1).norm(dim=1) * (1 + slack)).all()


def test_the_ways_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's grouped product, which leaves rows of no expert as they are in memory, and sums under TF32."""
    _, x, g = next(hostile())
    routing, xs, gs = sorted_pairs("uneven", x, g)
    w = torch.randn(E, 24, 16)
    plain = experts.grouped_product(xs, w, routing)
    expected = torch.stack([xs[n] @ w[e] if e < E else torch.zeros(16) for n, e in enumerate(routing.chosen.tolist())])
    torch.testing.assert_close(plain, expected)
    weights = RowWeights(torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64))
    gs[routing.example_of == 1] = torch.nan
    released = experts.weighted_experts_grad(routing, xs, gs, weights, torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr(experts, "_is_native", lambda x, w: True)
        patch.setattr(experts, "on_gpu", lambda t: True)
        patch.setattr(experts, "rounds_inputs", lambda x: True)
        torch.testing.assert_close(experts.grouped_product(xs, w, routing), plain)
        again = experts.weighted_experts_grad(routing, xs, gs, weights, torch.float32)
    assert released.isfinite().all()
    torch.testing.assert_close(again, released, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("owner", [[0, 0, 1], [1, 0, 1]])
def test_rows_of_one_example(owner: list[int]) -> None:
    _, x, g = next(hostile())
    routing, xs, gs = sorted_pairs("uneven", x, g)
    joined, moved = regroup(routing, torch.tensor(owner), 2)
    exact = grads_of(index_of("uneven"), x, g, owner)
    sq = experts.experts_upper_sq_norm(joined, xs[moved], gs[moved], None, "auto")
    torch.testing.assert_close(sq, exact.square().sum((1, 2, 3)), rtol=1e-5, atol=0)
    assert torch.equal(joined.by_row(xs[moved]), x.view(B, T * K, -1))


def test_bias(tiles: str) -> None:
    _, x, g = next(hostile())
    routing, _, gs = sorted_pairs("spread", x, g)
    exact = grads_of(index_of("spread"), torch.ones(len(x), 1), g, list(range(B))).squeeze(3)
    torch.testing.assert_close(experts.bias_grads(gs, routing).double(), exact, rtol=1e-5, atol=1e-5)
    bias = torch.randn(E, 16)
    added = experts.add_bias_(torch.zeros_like(gs), bias, routing)
    assert torch.equal(added, torch.cat([bias, torch.zeros(1, 16)])[routing.chosen])


def test_few_lengths_and_little_padding() -> None:
    """A batch of segments for each length would be a loop over segments."""
    counts = torch.arange(1, 4097).numpy()
    padded = experts._padded(counts)
    assert (padded >= counts).all() and (padded <= counts * (1 + 2.0**-experts._STEPS)).all()
    assert len(set(padded.tolist())) <= 2 ** (experts._STEPS + 1) + 8 * 2**experts._STEPS


def test_nothing_at_all() -> None:
    """No tokens; no rows."""
    for tokens, rows in ((0, 2), (0, 0)):
        routing = route(torch.empty(tokens, K, dtype=torch.long), E, rows)
        x, g = torch.empty(0, 24), torch.empty(0, 16)
        assert experts.grouped_product(x, torch.ones(E, 24, 16), routing).shape == (0, 16)
        assert experts.experts_upper_sq_norm(routing, x, g, None, "auto").tolist() == [0.0] * rows
        weights = RowWeights(torch.ones(rows, dtype=torch.float64))
        assert not experts.weighted_experts_grad(routing, x, g, weights, torch.float32).any()
