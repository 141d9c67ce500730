"""Gaussian noise that is correlated over the steps: at step t, row t of ``C^{-1} z`` instead of z_t.

A step needs a few vectors of the steps before it (:attr:`~dpft.privacy.correlated.strategy.Strategy.memory` of them,
of the size of the trained parameters, in the dtype of the sums):

- ``bandmf``: w_t = z_t - sum_j c_j w_(t-j), j = 1 to bands - 1: the noise of the last steps (Choquette-Choo et al.
  2023, arXiv 2306.08153, Algorithm 9);
- ``blt``: w_t = z_t - sum_i omega_i s_i, and then s_i = d_i s_i + w_t (McMahan, Xu, Zhang 2024, arXiv 2408.08868,
  Algorithm 3).

**Resume.** These vectors are as secret as the noise: who has them subtracts it. They are not written anywhere. What is
kept, beside the ledger, is the secret of the generator of each start
(:mod:`dpft.privacy.correlated.noise_secrets`), from which a resumed run draws the noise of all earlier releases once
more to have the vectors, in the time that this noise took. Then it goes on with a secret of its own, so that no noise
is drawn for two releases, whatever becomes of the files.

**Shards.** z is a function of the secret, the step and the place in the model: each parameter is divided into blocks,
and each block of each step has a stretch of its own of a counter-based generator (Philox; Salmon et al. 2011). So each
owner of a shard draws, and keeps, what belongs to its elements alone; the noise is the same under every engine and
number of processes, and a resume may shard otherwise. A block that two owners share is drawn by both.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from dpft.errors import WrapError
from dpft.noise import Place, check_addition
from dpft.privacy.correlated.noise_secrets import NoiseSecret
from dpft.privacy.correlated.optimum import noise_coefficients
from dpft.privacy.correlated.strategy import Strategy

# Elements of a block: small, as a rank draws whole blocks to have its part; large where each one launches a kernel.
BLOCK_ON_HOST, BLOCK_ON_DEVICE = 1 << 14, 1 << 20
_COUNTED = 1 << 12  # of a device's counter, for one block; a block of any GPU takes less than 2^10
_MOST_BLOCKS = 1 << 24  # of a parameter, and steps


class CorrelatedNoise:
    """A stream of correlated noise for the tensors of a training, in place of :class:`dpft.GaussianNoise`.

    Every release adds noise to the same tensors in the same order, within :meth:`release`.

    Args:
        strategy: its matrix C.
        secrets: of every start of the run, in order; the last is this one's, and of no other start.
        device: where noise is drawn, on whose kind the numbers depend; None: wherever the tensors are.
        recorded: the number of releases in the ledger, which has the line of each before its noise is drawn; by it the
            sampler chooses the examples of a step. None: there is no ledger.
    """

    def __init__(
        self,
        strategy: Strategy,
        secrets: Sequence[NoiseSecret],
        device: torch.device | None = None,
        recorded: Callable[[], int] | None = None,
    ) -> None:
        self.strategy, self.position = strategy, secrets[-1].first
        self._secrets, self._device, self._recorded = tuple(secrets), device, recorded
        self._pid = os.getpid()
        self._tensors: list[_TensorNoise] = []
        self._next = 0
        self._open = self._broken = False
        self._first_release = True

    @contextmanager
    def release(self) -> Iterator[None]:
        """One step: within it, :meth:`add_` is called once for each tensor.

        Raises:
            WrapError: an earlier release was not finished, or other tensors get noise than at the first release; or
                the ledger counts another number of releases than those that had noise.
        """
        if self._broken or self._open:
            raise WrapError(
                "a release with correlated noise was not finished: the noise of its step is drawn for some parameters "
                "and not for others. End the run and resume it."
            )
        count = None if self._recorded is None else self._recorded()
        if count not in (None, self.position + 1):
            # After an interrupt behind a ledger's line. An example's steps would be nearer to each other, in rows of
            # the noise, than the strategy was made for.
            raise WrapError(
                f"the ledger counts {count} releases, and the noise to come is that of release {self.position + 1}: a "
                "release was recorded and not made, by an interrupt or a call of record(). End the run and resume it."
            )
        if self.position >= self.strategy.steps:
            raise WrapError(
                f"step {self.position + 1} of correlated noise that was made for {self.strategy.steps}; plan the "
                "larger number of steps for a new run."
            )
        self._next, self._open, self._broken = 0, True, True
        try:
            yield
        finally:
            self._open = False
        if self._next != len(self._tensors):
            raise WrapError(
                f"{self._next} tensors got correlated noise, and {len(self._tensors)} at the first release; expected "
                "the same ones at every step. Do not freeze parameters or add some during the training."
            )
        self.position += 1
        self._broken = self._first_release = False  # last: what interrupts before it leaves the release unfinished

    def for_release(self, std: float, sensitivity: float, elements: int) -> float:
        """``std``: nothing is rounded."""
        return std

    def std_in_release(self, std: float) -> float:
        """Standard deviation of an element's noise in the release that is being made: the norm of its row of C^-1."""
        row = noise_coefficients(self.strategy)[: self.position + 1]
        return std * self.strategy.scale * float(np.linalg.norm(row))

    def add_(self, tensor: Tensor, std: float, place: Place | None = None) -> Tensor:
        """Add the noise of this step to the next of the tensors, in place.

        Args:
            tensor: float32 or float64, any shape, on any device.
            std: noise multiplier times clip norm (times the scale of the sums) >= 0; the same at every step.
            place: of the tensor's elements; None: it is the whole of the next parameter.

        Returns:
            ``tensor``.

        Raises:
            WrapError: outside of a release, or another tensor than at the first release.
            ValueError: as :meth:`dpft.GaussianNoise.add_`.
        """
        if not self._open:
            raise WrapError("correlated noise is added within a release only: the steps must be told apart")
        check_addition(tensor, std)
        if os.getpid() != self._pid:
            raise RuntimeError(
                f"process {os.getpid()} inherited this noise source by fork and would repeat its draws; resume the "
                "run in the child"
            )
        if std == 0.0:
            return tensor
        index, self._next = self._next, self._next + 1
        place = Place(index, 0, tensor.numel()) if place is None else place
        if index == len(self._tensors) and self._first_release:
            if self._device is not None and tensor.device.type != self._device.type:
                raise WrapError(
                    f"correlated noise is drawn on {tensor.device}, and the file of secrets says {self._device}; a "
                    "resume would draw other numbers. The engine has moved its sums: report it."
                )
            self._tensors.append(self._earlier(place, tensor))
        if index >= len(self._tensors) or not self._tensors[index].fits(place, tensor):
            raise WrapError(
                f"tensor {index} of a release has shape {list(tensor.shape)} and {tensor.dtype} on {tensor.device}, "
                "unlike at the first release; the noise of its earlier steps is that of another. Keep parameters, "
                "their order and their devices as they are."
            )
        noise = self._tensors[index].step(self.position)
        return tensor.add_(noise.view(tensor.shape), alpha=std * self.strategy.scale)

    def __reduce__(self) -> str:
        # A copy, or a pickle in a checkpoint, would draw the same noise a second time.
        raise TypeError("CorrelatedNoise cannot be copied or pickled: its state is secret; resume from the ledger")

    def _earlier(self, place: Place, tensor: Tensor) -> _TensorNoise:
        """The state of a tensor's noise after all earlier steps, by drawing them once more."""
        state = _TensorNoise(self.strategy, place, tensor)
        ends = [secret.first for secret in self._secrets[1:]]
        for secret, end in zip(self._secrets, [*ends, self.position], strict=True):
            state.draws = _Draws(secret.secret, place, tensor.device)
            for step in range(secret.first, end):
                state.step(step)
        return state


