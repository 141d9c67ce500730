"""Gaussian noise that is exact on a grid, from a cryptographic keystream: what ``secure_rng=True`` adds.

Which numbers a floating-point Gaussian can give depends on the number it is added to, and gives it away (Mironov 2012;
Jin et al. 2022, arXiv 2112.05307). Here the sum is rounded to whole steps of a grid, and a random number of steps is
added: the results that can occur do not depend on the sum, and each has the probability that the proof assumes.
``docs/design.md``, section 4, has the proof, and what it does not cover.

That number is ``x_0 + K x_1 + K^2 x_2 + K^3 x_3``, four discrete Gaussians of parameter ``BASE``, each drawn from a
table of its cumulative distribution (convolution of small discrete Gaussians: Micciancio & Walter 2017, eprint
2017/259). The table holds whole numbers over 2^144, computed in integer arithmetic: no floating-point function enters.
A draw takes 16 bits where they decide it, and 64 or 128 more where they do not.
"""

from __future__ import annotations

import bisect
import functools
import importlib.util
import math
import os
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpft.errors import KernelError

BASE, STRIDE, TERMS = 128, 64, 4
CUT = 12 * BASE  # a mass of 4e-33 lies beyond

STD = BASE * math.sqrt(sum(STRIDE ** (2 * i) for i in range(TERMS)))
"""Standard deviation of a draw, in steps: a little above 2^25."""

_FIXED = 512  # bits after the point while the table is computed
_CELL, _WORD = 16, 64
_BITS = _CELL + 2 * _WORD
_SIGN = 1 << (_WORD - 1)
_FIRST_SLOT = -(1 << 15)
_DECIDED = -CUT
_CHUNK = 1 << 15  # on the host: what it needs fits into a second-level cache
_CHUNK_ON_DEVICE = 1 << 21
_BEFORE_NEW_NONCE = 1 << 36  # bytes; the counter of ChaCha20 ends after 2^38
_MOST_STEPS = float((1 << 44) - 1)  # of a value; beyond it, sums with a draw would not be exact in float64
_ROUNDED = 1 + 2.0**-8  # a value in steps, below 2^44, is rounded to 2^-53 of itself before it is to whole steps

Whole = npt.NDArray[np.int64]


class Table(NamedTuple):
    """The cumulative distribution of one term, indexed by the first 16 bits of a draw: its *cell*.

    Attributes:
        bounds: ``bounds[j]`` is ``2^144 P(x <= j - CUT)``, rounded down; the last is 2^144.
        cells: ``[2^16]`` int16: the value where the cell decides it, else the number of its slot minus 2^15.
        words: ``bounds`` but the last, their first 64 bits minus 2^63.
        first: by slot, int16: the index of the cell's only bound, or -1 where it has several.
        word: by slot, int64: bits 17 to 80 of that bound minus 2^63.
    """

    bounds: list[int]
    cells: npt.NDArray[np.int16]
    words: Whole
    first: npt.NDArray[np.int16]
    word: Whole


def weights(parameter: int, largest: int) -> list[int]:
    """``2^512 exp(-k^2 / (2 parameter^2))`` for k = 0 to ``largest``, each within 2^32 of it."""
    one = 1 << _FIXED
    ratio, term, n = 0, one, 0
    while term:  # exp(-1 / (2 parameter^2)), by its series
        ratio += -term if n % 2 else term
        n += 1
        term //= 2 * parameter**2 * n
    square, power, weight, found = (ratio * ratio) >> _FIXED, ratio, one, []
    for _ in range(largest + 1):
        found.append(weight)
        weight = (weight * power) >> _FIXED  # from k to k + 1 it is exp(-(2 k + 1) / (2 parameter^2))
        power = (power * square) >> _FIXED
    return found


