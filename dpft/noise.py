"""The Gaussian mechanism's noise, in float32 or float64, from its own generator, seeded by the operating system.

The generator is not torch's or numpy's global one, so ``manual_seed`` does not affect it. Its state is in no
checkpoint: if the same noise were added to two different sums, their difference would be free of noise.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpft.secure_noise import SecureNoise, widened

_CHUNK = 1 << 20


class Place(NamedTuple):
    """Where elements lie in the whole model, however it is sharded.

    Attributes:
        number: of their parameter, in an order that does not change.
        start: the first of them, in the parameter flattened.
        size: number of elements of the whole parameter.
    """

    number: int
    start: int
    size: int


def check_addition(tensor: Tensor, std: float) -> None:
    """Refuse noise that would be rounded or is none.

    Raises:
        ValueError: a dtype in which noise would be rounded (bf16, fp16), or a negative or infinite std.
    """
    if tensor.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"noise is added in float32 or float64, not {tensor.dtype}, which would round it")
    if not 0.0 <= std < float("inf"):
        raise ValueError(f"std is {std!r}; expected a finite number >= 0")


class GaussianNoise:
    """A stream of independent Gaussian draws that is never repeated.

    Args:
        secret: bytes that determine the stream. None (always, outside tests) reads 32 bytes from the operating system.
            Ranks that hold replicas of one gradient share a secret and a stream; each shard has its own stream.
        stream: number of the stream under the secret.
        secure: exact Gaussian noise on a grid, from ChaCha20 with a key of the operating system: it defeats attacks
            on the floating-point numbers of the noise, and on its generator (:mod:`dpft.secure_noise`). The values are
            rounded to the grid first, which adds to their sensitivity: see :meth:`for_release`.

    Raises:
        ValueError: ``secure`` with a ``secret``: a known stream is not secure.
    """

    def __init__(self, secret: bytes | None = None, stream: int = 0, secure: bool = False) -> None:
        if secure and secret is not None:
            raise ValueError("secure=True draws from the operating system; a secret (noise seed) contradicts it")
        self.secure = secure
        self.known_secret = secret is not None
        given = os.urandom(32) if secret is None else secret
        self._entropy = int.from_bytes(len(given).to_bytes(8, "big") + given, "big")
        self._pid = os.getpid()
        self._stream = stream
        self._host = np.random.Generator(np.random.Philox(self._sequence(0)))
        self._devices: dict[torch.device, torch.Generator] = {}
        self._secure = SecureNoise() if secure else None

    def for_release(self, std: float, sensitivity: float, elements: int) -> float:
        """The std to pass to :meth:`add_`, for noise that counts as ``std`` beside the sum's sensitivity.

        Args:
            std: standard deviation that the accountant assumes.
            sensitivity: L2, of the sum, in the same units.
            elements: number of values that are released together, over all ranks.

        Returns:
            ``std``; with ``secure`` a little more, as rounding to the grid adds to the sensitivity.

        Raises:
            ValueError: the rounding would add more than the sensitivity itself.
        """
        if not self.secure or std == 0.0:
            return std
        return widened(std, sensitivity, elements)

    def std_in_release(self, std: float) -> float:
        """``std``: a discrete Gaussian's differs from it by far less than its rounding."""
        return std

    def _sequence(self, *purpose: int) -> np.random.SeedSequence:
        return np.random.SeedSequence(self._entropy, spawn_key=(self._stream, *purpose))

    def add_(self, tensor: Tensor, std: float, place: Place | None = None) -> Tensor:
        """Add independent draws of N(0, std^2) to ``tensor`` in place.

        Args:
            tensor: float32 or float64, any shape, on any device.
            std: standard deviation >= 0, in the tensor's units.
            place: of no importance here: every draw is new.

        Returns:
            ``tensor``.

        Raises:
            ValueError: a dtype in which noise would be rounded (bf16, fp16), or a negative or infinite std.
        """
        check_addition(tensor, std)
        if os.getpid() != self._pid:
            raise RuntimeError(
                f"process {os.getpid()} inherited this noise source by fork and would repeat its draws; make a new "
                "GaussianNoise in the child"
            )
        if std == 0.0:
            return tensor
        if not tensor.is_contiguous():
            return tensor.copy_(self.add_(tensor.contiguous(), std))
        flat = tensor.view(-1)
        if self._secure is not None:
            if tensor.device.type != "meta":
                self._secure.add_(flat, std)
            return tensor
        draw = self._source(tensor.device)
        for start in range(0, flat.numel(), _CHUNK):
            part = flat[start : start + _CHUNK]
            part.add_(draw(part.numel(), tensor.dtype), alpha=std)
        return tensor

    def release(self) -> AbstractContextManager[None]:
        """What a release's noise is added within; only correlated noise must tell the steps apart."""
        return nullcontext()

    def __reduce__(self) -> str:
        # A copy, or a pickle in a checkpoint, would draw the same noise a second time.
        raise TypeError("GaussianNoise cannot be copied or pickled; create a new one, which gets a fresh seed")

    def _source(self, device: torch.device) -> Callable[[int, torch.dtype], Tensor]:
        if device.type == "meta":  # planning: there are no values to add noise to
            return lambda count, dtype: torch.empty(count, device=device, dtype=dtype)
        if device.type == "cpu":
            return self._draw_on_host
        generator = self._devices.get(device)
        if generator is None:
            generator = torch.Generator(device)
            generator.manual_seed(int(self._sequence(1, device.index or 0).generate_state(1, np.uint64)[0] >> 1))
            self._devices[device] = generator
        return lambda count, dtype: torch.empty(count, device=device, dtype=dtype).normal_(generator=generator)

    def _draw_on_host(self, count: int, dtype: torch.dtype) -> Tensor:
        values = self._host.standard_normal(count, dtype=np.float64 if dtype == torch.float64 else np.float32)
        return torch.from_numpy(values)