class _Draws:
    """Independent N(0, 1) for the elements at a place, by the step; never for two starts, which differ in the secret.

    On the host the key of Philox is of the secret, and its counter holds step, parameter and block; on a GPU the seed
    is of the secret and the parameter, and the generator's offset holds step and block.
    """

    def __init__(self, secret: bytes, place: Place, device: torch.device) -> None:
        self._place, self._on_host = place, device.type == "cpu"
        words = b"dpft correlated noise\0" + secret
        if self._on_host:
            self._key = np.frombuffer(hashlib.sha256(words).digest()[:16], np.uint64)
        else:
            self._generator = torch.Generator(device)
            digest = hashlib.sha256(words + place.number.to_bytes(8, "big")).digest()
            self._generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    def fill(self, out: Tensor, step: int) -> Tensor:
        """Overwrite ``out``, flat, with the draws of a step."""
        block, (_, start, size) = BLOCK_ON_HOST if self._on_host else BLOCK_ON_DEVICE, self._place
        end = start + out.numel()
        for number in range(start // block, -(-end // block)):
            first = number * block
            low, high = max(start, first), min(end, first + block)
            if self._on_host:
                values = self._host_block(number, step, high - first, out.dtype)
            else:
                values = self._device_block(number, step, min(block, size - first), out)
            out[low - start : high - start] = values[low - first : high - first]
        return out

    def _host_block(self, number: int, step: int, count: int, dtype: torch.dtype) -> Tensor:
        """The first values of a block: they do not depend on how many are drawn."""
        counter = np.array([0, number, self._place.number, step], np.uint64)  # the first is counted up by draws
        generator = np.random.Generator(np.random.Philox(counter=counter, key=self._key))
        return torch.from_numpy(generator.standard_normal(count, np.float64 if dtype == torch.float64 else np.float32))

    def _device_block(self, number: int, step: int, count: int, out: Tensor) -> Tensor:
        """A whole block: on a GPU, which value goes where depends on how many are drawn."""
        assert number < _MOST_BLOCKS and step < _MOST_BLOCKS
        self._generator.set_offset((step * _MOST_BLOCKS + number) * _COUNTED)
        return torch.empty(count, dtype=out.dtype, device=out.device).normal_(generator=self._generator)


class _TensorNoise:
    """The noise of one tensor: its draws, and what it keeps of earlier steps, in units of z."""

    draws: _Draws

    def __init__(self, strategy: Strategy, place: Place, tensor: Tensor) -> None:
        self.strategy, self._place = strategy, place
        self._shape, self._dtype, self._device = tensor.shape, tensor.dtype, tensor.device
        self._kept: deque[Tensor] = deque(maxlen=strategy.memory)
        if strategy.kind == "blt":
            self._kept.extend(self._zeros() for _ in range(strategy.memory))

    def fits(self, place: Place, tensor: Tensor) -> bool:
        found = (place, tensor.shape, tensor.dtype, tensor.device)
        return found == (self._place, self._shape, self._dtype, self._device)

    def _zeros(self) -> Tensor:
        return torch.zeros(self._shape.numel(), dtype=self._dtype, device=self._device)

    def step(self, number: int) -> Tensor:
        """The noise of the next step, which has this number, ``[numel]``; not to be changed."""
        noise = self.draws.fill(self._zeros(), number)
        if self.strategy.kind == "bandmf":
            for weight, before in zip(self.strategy.weights[1:], self._kept, strict=False):  # fewer, at the beginning
                noise.sub_(before, alpha=weight)
            self._kept.appendleft(noise)
            return noise
        for weight, buffer in zip(self.strategy.weights, self._kept, strict=True):
            noise.sub_(buffer, alpha=weight)
        for decay, buffer in zip(self.strategy.decays, self._kept, strict=True):
            buffer.mul_(decay).add_(noise)
        return noise
