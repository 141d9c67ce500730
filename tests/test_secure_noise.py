"""Noise on a grid from ChaCha20: the keystream's vectors, the table, the law of the draws, what rounding adds.

Keys are fixed, so every statistic is the same on every run.
"""

from __future__ import annotations

import bisect
import decimal
import math
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import dpft
from dpft import secure_noise
from dpft.secure_noise import CUT, STD, STRIDE, TERMS, Keystream, SecureNoise, keystream, table, weights, widened

KEY = bytes(range(32))
LEVEL = 1e-3
CPU = torch.device("cpu")
# RFC 8439: sections 2.3.2, A.1 number 1, A.1 number 2.
VECTORS = [
    (
        *(KEY, "000000090000004a00000000", 1),
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e",
    ),
    (
        *(bytes(32), "00" * 12, 0),
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
    ),
    (
        *(bytes(32), "00" * 12, 1),
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
    ),
]


class Scripted(Keystream):
    """Gives the words that it is told to, one call after another."""

    def __init__(self, *answers: Any) -> None:
        super().__init__(KEY)
        self.answers = list(answers)

    def fill(self, out: Any) -> Any:
        out[...] = self.answers.pop(0)
        return out


def draws(count: int, key: bytes = KEY) -> np.ndarray:
    source = SecureNoise(Keystream(key))
    return np.concatenate([source.draw(min(1 << 15, count - i)).copy() for i in range(0, count, 1 << 15)])


# --- the keystream ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "nonce", "counter", "expected"), VECTORS)
def test_vectors_of_the_rfc(key: bytes, nonce: str, counter: int, expected: str) -> None:
    assert keystream(key, bytes.fromhex(nonce), counter).update(bytes(64)).hex() == expected


