"""Rules of one's own, and the checker that holds any rule against the gradients of one example at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dpft
from dpft.rules import registry
from tests.clipping.nets import Net, exact_or_refused, x_batch

norm_strategies = pytest.mark.parametrize("strategy", ["one_pass", "two_pass"])


class Distances(nn.Module):
    """Squared distances to trained points: by a function that dpft does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.points = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(x, self.points).square()


def gradient(layer: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[Any, Tensor]:
    """Of sum_k (x_k - p_k)^2."""
    (x,) = activations
    difference = layer.points - x.unsqueeze(2)  # [B, T, points, 6]
    return {layer.points: 2 * torch.einsum("btp,btpd->bpd", backprops, difference)}


@pytest.fixture
def registered() -> Iterator[None]:
    """The registry as it was, afterwards."""
    before = dict(registry._RULES)
    yield
    registry._RULES.clear()
    registry._RULES.update(before)


@norm_strategies
@pytest.mark.usefixtures("registered")
def test_a_rule_as_opacus_has_them(strategy: str) -> None:
    assert exact_or_refused(lambda: Net(Distances()), x_batch(), strategy) == "refused"
    dpft.register_rule(Distances)(gradient)
    assert exact_or_refused(lambda: Net(Distances()), x_batch(), strategy) == "exact"
    assert dpft.check_rule(Distances(), torch.randn(3, 5, 6)) < 1e-12
    assert dpft.check_rule(nn.Sequential(nn.Linear(6, 6), Distances()), torch.randn(3, 5, 6)) < 1e-12


@norm_strategies
@pytest.mark.usefixtures("registered")
def test_a_module_that_is_run_row_by_row(strategy: str) -> None:
    assert exact_or_refused(lambda: Net(nn.Sequential(Distances())), x_batch(), strategy) == "refused"
    dpft.register_rule(Distances, "rows")
    assert exact_or_refused(lambda: Net(nn.Sequential(Distances())), x_batch(), strategy) == "exact"


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (lambda layer, a, g: {layer.points: 1.001 * gradient(layer, a, g)[layer.points]}, "differ by 0.0009"),
        (lambda layer, a, g: {layer.points: gradient(layer, a, g)[layer.points].roll(1, 0)}, "other examples"),
        (lambda layer, a, g: {}, "gave None for 'module.points'"),
        (lambda layer, a, g: {"points": gradient(layer, a, g)[layer.points].sum(0)}, r"expected .* \[B, 6, 6\]"),
    ],
)
def test_a_wrong_rule_is_found(wrong: Any, why: str) -> None:
    dpft.register_rule(Distances, wrong)
    with pytest.raises(dpft.ClippingError, match=why):
        dpft.check_rule(Distances(), torch.randn(3, 5, 6))


@pytest.mark.usefixtures("registered")
def test_rows_that_act_on_each_other_are_found() -> None:
    class Mixed(Distances):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + x.mean(0, keepdim=True))

    dpft.register_rule(Mixed, gradient)
    with pytest.raises(dpft.ClippingError):
        dpft.check_rule(Mixed(), torch.randn(3, 5, 6))


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (nn.Linear(6, 3), (torch.randn(3, 5, 6),)),
        (nn.Embedding(7, 3, padding_idx=1), (torch.randint(0, 7, (3, 5)),)),
        (nn.MultiheadAttention(6, 2, batch_first=True), (torch.randn(3, 5, 6),) * 3),
        (nn.LSTMCell(6, 4), (torch.randn(3, 6),)),
        (nn.EmbeddingBag(7, 3), (torch.randint(0, 7, (3, 5)),)),
        (nn.ConvTranspose1d(5, 4, 3), (torch.randn(3, 5, 6),)),
        (nn.Conv3d(1, 2, 2, stride=2), (torch.randn(3, 1, 4, 4, 4),)),
        (nn.InstanceNorm1d(5, affine=True), (torch.randn(3, 5, 6),)),
        (nn.Bilinear(6, 6, 2), (torch.randn(3, 6), torch.randn(3, 6))),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_layers_of_torch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    assert dpft.check_rule(module, *inputs) < 1e-9


def test_what_is_no_rule() -> None:
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        dpft.register_rule(dict, gradient)  # type: ignore[arg-type]  # what a user may pass
    with pytest.raises(TypeError, match="'rows'"):
        dpft.register_rule(Distances, "columns")  # type: ignore[arg-type]  # what a user may pass
