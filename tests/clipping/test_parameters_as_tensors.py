"""Parameters that are written into other tensors, changed in place, or meet an input that is none of the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dpft
from tests import zoo
from tests.clipping.against_oracle import check, make_case

ROWS = 3
both = pytest.mark.parametrize("strategy", ["one_pass", "two_pass"])


class Uses(nn.Module):
    """A layer of a forward ``(layer, x [B, T, 4]) -> [B, T, ...]`` with parameters ``w [4, 4]``, ``v [4]``."""

    def __init__(self, use: Callable[..., Tensor]) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))
        self.linear = nn.Linear(4, 4)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


class Net(nn.Module):
    """The layer behind another, so that its input has a gradient; or ``first``, so that it has none."""

    def __init__(self, use: Callable[..., Tensor], first: bool) -> None:
        super().__init__()
        self.before = nn.Identity() if first else nn.Linear(4, 4)
        self.uses = Uses(use)
        self.after = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.uses(self.before(x))).tanh().flatten(1).square().sum(1)


def entry_of(use: Callable[..., Tensor], first: bool = False) -> zoo.Entry:
    return zoo.Entry(
        use.__name__,
        zoo.seeded(lambda a: Net(use, first)),
        lambda **_: {"x": torch.randn(ROWS, 5, 4, generator=torch.Generator().manual_seed(0))},
        lambda model, batch: model(batch["x"]),
        causal=False,
    )


def written(layer: Any, x: Tensor) -> Tensor:
    """FourierFT's and OFT's way to a matrix."""
    dense = torch.zeros(4, 4, dtype=x.dtype)
    dense[[0, 1, 2, 3], [2, 0, 3, 1]] = layer.v
    return layer.linear(x @ dense) * layer.w[0]


def added_under_another_name(layer: Any, x: Tensor) -> Tensor:
    """What is written into under one name is used under another."""
    total = torch.zeros(4, dtype=x.dtype)
    alias = total
    alias += layer.v
    return layer.linear(x * total) * layer.w[0]


def summed_in_place(layer: Any, x: Tensor) -> Tensor:
    """A series of powers, each added to an identity."""
    power, series = layer.w, torch.eye(4, dtype=x.dtype)
    for _ in range(3):
        series.add_(power, alpha=0.5)
        power = power @ layer.w
    series += torch.diag(layer.v)
    return layer.linear(x @ series)


def identity_through_a_linear_layer(layer: Any, x: Tensor) -> Tensor:
    """DoRA's and PEANuT's way to the product of their factors."""
    matrix = layer.linear(torch.eye(4, dtype=x.dtype))
    return x @ matrix @ layer.w + layer.v


def einsum_with_dots(layer: Any, x: Tensor) -> Tensor:
    x = torch.einsum("...rk,rkc->...rc", x.unflatten(-1, (2, 2)), layer.w.view(2, 2, 4)[..., :2])
    return layer.linear(x.flatten(-2)) * layer.v


EXACT = (written, added_under_another_name, summed_in_place, identity_through_a_linear_layer, einsum_with_dots)


@both
@pytest.mark.parametrize("first", [False, True], ids=["", "first"])
@pytest.mark.parametrize("use", EXACT)
def test_exact(use: Any, first: bool, strategy: str) -> None:
    entry = entry_of(use, first)
    case = make_case(entry, entry.batch())
    assert all(grad.any() for grad in case.exact.grads[0].values())
    check(case, strategy=strategy)


class Tied(nn.Module):
    """MobileBERT's: the head reads a table, transposed, beside a matrix of its own, and calls neither layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.decoder, self.dense = nn.Linear(4, 7, bias=False), nn.Linear(7, 2, bias=False)
        self.decoder.weight = self.table.weight
        self.wide = nn.Linear(4, 6)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wide(self.table(ids).tanh())
        x = x.matmul(torch.cat([self.decoder.weight.t(), self.dense.weight], 0))
        return x.tanh().flatten(1).square().sum(1)


@both
@pytest.mark.parametrize("rows", [1, ROWS])
def test_a_table_that_a_head_reads_transposed(rows: int, strategy: str) -> None:
    """Its per-example gradients are transposed in memory; those that are released are as the parameter is."""
    entry = zoo.Entry(
        "tied",
        zoo.seeded(lambda a: Tied()),
        lambda **_: {"ids": torch.randint(0, 7, (rows, 5), generator=torch.Generator().manual_seed(0))},
        lambda model, batch: model(batch["ids"]),
        causal=False,
    )
    model = check(make_case(entry, entry.batch()), strategy=strategy)
    assert all(p.grad is not None and p.grad.is_contiguous() for p in model.parameters())


def a_view_is_written(layer: Any, x: Tensor) -> Tensor:
    dense = torch.zeros(4, 4, dtype=x.dtype)
    dense[0].copy_(layer.v)
    return layer.linear(x @ dense) * layer.w[0]


def a_view_is_read(layer: Any, x: Tensor) -> Tensor:
    dense = torch.zeros(4, 4, dtype=x.dtype)
    view = dense[0]
    dense[0] = layer.v
    return layer.linear(x * view) * layer.w[0]


def changed_after_its_use(layer: Any, x: Tensor) -> Tensor:
    scale = layer.v.exp()
    x = x * scale
    scale *= 2
    return layer.linear(x + scale) * layer.w[0]


def changed_under_a_view(layer: Any, x: Tensor) -> Tensor:
    matrix = layer.w.exp()
    row = matrix[0]
    matrix.add_(1)
    return layer.linear(x * row) * layer.v


def changed_itself(layer: Any, x: Tensor) -> Tensor:
    layer.v.mul_(0.5)
    return layer.linear(x * layer.v) * layer.w[0]


@both
@pytest.mark.parametrize(
    ("use", "why"),
    [
        (a_view_is_written, "v is given to .*copy_ which writes it into a view"),
        (a_view_is_read, "v'.* does not report"),
        (changed_after_its_use, "v is given to .*mul_ which changes it in place"),
        (changed_under_a_view, "w is given to .*add_ which changes it in place"),
        (changed_itself, "v is given to .*mul_ which changes it in place"),
    ],
)
def test_refused(use: Any, why: str, strategy: Any) -> None:
    entry = entry_of(use)
    model = dpft.wrap(entry.build(), strategy=strategy)
    with pytest.raises(dpft.UnsupportedModuleError, match=f"uses.{why}"):
        dpft.clipped_loss(model, entry.losses(model, entry.batch())).backward()


class Selects(nn.Module):
    """Tokens of all rows, selected from an input without a gradient: of no row in particular."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        chosen = x.flatten(0, 1)[[0, 2, 3, 4]]
        out = x.new_zeros(len(x) * 5, 4)
        out[[0, 2, 3, 4]] = self.linear(chosen)
        return out.view(x.shape).flatten(1).square().sum(1)


@both
def test_a_selection_of_tokens_is_refused(strategy: Any) -> None:
    """Also where nothing that needs a gradient ever meets it, up to the losses."""
    model = dpft.wrap(Selects(), strategy=strategy, isolation="off")  # which would see it by values
    with pytest.raises(dpft.UnsupportedModuleError, match=r"the losses are computed of linear\.bias, linear\.weight"):
        dpft.clipped_loss(model, model(torch.randn(ROWS, 5, 4))).backward()