def test_no_bit_comes_out_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over calls, over nonces (which change often here), and between the host's stream and a device's."""
    monkeypatch.setattr(secure_noise, "_BEFORE_NEW_NONCE", 1000)
    nonces = []

    def counted(key: bytes, nonce: bytes) -> Any:
        nonces.append(nonce)
        return keystream(key, nonce)

    with mock.patch.object(secure_noise, "keystream", counted):
        stream = Keystream(KEY)
        words = np.concatenate([stream.fill(np.empty(n, np.int64)) for n in (5, 100, 3, 0, 120, 60, 60)])
    nonces.append(stream._nonce())  # as a device's call takes one
    assert len(np.unique(words)) == len(words)
    assert len(set(nonces)) == len(nonces) >= 4


def test_keys_come_from_the_operating_system() -> None:
    first, second = (Keystream().fill(np.empty(4, np.int64)) for _ in range(2))
    assert len({*first.tolist(), *second.tolist()}) == 8


# --- the table -------------------------------------------------------------------------------------------------------


def test_weights_are_those_of_the_exponential() -> None:
    decimal.getcontext().prec = 160
    found = weights(secure_noise.BASE, CUT)
    for k in (0, 1, 2, 77, 128, 700, CUT):
        exact = (decimal.Decimal(-(k**2)) / (2 * secure_noise.BASE**2)).exp()
        assert abs(decimal.Decimal(found[k]) / 2**512 - exact) < decimal.Decimal(2) ** -480


def test_table_is_the_distribution_and_what_is_cut_is_nothing() -> None:
    bounds = table().bounds
    assert bounds[-1] == 2**144 and len(bounds) == 2 * CUT + 1
    probability = np.diff([0, *bounds]).astype(float) / 2.0**144
    x = np.arange(-CUT, CUT + 1)
    exact = np.exp(-(x**2) / (2 * secure_noise.BASE**2))
    np.testing.assert_allclose(probability, exact / exact.sum(), rtol=1e-6)  # the tail has 2^-39 of 2^-105
    np.testing.assert_allclose(probability[CUT - 800 : CUT + 801], (exact / exact.sum())[CUT - 800 : CUT + 801], 1e-12)
    assert 2 * stats.norm.sf(12) < 4e-33


@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_every_draw_is_the_inverse_of_the_whole_distribution(offset: int) -> None:
    """At each bound, one below it and one above it, in units of the last of 144 bits: what no sampling would find."""
    bounds, ties = table().bounds, 0
    source = SecureNoise()
    for bound in bounds[:-1]:
        uniform = bound + offset
        if uniform < 0:
            continue
        exact = bisect.bisect_right(bounds, uniform) - CUT
        cell, word, last = uniform >> 128, ((uniform >> 64) & (2**64 - 1)) - 2**63, uniform & (2**64 - 1)
        found = table().cells[[cell]]
        if found[0] < -CUT:
            source._stream = Scripted(word, last)
            found = source._decide(found, np.array([cell], np.uint16))
            ties += not source._stream.answers
        assert found[0] == exact
    assert ties > CUT


# --- the law of the draws --------------------------------------------------------------------------------------------


def test_convolution_is_a_discrete_gaussian() -> None:
    """Two terms, every value of the sum within 5 deviations: the ratio to the discrete Gaussian is 1 to 1e-11."""
    x = np.arange(-CUT, CUT + 1)
    one = np.exp(-(x**2) / (2 * secure_noise.BASE**2))
    one /= one.sum()
    wide = np.zeros(2 * CUT * STRIDE + 1)
    wide[::STRIDE] = one
    found = np.convolve(wide, one)
    std = secure_noise.BASE * math.sqrt(1 + STRIDE**2)
    middle = len(found) // 2
    n = np.arange(-int(5 * std), int(5 * std) + 1)
    exact = np.exp(-(n**2) / (2 * std**2))
    np.testing.assert_allclose(found[middle + n], exact / (std * math.sqrt(2 * math.pi)), rtol=1e-11)


def test_smoothing_and_rounding_are_as_small_as_the_proof_says() -> None:
    """The numbers of docs/design.md: the ratio to a discrete, then to a rounded Gaussian of the same deviation."""
    smoothing = 2 * math.exp(-2 * math.pi**2 * (secure_noise.BASE / STRIDE) ** 2 / (1 + STRIDE**-2))
    assert TERMS * smoothing < 2.0**-108
    for z in (0.0, 0.5, 1.0, 3.0, 8.0):
        density = math.exp(-(z**2) / 2)
        points = np.polynomial.legendre.leggauss(5)
        wide = 1 / 50.0  # where float64 can tell the difference, which falls with the square of the step
        cell = sum(w / 2 * math.exp(-((z + wide * x / 2) ** 2) / 2) for x, w in zip(*points, strict=True))
        assert cell / density - 1 == pytest.approx((z**2 - 1) * wide**2 / 24, rel=0.02, abs=1e-7)
    assert 2**25 < STD < 2**25 * 1.001


def test_draws_are_normal() -> None:
    x = draws(1_000_000) / STD
    n = len(x)
    assert abs(x.mean()) < 5 / math.sqrt(n)
    assert abs(x.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs(stats.skew(x)) < 5 * math.sqrt(6 / n)
    assert abs(stats.kurtosis(x)) < 5 * math.sqrt(24 / n)
    assert stats.kstest(x, "norm").pvalue > LEVEL
    for cut in (3.0, 4.0):
        expected = 2 * n * stats.norm.sf(cut)
        assert abs((np.abs(x) > cut).sum() - expected) < 5 * math.sqrt(expected)


@pytest.mark.parametrize("modulus", [2, STRIDE, STRIDE**2, 1000])
def test_low_digits_are_uniform(modulus: int) -> None:
    """A term that were missing, or in another's place, would show in the digits to the base of the stride."""
    counts = np.bincount(draws(1_000_000) % modulus, minlength=modulus)
    assert stats.chisquare(counts).pvalue > LEVEL


