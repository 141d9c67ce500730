"""`GaussianNoise`: its distribution, its independence, and that nobody else's seed has a say in it.

Secrets are fixed, so every statistic is the same on every run; the bounds are those of a level of 1e-3 or less.
"""

from __future__ import annotations

import copy
import functools
import math
import os
import pickle
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

import dpft
from dpft import noise as module
from dpft import secure_noise

SECRET = b"a secret that is 32 bytes long.."
COUNT = 1_000_000
LEVEL = 1e-3
# Of a few thousand values in float64 none meet by chance, and on the grid of secure noise two in one of ten tests; ten
# do in less than one of 1e15.
CHANCE = {False: 1, True: 10}
sources = pytest.mark.parametrize("secure", [False, True], ids=["fast", "secure"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def draw(
    count: int = COUNT,
    secret: bytes | None = SECRET,
    stream: int = 0,
    dtype: torch.dtype = torch.float32,
    std: float = 1.0,
    secure: bool = False,
) -> Tensor:
    return dpft.GaussianNoise(secret, stream, secure).add_(torch.zeros(count, dtype=dtype), std)


def check_normal(values: Tensor, std: float = 1.0) -> None:
    """Mean, variance, skewness, kurtosis within five standard errors; Kolmogorov-Smirnov, Anderson-Darling; tails."""
    x, n = values.double().numpy() / std, values.numel()
    assert abs(x.mean()) < 5 / math.sqrt(n)
    assert abs(x.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs(stats.skew(x)) < 5 * math.sqrt(6 / n)
    assert abs(stats.kurtosis(x)) < 5 * math.sqrt(24 / n)
    assert stats.kstest(x, "norm").pvalue > LEVEL
    anderson = 2 * np.arange(1, n + 1) - 1
    ordered = np.sort(x)
    square = -n - (anderson * (stats.norm.logcdf(ordered) + stats.norm.logsf(ordered)[::-1])).mean()
    assert square < 6.0  # 1 - 1e-3 quantile, every parameter known
    for cut in (3.0, 4.0):
        expected = 2 * n * stats.norm.sf(cut)
        assert abs((np.abs(x) > cut).sum() - expected) < 5 * math.sqrt(expected)


def check_uncorrelated(a: Tensor, b: Tensor) -> None:
    """Of the values, and of the squares, which the same values under another sign or order of magnitude would fail."""
    for x, y in ((a, b), (a.square(), b.square()), (a.abs(), b)):
        assert abs(np.corrcoef(x.double().numpy(), y.double().numpy())[0, 1]) < 5 / math.sqrt(a.numel())


@dtypes
@pytest.mark.parametrize("stream", [0, 1, 7])
def test_standard_normal(dtype: torch.dtype, stream: int) -> None:
    check_normal(draw(stream=stream, dtype=dtype))


def test_the_check_of_normality_can_fail() -> None:
    x = draw()
    bad = {
        "scaled": 1.01 * x,
        "shifted": x + 0.01,
        "bf16": x.bfloat16().float(),
        "cut": x.clamp(-3, 3),
        "logistic": torch.from_numpy(np.random.default_rng(0).logistic(0, math.sqrt(3) / math.pi, COUNT)),
    }
    for kind, values in bad.items():
        if kind == "bf16":  # its moments are fine: this one is for the count of distinct values
            assert values.unique().numel() < 10_000
            continue
        with pytest.raises(AssertionError):
            check_normal(values)


@dtypes
@pytest.mark.parametrize("std", [1e-6, 0.37, 250.0])
def test_standard_deviation_is_in_the_units_of_the_tensor(std: float, dtype: torch.dtype) -> None:
    check_normal(draw(std=std, dtype=dtype), std)
    assert torch.equal(draw(1000, std=std, dtype=dtype), std * draw(1000, dtype=dtype))


def test_secure_is_normal_and_never_the_same() -> None:
    """Unseeded by nature: with bounds at 6 standard errors and p > 1e-9 it fails once in 1e8 runs."""
    x = torch.cat([draw(COUNT // 2, None, secure=True), draw(COUNT // 2, None, secure=True)]).double().numpy()
    assert abs(x.mean()) < 6 / math.sqrt(COUNT) and abs(x.var() - 1) < 6 * math.sqrt(2 / COUNT)
    assert abs(stats.kurtosis(x)) < 6 * math.sqrt(24 / COUNT)
    assert stats.kstest(x, "norm").pvalue > 1e-9
    assert abs(np.corrcoef(x[: COUNT // 2], x[COUNT // 2 :])[0, 1]) < 6 / math.sqrt(COUNT // 2)


@dtypes
@sources
def test_values_are_distinct(dtype: torch.dtype, secure: bool) -> None:
    """1e6 draws in bf16 have some 3,000 values; 32 random bits have 116 pairs that collide."""
    distinct = draw(dtype=dtype, secret=None if secure else SECRET, secure=secure).unique().numel()
    # float32 has a grid of 2^-24 below 1: of the 5e11 pairs some 8e3 meet on it. On that of float64 one meets in one
    # of 30,000 runs (2^-29 of 8e3 is 1.5e-5). Three pairs meet in less than one of 1e13. Secure draws are on a grid of
    # 2^-25, in float64 too: of 5e11 pairs 4,200 meet, give or take 65.
    assert distinct > (0.99 * COUNT if dtype == torch.float32 else COUNT - (5000 if secure else 3))


def test_added_to_what_is_there() -> None:
    there = torch.linspace(-3, 3, 1000)
    x = there.clone()
    assert dpft.GaussianNoise(SECRET).add_(x, 0.5) is x
    assert torch.equal(x, there + 0.5 * draw(1000))


def test_same_secret_and_stream_is_bitwise_the_same() -> None:
    """Replicas on two ranks add the same noise, over many steps and shapes."""
    a, b = dpft.GaussianNoise(SECRET, 3), dpft.GaussianNoise(SECRET, 3)
    for shape in ((5,), (3, 4), (), (0,), (2, 1, 7)):
        assert torch.equal(a.add_(torch.zeros(shape), 1.0), b.add_(torch.zeros(shape), 1.0))


def test_streams_are_independent_and_share_no_value() -> None:
    streams = [draw(200_000, stream=stream) for stream in range(4)]
    streams += [draw(200_000, secret) for secret in (SECRET[::-1], SECRET[:-1] + b"/")]
    for i, a in enumerate(streams):
        for b in streams[:i]:
            check_uncorrelated(a, b)
            assert not torch.equal(a.sort().values, b.sort().values)
            # Collisions of 32 random bits: 200,000 x 200,000 / 2^32, some 10; a shared block would be thousands.
            assert len(np.intersect1d(a.numpy(), b.numpy())) < 4000
            assert not np.isin(a[:8].numpy(), b.numpy()).all()


def test_all_noise_is_unique_over_steps_and_elements() -> None:
    """As jax_privacy's distributed noise test: float64, where a collision is as good as impossible."""
    ranks = [dpft.GaussianNoise(SECRET, stream) for stream in range(3)]
    drawn = [
        rank.add_(torch.zeros(shape, dtype=torch.float64), 1.0).flatten()
        for rank in ranks
        for _ in range(20)
        for shape in ((31, 7), (50,), (1,))
    ]
    everything = torch.cat(drawn)
    assert everything.unique().numel() == everything.numel() == 3 * 20 * 268


def test_steps_are_independent() -> None:
    noise = dpft.GaussianNoise(SECRET)
    steps = [noise.add_(torch.zeros(100_000), 1.0) for _ in range(5)]
    for i, a in enumerate(steps):
        for b in steps[:i]:
            check_uncorrelated(a, b)


@pytest.mark.parametrize("lag", [1, 2, 31, 32, 1024])
def test_elements_are_independent(lag: int) -> None:
    x = draw()
    check_uncorrelated(x[:-lag], x[lag:])


def test_signs_of_neighbours_are_fair() -> None:
    counts = np.bincount((draw().view(-1, 4) > 0).numpy() @ [1, 2, 4, 8], minlength=16)
    assert stats.chisquare(counts).pvalue > LEVEL


@sources
def test_no_block_is_repeated_where_chunks_meet(monkeypatch: pytest.MonkeyPatch, secure: bool) -> None:
    monkeypatch.setattr(secure_noise if secure else module, "_CHUNK", 1000)
    x = draw(5500, None if secure else SECRET, dtype=torch.float64, secure=secure)
    assert (x != 0).all() and x.unique().numel() > 5500 - CHANCE[secure]


def test_real_chunk_boundary() -> None:
    size = module._CHUNK
    x = draw(size + 1000)
    assert x.count_nonzero() >= x.numel() - 2
    assert not (x[:1000] == x[size:]).any()
    check_uncorrelated(x[:1000], x[size:])


@sources
@pytest.mark.parametrize("layout", ["transposed", "strided", "channels last", "offset"])
def test_any_layout_gets_noise_everywhere_once(layout: str, secure: bool) -> None:
    zeros = functools.partial(torch.zeros, dtype=torch.float64)
    base = {
        "transposed": lambda: zeros(40, 60).mT,
        "strided": lambda: zeros(60, 80)[:, ::2],
        "channels last": lambda: zeros(4, 5, 10, 12).contiguous(memory_format=torch.channels_last),
        "offset": lambda: zeros(2401)[1:].view(40, 60),
    }[layout]()
    noise = dpft.GaussianNoise(None if secure else SECRET, secure=secure)
    before = base.untyped_storage().nbytes()
    assert noise.add_(base, 2.0) is base and base.untyped_storage().nbytes() == before
    assert base.unique().numel() > base.numel() - CHANCE[secure] and base.count_nonzero() == base.numel()
    assert abs(base.std() / 2 - 1) < 6 / math.sqrt(2 * base.numel())
    if not secure:
        assert torch.equal(base.flatten(), 2 * draw(base.numel(), dtype=torch.float64))


def test_a_view_leaves_its_neighbours_alone() -> None:
    whole = torch.zeros(60, 80)
    dpft.GaussianNoise(SECRET).add_(whole[:, ::2], 1.0)
    assert whole[:, ::2].count_nonzero() == 2400 and whole[:, 1::2].count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.complex64])
def test_dtypes_that_would_round_noise_are_refused(dtype: torch.dtype) -> None:
    x = torch.zeros(3, dtype=dtype)
    with pytest.raises(ValueError, match=f"{dtype}"):
        dpft.GaussianNoise().add_(x, 1.0)
    assert x.count_nonzero() == 0


@pytest.mark.parametrize("std", [-1.0, math.nan, math.inf, -math.inf])
def test_bad_std_is_refused(std: float) -> None:
    x = torch.zeros(3)
    with pytest.raises(ValueError, match="std"):
        dpft.GaussianNoise().add_(x, std)
    assert x.count_nonzero() == 0


def test_std_zero_adds_nothing() -> None:
    assert dpft.GaussianNoise().add_(torch.ones(3), 0.0).equal(torch.ones(3))


@sources
def test_global_seeds_have_no_say(secure: bool) -> None:
    def seeded() -> Tensor:
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)
        return draw(1000, None, dtype=torch.float64, secure=secure)

    a, b = seeded(), seeded()
    assert torch.cat([a, b]).unique().numel() > 2000 - CHANCE[secure]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    draw(1000, None, secure=secure)
    assert torch.equal(torch.get_rng_state(), state)  # and it leaves the others alone


def test_two_starts_differ() -> None:
    draws = torch.stack([draw(100, None, dtype=torch.float64) for _ in range(20)])
    assert draws.unique().numel() == draws.numel()


def test_secure_with_a_secret_is_refused() -> None:
    with pytest.raises(ValueError, match="secret"):
        dpft.GaussianNoise(SECRET, secure=True)
    assert dpft.GaussianNoise(SECRET).known_secret and not dpft.GaussianNoise().known_secret


# --- a stream that is never repeated ---------------------------------------------------------------------------------


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, pickle.dumps])
def test_a_source_cannot_be_duplicated(duplicate: Callable[[dpft.GaussianNoise], object]) -> None:
    """A copy would draw the same values under another gradient, and their difference would have no noise."""
    noise = dpft.GaussianNoise()
    with pytest.raises(TypeError):
        duplicate(noise)


def test_a_forked_process_does_not_repeat_its_parents_noise() -> None:
    noise = dpft.GaussianNoise()
    noise.add_(torch.zeros(3), 1.0)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, noise.add_(torch.zeros(4), 1.0).numpy().tobytes())
        except Exception:
            os.write(write, b"refused")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    got = os.read(read, 1000)
    os.close(read)
    assert got and got != noise.add_(torch.zeros(4), 1.0).numpy().tobytes()


def test_devices_of_one_process_have_streams_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """No second device is needed: what decides is the seed that each device's generator gets."""
    seeds: list[int] = []

    class Generator:
        def __init__(self, device: torch.device) -> None:
            pass

        def manual_seed(self, seed: int) -> None:
            seeds.append(seed)

    monkeypatch.setattr(torch, "Generator", Generator)
    noise = dpft.GaussianNoise(SECRET)
    for index in (0, 1, 0):
        noise._source(torch.device("cuda", index))
    assert len(seeds) == 2 and seeds[0] != seeds[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@dtypes
def test_on_a_gpu(dtype: torch.dtype) -> None:
    def on_gpu(stream: int) -> Tensor:
        noise = dpft.GaussianNoise(SECRET, stream)
        return noise.add_(torch.zeros(COUNT, dtype=dtype, device="cuda"), 1.0).cpu()

    a = on_gpu(0)
    check_normal(a)
    assert torch.equal(a, on_gpu(0))
    check_uncorrelated(a, on_gpu(1))
    check_uncorrelated(a, draw(dtype=dtype))
