"""Small modules whose forward a test bends, and the comparison that takes a refusal for an answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import dpft
from dpft.errors import DPFTError
from tests import oracle
from tests.clipping.against_oracle import clipped_loss


class Net(nn.Module):
    """A module under test between two linear layers: x [B, T, 6] -> [B, T, 6]."""

    def __init__(
        self, middle: nn.Module | None = None, forward: Callable[[Any, Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.middle = middle
        self.last = nn.Linear(6, 6)
        self.way = forward

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.way is not None:
            h = self.way(self, h)
        elif self.middle is not None:
            h = self.middle(h)
        return self.last(torch.tanh(h))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


def x_batch(examples: int = 3, tokens: int = 5) -> dict[str, Tensor]:
    return {"x": torch.randn(examples, tokens, 6, generator=torch.Generator().manual_seed(1))}


def losses_of(model: nn.Module, batch: oracle.Batch) -> Tensor:
    y = model(batch["x"])
    return y.square().flatten(1).mean(1) + y.flatten(1).mean(1)


def step(model: nn.Module, strategy: str, batch: dict[str, Tensor] | None = None) -> None:
    """One private backward."""
    clipped_loss(model, losses_of, batch or x_batch(), strategy).backward()


def exact_or_refused(
    make: Callable[[], nn.Module],
    batch: dict[str, Tensor],
    strategy: str,
    change: Callable[[nn.Module], Any] = lambda model: None,
) -> str:
    """Runs a private step, on a model after `change`, and compares with the oracle; says which of the two it was."""
    plain = seeded(make)
    exact = oracle.oracle(plain, batch, losses_of)
    bound = float(exact.norms.median())
    try:
        private = seeded(make)
        change(private)
        model = dpft.wrap(private, strategy=strategy, max_grad_norm=bound)
        step(model, strategy, batch)
    except DPFTError:
        return "refused"
    assert oracle.relative_error(oracle.grads_of(model), exact.clipped_sum(bound)) <= 1e-5
    torch.testing.assert_close(dpft.stats(model).norms.double(), exact.norms, rtol=1e-5, atol=0)
    return "exact"


def no_gradient(model: nn.Module) -> bool:
    """Nothing was left in `.grad`."""
    return all(p.grad is None or bool((p.grad == 0).all()) for p in model.parameters())