@pytest.mark.parametrize("lag", [1, 2, 8, 64, 1 << 15])
def test_draws_are_independent(lag: int) -> None:
    x = draws(400_000).astype(float)
    for a, b in ((x[:-lag], x[lag:]), (x[:-lag] ** 2, x[lag:] ** 2), (np.abs(x[:-lag]), x[lag:])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / math.sqrt(len(a))


def test_sources_and_steps_share_nothing() -> None:
    ranks = [draws(100_000, key) for key in (KEY, KEY[::-1])]
    parts = [half for rank in ranks for half in np.split(rank.astype(float), 2)]
    for i, a in enumerate(parts):
        for b in parts[:i]:
            assert abs(np.corrcoef(a, b)[0, 1]) < 5 / math.sqrt(len(a))
            assert len(np.intersect1d(a, b)) < 100  # by chance 2.5e9 pairs meet 21 times


def test_tensors_give_the_draws_of_the_host() -> None:
    """What CUDA runs, on the CPU: the same keystream, the same numbers."""
    a, b = SecureNoise(Keystream(KEY)), SecureNoise(Keystream(KEY))
    for count in (1, 1000, 1 << 15):
        assert np.array_equal(a.draw(count), b.draw_on(CPU, count).numpy())


def test_tensors_give_the_release_of_the_host() -> None:
    total = torch.linspace(-3, 3, 20_000)
    host, device = total.clone(), total.clone()
    SecureNoise(Keystream(KEY)).add_(host, 0.3)
    SecureNoise(Keystream(KEY))._add_on_device(device, 0.3)
    assert torch.equal(host, device) and not torch.equal(host, total)


# --- the release -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("std", [1e-3, 0.7, 300.0])
def test_what_can_come_out_does_not_depend_on_the_sum(std: float) -> None:
    """Every release is a whole number of steps, whatever the sum; its distance from the sum's step is the draw."""
    grid = std / STD
    for total in (torch.zeros(1000), torch.full((1000,), 1 / 3), torch.rand(1000, generator=torch.Generator()) * 50):
        values = total.double() * std
        steps = torch.round(values * (STD / std))
        SecureNoise(Keystream(KEY)).add_(values, std)
        released = values / grid
        assert (released - released.round()).abs().max() < 1e-4
        assert np.array_equal((released.round() - steps).numpy(), draws(1000))


def test_sums_too_large_for_exact_arithmetic_are_brought_to_the_bound() -> None:
    values, bound = torch.tensor([1e30, -math.inf, 2.0**44, 0.0, math.nan], dtype=torch.float64), 2.0**44 - 1
    SecureNoise().add_(values, STD)  # a step is 1
    assert (values[:3] - torch.tensor([bound, -bound, bound])).abs().max() < CUT * STRIDE**TERMS
    assert values[:4].equal(values[:4].round()) and values[4].isnan()


def test_a_float32_release_is_the_exact_one_rounded_once() -> None:
    total = torch.linspace(-3, 3, 70_000)
    single, double = total.clone(), total.double()
    SecureNoise(Keystream(KEY)).add_(single, 0.5)
    SecureNoise(Keystream(KEY)).add_(double, 0.5)
    assert torch.equal(single, double.float()) and not torch.equal(single, total)


@pytest.mark.parametrize("elements", [1, 1000, 124_000_000, 8_000_000_000])
@pytest.mark.parametrize("sigma", [0.3, 1.0, 20.0])
def test_widened_noise_has_the_ratio_to_the_rounded_sums_sensitivity(sigma: float, elements: int) -> None:
    c = 0.25
    std = widened(sigma * c, c, elements)
    assert std / (c + std / STD * math.sqrt(elements)) >= sigma
    assert std < sigma * c * (1 + 1.1 * sigma * math.sqrt(elements) / STD)


def test_rounding_adds_at_most_a_step_for_each_value() -> None:
    """The worst neighbours: their sums differ by a little in every value, across the boundary of a step."""
    d, std, c = 1000, 1.0, 1e-9
    a = torch.full((d,), 0.5 * std / STD, dtype=torch.float64) - c / math.sqrt(d) / 2
    b = a + c / math.sqrt(d)
    noise = [values.clone() for values in (a, b)]
    for values in noise:
        SecureNoise(Keystream(KEY)).add_(values, std)
    distance = float((noise[1] - noise[0]).norm())
    assert distance == pytest.approx(std / STD * math.sqrt(d), rel=1e-6)  # far more than c: it has to be accounted for
    assert distance <= c + std / STD * math.sqrt(d) * (1 + 1e-6)


def test_too_coarse_a_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="too coarse"):
        widened(1000.0, 1.0, 10**9)


@pytest.mark.parametrize("secure", [False, True])
def test_optimizer_widens_by_all_values_of_the_release(secure: bool) -> None:
    parameters = [nn.Parameter(torch.zeros(300, 200)), nn.Parameter(torch.zeros(77))]
    noise = dpft.GaussianNoise(secure=secure)
    optimizer = dpft.DPOptimizer(torch.optim.SGD(parameters, lr=1.0), 2.0, 0.5, 4.0, noise=noise)
    seen: list[float] = []

    def add_(tensor: Tensor, std: float) -> Tensor:
        seen.append(std)
        return tensor

    with mock.patch.object(noise, "add_", add_):
        optimizer.step()
    assert seen == [widened(1.0, 0.5, 60_077) if secure else 1.0] * 2
    assert not secure or seen[0] > 1.0
