"""Parameters, clipped sums and a private optimiser without a model: what the tests of `DPOptimizer` share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

import dpft

SECRET = b"noise of the tests of the optimiser"
SIGMA, C, B = 0.7, 1.3, 5.0
SHAPES = ((4, 3), (5,), (2, 2, 2))


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=g).to(dtype)) for shape in SHAPES]


def sgd(params: Iterable[Any], **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1.0, **options)


def private(inner: torch.optim.Optimizer, **options: Any) -> dpft.DPOptimizer:
    options = {"noise_multiplier": SIGMA, "max_grad_norm": C, "expected_batch_size": B, **options}
    options.setdefault("noise", dpft.GaussianNoise(SECRET))
    return dpft.DPOptimizer(inner, **options)


def signals(seed: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g).to(dtype) for shape in SHAPES]


def give(params: Iterable[nn.Parameter], sums: Iterable[Tensor]) -> None:
    """A backward pass that accumulates `sums` in `.grad`, through autograd's own accumulation."""
    torch.stack([(p * s).sum() for p, s in zip(params, sums, strict=True)]).sum().backward()


def releases(*steps: list[Tensor], scale: float = 1.0) -> list[list[Tensor]]:
    """(sum + noise) / b of each step, with the noise of `SECRET` replayed."""
    noise = dpft.GaussianNoise(SECRET)
    return [[(s + noise.add_(torch.zeros_like(s), SIGMA * C * scale)) / (B * scale) for s in sums] for sums in steps]


def snapshot(params: Iterable[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


def same(a: Iterable[Tensor], b: Iterable[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
