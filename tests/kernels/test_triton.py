"""The Triton kernels against the float64 reference: compiled where there is a GPU, else in Triton's interpreter.

Triton reads TRITON_INTERPRET when it is imported, and then for the whole process. So the interpreter has a process of
its own, to which inputs are sent and which sends results back: nothing of it is left in this one.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from dpft.kernels import linear_grad_sq_norm, linear_sq_norm, reference
from dpft.kernels.linear import choose_method

pytest.importorskip("triton", reason="triton is not installed: dpft[triton]")

pytestmark = pytest.mark.slow
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# By how much of itself a number changes at most when it is written in that dtype.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Calls a function with arguments: here on a GPU, else in a process whose Triton interprets."""
    if DEVICE == "cuda":
        yield lambda function, *args: function(*args)
        return
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}):
            pool.submit(int).result()  # the process starts, and inherits
        yield lambda function, *args: pool.submit(function, *args).result()


def contiguous(v: Tensor) -> Tensor:
    return v


def transposed(v: Tensor) -> Tensor:
    return v.mT.contiguous().mT


def strided(v: Tensor) -> Tensor:
    """Every second example, token and feature of a larger tensor, which has NaN everywhere else."""
    wide = torch.full([2 * n for n in v.shape], torch.nan, dtype=v.dtype, device=v.device)
    wide[1::2, ::2, 1::2] = v
    return wide[1::2, ::2, 1::2]


def batch_in_second_place(v: Tensor) -> Tensor:
    return v.transpose(0, 1).contiguous().transpose(0, 1)


LAYOUTS = (contiguous, transposed, strided, batch_in_second_place)


