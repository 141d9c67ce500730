"""The isolation check by gradients: one traversal tells every ordered pair of examples apart."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dpft
from dpft.clipping.probe import ProbePass, Watched, draw_seeds, mixed_examples
from dpft.errors import ClippingError


class Leak(nn.Module):
    """The output of one example gets a small part of another's."""

    def __init__(self, source: int, target: int, part: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)
        self.source, self.target, self.part = source, target, part

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        leak = torch.zeros_like(h)
        leak[self.target] = self.part * h[self.source]
        y: Tensor = self.last(h + leak)
        return y


def trained(model: nn.Module, examples: int, seed: int = 1) -> None:
    """One private backward."""
    x = torch.randn(examples, 4, 5, generator=torch.Generator().manual_seed(seed))
    dpft.clipped_loss(model, model(x).square().sum((1, 2))).backward()


def wrapped(model: nn.Module, strategy: str) -> nn.Module:
    return dpft.wrap(model, strategy=strategy, isolation="off")  # type: ignore[arg-type]  # mypy takes it for a str


@pytest.mark.parametrize("strategy", ["one_pass", "two_pass"])
@pytest.mark.parametrize("examples", [2, 3, 5])
def test_each_pair_is_seen_at_the_first_backward(examples: int, strategy: str) -> None:
    """A part of 1 % in either direction."""
    for source, target in itertools.permutations(range(examples), 2):
        with pytest.raises(ClippingError, match="first"):
            trained(wrapped(Leak(source, target, 0.01), strategy), examples)
    trained(wrapped(Leak(0, 0, 0.01), strategy), examples)


def test_the_smallest_part_is_seen_in_time() -> None:
    """1e-6 of a gradient: where the leaking loss has the larger seed, which is so every other time."""
    model = wrapped(Leak(0, 1, 1e-6), "one_pass")
    with pytest.raises(ClippingError, match="other examples' rows"):
        for _ in range(60):
            model.__dict__["_dpft_state"].probed_at = 0  # a probe is due
            trained(model, 4)


def test_what_is_apart_is_not_refused() -> None:
    """Rows of very different sizes, zero and infinite gradients among them."""
    torch.manual_seed(0)
    model = wrapped(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), "one_pass")
    x = torch.randn(7, 4, 5)
    sizes = torch.tensor([1e-30, 1e-12, 1.0, 1e6, 0.0, torch.inf, 1e18])
    for _ in range(4):
        dpft.clipped_loss(model, (model(x) * sizes.view(-1, 1, 1)).sum((1, 2))).backward()
        model.zero_grad()


class Recomputed(nn.Module):
    """A checkpoint whose dropout is another one in each traversal; rows may be mixed."""

    def __init__(self, mixing: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.drop, self.mixing = nn.Linear(5, 6), nn.Linear(6, 3), nn.Dropout(0.5), mixing

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = h - h.mean(0) if self.mixing else h
        y: Tensor = checkpoint(lambda t: self.last(self.drop(t)), h, use_reentrant=False, preserve_rng_state=False)
        return y


def test_random_numbers_of_a_recomputation_are_no_mixing() -> None:
    """And do not hide any."""
    trained(wrapped(Recomputed(mixing=False), "one_pass"), 4)
    with pytest.raises(ClippingError, match="other examples' rows"):
        trained(wrapped(Recomputed(mixing=True), "one_pass"), 4)


def test_seeds() -> None:
    """Powers of two, all different while they can be; in float16 one half of the losses."""
    for examples in (2, 3, 17, 61):
        seeds = draw_seeds(torch.zeros(examples), narrow=False)
        assert len(seeds.unique()) == examples and torch.equal(seeds.log2(), seeds.log2().round())
        assert seeds.min() == 1 and seeds.max() <= 2.0**60
    assert draw_seeds(torch.zeros(500), narrow=False).isfinite().all()
    assert sorted(draw_seeds(torch.zeros(5, dtype=torch.float16), narrow=True).tolist()) == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("spoil", [lambda g: g.mul_(1.01), lambda g: g[2].fill_(1e-9)], ids=["all", "a zero"])
def test_rows_are_compared(spoil: Callable[[Tensor], Tensor]) -> None:
    seeds = torch.tensor([1.0, 4.0, 0.0])
    probe, watched = ProbePass(seeds), Watched()
    g = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    watched.look("w", g)
    other = g * seeds.view(-1, 1, 1)
    spoil(other)
    probe.watched.look("w", other)
    mixed, reached = mixed_examples(probe, watched)
    assert bool(mixed["w"]) and bool(reached)
