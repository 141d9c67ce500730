"""Digests of gradients, and the error of one against another.

A digest is small, so that gradients of different processes are compared without being sent: per parameter a count
sketch (Charikar et al. 2002), that is sums of the entries with random signs in :data:`BUCKETS` buckets. It is linear,
and the squared norm of the sketch of an error is an unbiased estimate of the error's; where the error is spread over
many entries, with a relative standard deviation of sqrt(2 / BUCKETS) = 9 %.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BUCKETS = 256
CHUNK = BUCKETS << 14
SEED = 20_240_229
Digest = dict[str, list[float]]


def digest(gradients: dict[str, Tensor]) -> Digest:
    """The count sketch of each gradient: 256 float64 sums, or its entries where it has no more than that."""
    return {name: _sketch(gradient.detach().flatten()) for name, gradient in gradients.items()}


def _sketch(values: Tensor) -> list[float]:
    if values.numel() <= BUCKETS:
        return [float(v) for v in values.tolist()]
    generator = torch.Generator(values.device).manual_seed(SEED)
    total = torch.zeros(BUCKETS, dtype=torch.float64, device=values.device)
    for part in values.split(CHUNK):
        signs = torch.randint(0, 2, part.shape, dtype=torch.int8, device=part.device, generator=generator)
        signed = part.double() * (2 * signs - 1)
        whole = len(signed) // BUCKETS * BUCKETS
        total += signed[:whole].view(-1, BUCKETS).sum(0)
        total[: len(signed) - whole] += signed[whole:]
    return [float(v) for v in total.tolist()]


@dataclass(frozen=True)
class Error:
    """How far a clipped sum is from what it should be, in L2 norm, relative.

    Attributes:
        whole: of the gradient of all parameters.
        worst: of the one parameter where it is largest; a small parameter that is wrong does not show in the whole.
        where: that parameter.
    """

    whole: float
    worst: float
    where: str

    def within(self, limit: Error) -> bool:
        """Whether it is at most the limit, in the whole and in every parameter; NaN is not."""
        return self.whole <= limit.whole and self.worst <= limit.worst

    def __str__(self) -> str:
        return f"{self.whole:.1e} of the whole, {self.worst:.1e} of {self.where}"


def error_of(found: Digest, expected: Digest) -> Error:
    """The error of one digest against another; infinite where a parameter is missing or not finite."""
    if found.keys() != expected.keys():
        return Error(math.inf, math.inf, ", ".join(sorted(found.keys() ^ expected.keys())[:3]))
    total = norm = 0.0
    worst, where = 0.0, "no parameter"
    for name, values in expected.items():
        off = sum((a - b) ** 2 for a, b in zip(found[name], values, strict=True))
        size = sum(b * b for b in values)
        if not math.isfinite(off):
            return Error(math.inf, math.inf, name)
        relative = math.sqrt(off / size) if size else (0.0 if off == 0 else math.inf)
        if relative > worst:
            worst, where = relative, name
        total, norm = total + off, norm + size
    return Error(math.sqrt(total / norm) if norm else math.inf, worst, where)