def pair(shape: tuple[int, int, int, int], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    batch, tokens, p, d = shape
    generator = torch.Generator().manual_seed(seed)
    x, g = (torch.randn(batch, tokens, n, generator=generator) for n in (p, d))
    return x.to(DEVICE, dtype), g.to(DEVICE, dtype)


def magnitude(x: Tensor, g: Tensor) -> Tensor:
    """``(sum_t |x_t| |g_t|)^2``, of which a Gram sum's rounding is a part."""
    return (x.double().norm(dim=2) * g.double().norm(dim=2)).sum(1).square()


def check_norm(got: Tensor, x: Tensor, g: Tensor, method: str) -> None:
    exact = reference.linear_sq_norm(x, g)
    assert got.shape == exact.shape and got.dtype == torch.float64
    if method == "gram" and x.dtype != torch.float32:
        assert (got >= exact * (1 - 1e-9)).all(), "understated"
        assert (got <= exact + 1e-5 * magnitude(x, g)).all(), "overstated by more than the bound"
    elif method == "materialise" and x.dtype != torch.float32:
        # Every number rounded to half a unit: the norm of the differences is at most that part of the norm.
        assert ((got.sqrt() - exact.sqrt()).abs() <= ROUNDING[x.dtype] * (1 + 1e-4) * exact.sqrt()).all()
    else:
        torch.testing.assert_close(got, exact, rtol=3e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", ["gram", "feature", "materialise"])
def test_odd_sizes_and_any_strides(run: Run, method: str, dtype: torch.dtype) -> None:
    for n, layout in enumerate(LAYOUTS):
        x, g = pair((2, 37, 19, 45) if n % 2 else (3, 16, 33, 8), dtype, seed=n)
        other = LAYOUTS[(n + 1) % len(LAYOUTS)]
        check_norm(run(linear_sq_norm, layout(x), other(g), method, "triton"), x, g, method)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", ["gram", "feature", "materialise", "auto"])
def test_one_token_one_feature_and_nothing(run: Run, method: str, dtype: torch.dtype) -> None:
    for shape in ((2, 1, 5, 7), (1, 1, 1, 1), (2, 17, 1, 3), (3, 5, 4, 1)):
        x, g = pair(shape, dtype)
        taken = choose_method(*shape[1:]) if method == "auto" else method
        check_norm(run(linear_sq_norm, x, g, method, "triton"), x, g, taken)
    for shape in ((0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)):
        x, g = pair(shape, dtype)
        got = run(linear_sq_norm, x, g, method, "triton")
        assert got.dtype == torch.float64 and torch.equal(got, torch.zeros_like(got)) and len(got) == shape[0]


def test_more_rows_of_tiles_than_one_group(run: Run) -> None:
    """The order of the tiles skips none and takes none twice; nor does the folded triangle, odd or even."""
    shapes = ((1, 3, 16, 1300), (1, 3, 1300, 16), (2, 2, 200, 180)) if DEVICE == "cuda" else ((2, 2, 40, 150),)
    for shape in shapes:
        x, g = pair(shape, torch.float32)
        check_norm(run(linear_sq_norm, x, g, "feature", "triton"), x, g, "feature")
    for tokens in (16, 17, 33, 49, 65) if DEVICE == "cpu" else (64, 65, 129, 193, 257):
        x, g = pair((2, tokens, 4, 3), torch.float32)
        check_norm(run(linear_sq_norm, x, g, "gram", "triton"), x, g, "gram")


def test_more_tokens_than_one_sum_takes(run: Run) -> None:
    x, g = pair((1, 4133, 3, 5), torch.bfloat16)
    check_norm(run(linear_sq_norm, x, g, "feature", "triton"), x, g, "feature")


@pytest.mark.parametrize("written", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_rounded_once_and_the_norm_is_theirs(run: Run, dtype: torch.dtype, written: torch.dtype) -> None:
    x, g = pair((2, 21, 18, 35), dtype)
    grad, sq = run(linear_grad_sq_norm, strided(x), transposed(g), written, "triton")
    exact = reference.linear_grad(x, g)
    assert grad.dtype == written and grad.shape == exact.shape
    sums = torch.einsum("btd,btp->bdp", g.double().abs(), x.double().abs())  # float32 sums, then one rounding
    assert ((grad.double() - exact).abs() <= ROUNDING[written] * exact.abs() + 2.0**-20 * sums).all()
    torch.testing.assert_close(sq, grad.double().square().sum((1, 2)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_rounding_to_bf16_goes_to_even_and_carries(run: Run, sign: float) -> None:
    """Ties, a carry into the exponent, infinity, and what is almost the largest number."""
    values = torch.tensor([1.00390625, 1.01171875, 1.99999988, 2.0e-38, 3.3961775e38, torch.inf, 0.0]) * sign
    x = values.view(-1, 1, 1).to(DEVICE)
    grad, sq = run(linear_grad_sq_norm, x, torch.ones_like(x), torch.bfloat16, "triton")
    assert torch.equal(grad, x.bfloat16())
    assert not sq[5].isfinite() and sq[6] == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_that_cancel_are_not_understated(run: Run, dtype: torch.dtype) -> None:
    """Tokens alike in x and opposite in g: a Gram sum whose terms are thousands of times its value."""
    batch, tokens, width = 12, 40, 48
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 1, width, generator=generator)
    x = (x + 1e-3 * torch.randn(batch, tokens, width, generator=generator)).to(DEVICE, dtype)
    signs = torch.tensor([1.0, -1.0]).repeat(tokens // 2).view(1, -1, 1)
    g = (torch.randn(batch, 1, width, generator=generator) * signs).to(DEVICE, dtype)
    exact = reference.linear_sq_norm(x, g)
    got = run(linear_sq_norm, x, g, "gram", "triton")
    assert (got >= exact * (1 - 1e-6)).all(), (got / exact).min()
    assert (got <= exact * (1 + 1e-6) + (0 if dtype == torch.float32 else 1e-5) * magnitude(x, g)).all()


def test_features_that_round_down_at_every_addition_are_not_understated(run: Run) -> None:
    """16 or 32 products of 255/128 end in 2^-10, which a float32 sum from 2^15 on would lose every time."""
    x = torch.full((1, 1, 15000), 255 / 128, dtype=torch.bfloat16, device=DEVICE)
    got = run(linear_sq_norm, x, x, "gram", "triton")
    exact = x.double().square().sum().square()
    assert exact <= got.item() <= exact * (1 + 1e-5)


@pytest.mark.parametrize("method", ["gram", "feature", "materialise"])
def test_the_same_inputs_give_the_same_bits(run: Run, method: str) -> None:
    x, g = pair((2, 40, 50, 34), torch.bfloat16)
    first = run(linear_sq_norm, x, g, method, "triton")
    assert torch.equal(run(linear_sq_norm, x, g, method, "triton"), first)


@pytest.mark.parametrize("method", ["gram", "feature", "materialise"])
def test_what_is_not_finite_stays_in_its_own_example(run: Run, method: str) -> None:
    x, g = pair((3, 20, 6, 9), torch.float32)
    clean = run(linear_sq_norm, x, g, method, "triton")
    x[0, 3, 2], g[2, 19, 8] = torch.inf, torch.nan
    got = run(linear_sq_norm, x, g, method, "triton")
    assert not got[0].isfinite() and got[2].isnan() and got[1] == clean[1]
