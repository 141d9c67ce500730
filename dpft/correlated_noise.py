"""Gaussian noise that is correlated over the steps: at step t, row t of ``C^{-1} z`` instead of z_t.

A step needs a few vectors of the steps before it (:attr:`~dpft.privacy.correlated.Strategy.memory` of them, of the
size of the trained parameters, in the dtype of the sums):

- ``bandmf``: w_t = z_t - sum_j c_j w_(t-j), j = 1 to bands - 1: the noise of the last steps (Choquette-Choo et al.
  2023, arXiv 2306.08153, Algorithm 9);
- ``blt``: w_t = z_t - sum_i omega_i s_i, and then s_i = d_i s_i + w_t (McMahan, Xu, Zhang 2024, arXiv 2408.08868,
  Algorithm 3).

**Resume.** These vectors are as secret as the noise: who has them subtracts it. They are not written anywhere. What is
kept, beside the ledger, is the secret of the generator of each start (:mod:`dpft.privacy.noise_secrets`), from which a
resumed run draws the noise of all earlier releases once more to have the vectors, in the time that this noise took.
Then it goes on with a secret of its own, so that no noise is drawn for two releases, whatever becomes of the files.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dpft.errors import WrapError
from dpft.noise import GaussianNoise
from dpft.privacy.correlated import Strategy
from dpft.privacy.noise_secrets import NoiseSecret


class CorrelatedNoise:
    """A stream of correlated noise for the tensors of a training, in place of :class:`dpft.GaussianNoise`.

    Every release adds noise to the same tensors in the same order, within :meth:`release`.

    Args:
        strategy: its matrix C.
        secrets: of every start of the run, in order; the last is this one's, and of no other start.
        stream: number of the stream under the secrets: each process has its own.
    """

    def __init__(self, strategy: Strategy, secrets: Sequence[NoiseSecret], stream: int = 0) -> None:
        self.strategy, self.position = strategy, secrets[-1].first
        self._secrets, self._stream = tuple(secrets), stream
        self._tensors: list[_TensorNoise] = []
        self._next = 0
        self._open = self._broken = False
        self._first_release = True

    @contextmanager
    def release(self) -> Iterator[None]:
        """One step: within it, :meth:`add_` is called once for each tensor.

        Raises:
            WrapError: an earlier release was not finished, or other tensors get noise than at the first release.
        """
        if self._broken or self._open:
            raise WrapError(
                "a release with correlated noise was not finished: the noise of its step is drawn for some parameters "
                "and not for others. End the run and resume it."
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
        self._broken = self._first_release = False
        self.position += 1

    def for_release(self, std: float, sensitivity: float, elements: int) -> float:
        """``std``: nothing is rounded."""
        return std

    def add_(self, tensor: Tensor, std: float) -> Tensor:
        """Add the noise of this step to the next of the tensors, in place.

        Args:
            tensor: float32 or float64, any shape, on any device.
            std: noise multiplier times clip norm (times the scale of the sums) >= 0; the same at every step.

        Returns:
            ``tensor``.

        Raises:
            WrapError: outside of a release, or another tensor than at the first release.
            ValueError: as :meth:`dpft.GaussianNoise.add_`.
        """
        if not self._open:
            raise WrapError("correlated noise is added within a release only: the steps must be told apart")
        if std == 0.0:
            return tensor
        index, self._next = self._next, self._next + 1
        if index == len(self._tensors) and self._first_release:
            self._tensors.append(self._earlier(index, tensor))
        if index >= len(self._tensors) or not self._tensors[index].fits(tensor):
            raise WrapError(
                f"tensor {index} of a release has shape {list(tensor.shape)} and {tensor.dtype} on {tensor.device}, "
                "unlike at the first release; the noise of its earlier steps is that of another. Keep parameters, "
                "their order and their devices as they are."
            )
        noise = self._tensors[index].step()
        return tensor.add_(noise.view(tensor.shape), alpha=std * self.strategy.scale)

    def __reduce__(self) -> str:
        # A copy, or a pickle in a checkpoint, would draw the same noise a second time.
        raise TypeError("CorrelatedNoise cannot be copied or pickled: its state is secret; resume from the ledger")

    def _earlier(self, index: int, tensor: Tensor) -> _TensorNoise:
        """The state of a tensor's noise after all earlier steps, by drawing them once more."""
        state = _TensorNoise(self.strategy, tensor)
        ends = [secret.first for secret in self._secrets[1:]]
        for secret, end in zip(self._secrets, [*ends, self.position], strict=True):
            state.source = GaussianNoise(_derived(secret.secret, self._stream, index))
            for _ in range(secret.first, end):
                state.step()
        return state


def _derived(secret: bytes, stream: int, index: int) -> bytes:
    """The secret of one tensor's generator on one process."""
    place = stream.to_bytes(8, "big") + index.to_bytes(8, "big")
    return hashlib.sha256(b"dpft correlated noise\0" + secret + place).digest()


class _TensorNoise:
    """The noise of one tensor: its generator, and what it keeps of earlier steps, in units of z."""

    source: GaussianNoise

    def __init__(self, strategy: Strategy, tensor: Tensor) -> None:
        self.strategy = strategy
        self._shape, self._dtype, self._device = tensor.shape, tensor.dtype, tensor.device
        self._kept: deque[Tensor] = deque(maxlen=strategy.memory)
        if strategy.kind == "blt":
            self._kept.extend(self._zeros() for _ in range(strategy.memory))

    def fits(self, tensor: Tensor) -> bool:
        return (tensor.shape, tensor.dtype, tensor.device) == (self._shape, self._dtype, self._device)

    def _zeros(self) -> Tensor:
        return torch.zeros(self._shape.numel(), dtype=self._dtype, device=self._device)

    def step(self) -> Tensor:
        """The noise of the next step, ``[numel]``; not to be changed."""
        noise = self.source.add_(self._zeros(), 1.0)
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
