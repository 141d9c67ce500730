"""How ``impl="torch"`` cuts its products: every cut gives the same norms, and memory does not grow with T."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dpft.kernels import gram, linear, linear_grad_sq_norm, linear_sq_norm, reference
from dpft.kernels.linear import Method
from tests.memory_meter import MemoryMeter


def pair(batch: int, tokens: int, p: int, d: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, tokens, p, generator=generator), torch.randn(batch, tokens, d, generator=generator)


def peak(x: Tensor, g: Tensor, method: Method) -> int:
    """Bytes of the tensors that a norm makes, at most at one time."""
    with MemoryMeter(ignore=[x, g]) as meter:
        linear_sq_norm(x, g, method, impl="torch")
    return meter.peak


@pytest.mark.parametrize("method", ["gram", "gram_full", "feature"])
@pytest.mark.parametrize(("edge", "elements"), [(3, 9), (3, 40), (8, 1)])
def test_every_cut_gives_the_same(method: Method, edge: int, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over examples, features and tokens, with rests and without."""
    monkeypatch.setattr(linear, "TILE_ELEMENTS", elements)
    monkeypatch.setattr(linear, "_EDGE", edge)
    monkeypatch.setattr(gram, "GRAM_TILE", 4)
    for shape in ((5, 7, 6, 10), (5, 23, 11, 3), (1, 33, 9, 9), (4, 1, 1, 5)):
        x, g = pair(*shape)
        exact = reference.linear_sq_norm(x, g)
        torch.testing.assert_close(linear_sq_norm(x, g, method), exact, rtol=3e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("method", "batch", "p", "d", "tokens", "limit"),
    [
        ("feature", 1, 1024, 1024, (256, 2048), 4 << 20),  # less than the [d, p] of float32
        ("feature", 12, 512, 640, (64, 512), 4 << 20),  # not for all examples at once
        ("gram", 1, 64, 96, (1024, 4096), 4 << 20),  # less than a [T, T] of bytes
        ("gram", 6, 16, 1500, (1024, 1280), 13 << 20),  # a block of g in float64 is 18 MiB
    ],
)
def test_memory_does_not_grow_with_the_length(
    method: Method, batch: int, p: int, d: int, tokens: tuple[int, int], limit: int, dtype: torch.dtype
) -> None:
    peaks = []
    for length in tokens:
        # Views, as a layer may keep them: a copy would grow with T, and be seen.
        x = torch.zeros((length, batch, p), dtype=dtype).transpose(0, 1)
        g = torch.zeros((batch, d, length), dtype=dtype).mT
        peaks.append(peak(x, g, method))
    sizes = 8 * batch * (tokens[1] - tokens[0])  # |x_t| and |g_t| in float32, of the Gram method
    assert peaks[0] <= peaks[1] <= peaks[0] + (sizes if method == "gram" else 0) and peaks[1] < limit, peaks


def test_the_gradient_and_the_norm_of_what_was_rounded() -> None:
    for inputs, dtype in ((torch.bfloat16, None), (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        x, g = (v.to(inputs) for v in pair(3, 9, 20, 15))
        grad, sq = linear_grad_sq_norm(x, g, dtype)
        assert grad.dtype == (dtype or inputs) and sq.dtype == torch.float64
        torch.testing.assert_close(grad.double(), reference.linear_grad(x, g), rtol=2.0**-8, atol=2.0**-8)
        torch.testing.assert_close(sq, grad.double().square().sum((1, 2)), rtol=1e-6, atol=0)
    x, g = pair(2, 9, 20, 15)
    grad, _ = linear_grad_sq_norm(x, g)
    torch.testing.assert_close(grad.double(), reference.linear_grad(x, g), rtol=1e-5, atol=1e-5)