@functools.lru_cache(maxsize=1)
def table() -> Table:
    """The table of a discrete Gaussian of parameter ``BASE``, cut at ``CUT``."""
    half = weights(BASE, CUT)
    both = half[:0:-1] + half
    total, bounds, running = sum(both), [], 0
    for weight in both:
        running += weight
        bounds.append((running << _BITS) // total)
    shift = _BITS - _CELL
    cells: list[int] = []
    first: list[int] = []
    word: list[int] = []
    for cell in range(1 << _CELL):
        low = bisect.bisect_right(bounds, cell << shift)
        high = bisect.bisect_right(bounds, ((cell + 1) << shift) - 1)
        if low == high:
            cells.append(low - CUT)
            continue
        cells.append(_FIRST_SLOT + len(first))
        first.append(low if high == low + 1 else -1)
        word.append((bounds[low] >> _WORD) % (1 << _WORD) - _SIGN)
    assert _FIRST_SLOT + len(first) < _DECIDED
    return Table(
        bounds,
        np.array(cells, np.int16),
        np.array([(bound >> (_BITS - _WORD)) - _SIGN for bound in bounds[:-1]], np.int64),
        np.array(first, np.int16),
        np.array(word, np.int64),
    )


def keystream(key: bytes, nonce: bytes, counter: int = 0) -> Any:
    """An encryptor of ChaCha20 (RFC 8439) from block ``counter`` on.

    Args:
        key: 32 bytes.
        nonce: 12 bytes.
        counter: below 2^32.
    """
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

    return Cipher(algorithms.ChaCha20(key, counter.to_bytes(4, "little") + nonce), mode=None).encryptor()


class Keystream:
    """Random bits of ChaCha20 under one key. No bit comes out twice, on whichever devices.

    Args:
        key: 32 bytes; None (always, outside tests) reads them from the operating system.
    """

    def __init__(self, key: bytes | None = None) -> None:
        self._key = os.urandom(32) if key is None else key
        self._nonces = 0
        self._renew()  # before a release is written down: cryptography may not be installed
        self._zeros = memoryview(bytes(8 * _CHUNK))
        self._fused: dict[torch.device, bool] = {}

    def _nonce(self) -> bytes:
        self._nonces += 1
        return self._nonces.to_bytes(12, "little")

    def _renew(self) -> None:
        self._host, self._left = keystream(self._key, self._nonce()), _BEFORE_NEW_NONCE

    def fill(self, out: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Overwrite ``out``, contiguous, with random bits."""
        to = out.view(np.uint8).data
        if self._left < len(to):
            self._renew()
        if len(self._zeros) < len(to):
            self._zeros = memoryview(bytes(len(to)))
        if len(to):
            self._host.update_into(self._zeros[: len(to)], to)
        self._left -= len(to)
        return out

    def words(self, count: int, device: torch.device) -> Tensor:
        """``[count]`` int64 of random bits, from a Triton kernel on a CUDA device, else from the host.

        Raises:
            KernelError: the kernel does not compute ChaCha20 on this device.
        """
        if device.type == "cuda" and self._is_fused(device):
            return _fused_words(self._key, self._nonce(), count, device)
        return torch.from_numpy(self.fill(np.empty(count, np.int64))).to(device)

    def _is_fused(self, device: torch.device) -> bool:
        """Whether Triton is installed; if so, its kernel is compared once with the host's keystream of a known key."""
        if device not in self._fused:
            self._fused[device] = importlib.util.find_spec("triton") is not None
            if self._fused[device]:
                key, nonce, count = bytes(range(32)), bytes(12), 8 * 1000
                expected = np.frombuffer(keystream(key, nonce).update(bytes(8 * count)), np.int64)
                if not np.array_equal(_fused_words(key, nonce, count, device).cpu().numpy(), expected):
                    raise KernelError(
                        f"the Triton kernel of ChaCha20 computes something else on {device}; uninstall triton, and "
                        "the keystream is made on the host"
                    )
        return self._fused[device]


def _fused_words(key: bytes, nonce: bytes, count: int, device: torch.device) -> Tensor:
    from dpft.kernels.chacha import BLOCK_BYTES, chacha20

    return chacha20(key, nonce, -(-8 * count // BLOCK_BYTES), device).view(torch.int64)[:count]


class SecureNoise:
    """A source of noise on a grid.

    Args:
        stream: of random bits; None makes one with a key from the operating system.
    """

    def __init__(self, stream: Keystream | None = None) -> None:
        self._stream = Keystream() if stream is None else stream
        self._table = table()
        self._devices: dict[torch.device, tuple[Tensor, Tensor]] = {}
        # Allocated once: memory that is new for every chunk costs more than the arithmetic on it.
        self._bits = np.empty(TERMS * _CHUNK, np.uint16)
        self._index = np.empty(_CHUNK, np.int64)
        self._value = np.empty(TERMS * _CHUNK, np.int16)
        self._open = np.empty(TERMS * _CHUNK, np.bool_)
        self._more = np.empty(TERMS * _CHUNK, np.int64)
        self._total = np.empty(_CHUNK, np.int32)
        self._term = np.empty(_CHUNK, np.int32)
        self._steps = np.empty(_CHUNK, np.float64)
        self._whole = self._index.view(np.float64)  # the indices are not needed any more where it is

    def add_(self, flat: Tensor, std: float) -> None:
        """Round each value to whole steps of ``std / STD``, and add a draw to it, in place.

        Values beyond 2^44 steps are first brought to this bound, which moves no two sums further apart.

        Args:
            flat: ``[n]`` float32 or float64, contiguous.
            std: standard deviation of the noise, in the units of ``flat``, as :func:`widened` gave it.
        """
        if flat.device.type == "cpu":
            self._add_on_host(flat.detach().numpy(), std)
        else:
            self._add_on_device(flat, std)

    def _add_on_device(self, flat: Tensor, std: float) -> None:
        for part in flat.split(_CHUNK_ON_DEVICE):
            steps = part.double().mul_(STD / std).clamp_(-_MOST_STEPS, _MOST_STEPS).round_()
            part.copy_(steps.add_(self.draw_on(part.device, part.numel())).mul_(std / STD))

    def _add_on_host(self, flat: npt.NDArray[Any], std: float) -> None:
        for start in range(0, len(flat), _CHUNK):
            values = flat[start : start + _CHUNK]
            steps, whole = self._steps[: len(values)], self._whole[: len(values)]
            np.copyto(steps, values)  # numpy converts faster by a copy than within an operation
            steps *= STD / std
            np.clip(steps, -_MOST_STEPS, _MOST_STEPS, out=steps)
            np.rint(steps, out=steps)
            np.copyto(whole, self.draw(len(values)))
            steps += whole
            steps *= std / STD
            np.copyto(values, steps, casting="same_kind")

    def draw(self, count: int) -> npt.NDArray[np.int32]:
        """``[count]`` draws, ``count`` at most ``_CHUNK``; valid until the next call."""
        cells, n = self._table.cells, TERMS * count
        bits = self._stream.fill(self._bits[:n])
        value, index = self._value[:n], self._index[:count]
        for start in range(0, n, count):
            np.copyto(index, bits[start : start + count])
            # They are in range; "clip" is the mode that writes into out directly.
            cells.take(index, mode="clip", out=value[start : start + count])
        undecided = np.flatnonzero(np.less(value, _DECIDED, out=self._open[:n]))
        value[undecided] = self._decide(value.take(undecided), bits.take(undecided))
        terms, term, total = value.reshape(TERMS, count), self._term[:count], self._total[:count]
        np.copyto(total, terms[TERMS - 1])
        for k in range(TERMS - 2, -1, -1):
            total *= STRIDE
            np.copyto(term, terms[k])
            total += term
        return total

    def _decide(self, coded: npt.NDArray[np.int16], cell: npt.NDArray[np.uint16]) -> npt.NDArray[np.int16]:
        """The values of draws that their cells leave open."""
        slot = coded.astype(np.int64)
        slot -= _FIRST_SLOT
        more = self._stream.fill(self._more[: len(slot)])
        first, bound = self._table.first.take(slot), self._table.word.take(slot)
        found = first + (more >= bound)
        tie = more == bound
        many = np.flatnonzero(first < 0)
        high = _first_64_bits(cell.take(many).astype(np.int64), more.take(many))
        found[many] = self._table.words.searchsorted(high, side="right")
        tie[many] = self._table.words.take(found.take(many) - 1, mode="clip") == high
        if tie.any():
            for place in np.flatnonzero(tie):
                found[place] = self._exactly(int(cell[place]), int(more[place]))
        found -= CUT
        return found

    def _exactly(self, cell: int, more: int) -> int:
        """The index of a draw whose first 64 or 80 bits are those of a bound."""
        last = int(self._stream.fill(np.empty(1, np.uint64))[0])
        return bisect.bisect_right(self._table.bounds, (cell << 128) | ((more + _SIGN) << 64) | last)

    def draw_on(self, device: torch.device, count: int) -> Tensor:
        """``[count]`` int32: :meth:`draw` with tensors, for other devices. It waits for the device once."""
        if device not in self._devices:
            cells, words = torch.from_numpy(self._table.cells), torch.from_numpy(self._table.words)
            self._devices[device] = cells.to(device), words.to(device)
        cells, words = self._devices[device]
        bits = self._stream.words(TERMS * count // 4, device).view(torch.int16)
        cell = bits.to(torch.int32).bitwise_and_(0xFFFF)
        value = cells.index_select(0, cell)
        undecided = (value < _DECIDED).nonzero().squeeze(1)
        open_ = cell[undecided].to(torch.int64)
        more = self._stream.words(len(undecided), device)
        high = _first_64_bits(open_, more)
        found = torch.searchsorted(words, high, right=True)
        tie = (words[(found - 1).clamp_(min=0)] == high).nonzero().squeeze(1)
        for place in tie.tolist():
            found[place] = self._exactly(int(open_[place]), int(more[place]))
        value[undecided] = (found - CUT).to(torch.int16)
        terms = value.view(TERMS, count)
        total = terms[TERMS - 1].to(torch.int32)
        for k in range(TERMS - 2, -1, -1):
            total.mul_(STRIDE).add_(terms[k])
        return total


def _first_64_bits(cell: Any, more: Any) -> Any:
    """Of draws, minus 2^63: ``cell`` has 16 bits, and ``more`` the next 64, minus 2^63. Arrays or tensors of int64."""
    return ((cell - (1 << 15)) << 48) + (more >> 16) + (1 << 47)


def widened(std: float, sensitivity: float, elements: int) -> float:
    """The standard deviation that keeps the noise multiplier, where a sum is rounded to the noise's own grid.

    Sums that differ by at most ``sensitivity`` differ by at most ``sensitivity + step sqrt(elements)`` when each value
    is rounded to whole steps. With ``step = result / STD``, the result has to that the ratio of ``std`` to
    ``sensitivity``.

    Args:
        std: for the sum without rounding, > 0.
        sensitivity: L2, of the sum without rounding, > 0.
        elements: number of values that are released together, over all ranks.

    Raises:
        ValueError: the noise would be more than doubled.
    """
    share = std / sensitivity * math.sqrt(elements) * _ROUNDED / STD
    if share > 0.5:
        raise ValueError(
            f"the grid of secure noise is too coarse for noise multiplier {std / sensitivity:.3g} on {elements} "
            "values; lower the noise multiplier, or train fewer parameters"
        )
    return std / (1 - share)
