"""What the noise of a logical batch takes: the vectors that correlated noise keeps, and the time of drawing.

Each rank draws the noise of its share of the elements, and keeps the earlier noise of that share.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from dpft.planning.hardware import Hardware
from dpft.planning.simulate import Sharding
from dpft.privacy.config import PrivacyConfig

__all__ = ["EARLIER", "NoiseCost", "noise_cost"]

EARLIER = "earlier noise"

# Bytes that are read and written for one float32 value, counted from the operations of noise.py, correlated_noise.py
# and secure_noise.py (on the device). Plain: the draw is written, then read with the sum, which is written.
_PLAIN, _SECURE = 16, 264
_KEPT_DRAW = 28  # the draw goes to zeroed memory first, of which the sum takes it
_BAND, _BUFFER = 12, 32  # w -= c v; and for a buffer w -= omega s, s *= d, s += w
# On the host, tools/measure_noise.py: processor time of secure noise over that of plain noise.
_SECURE_ON_HOST = 1.2


@dataclass(frozen=True)
class NoiseCost:
    """The noise of one logical batch, on each rank.

    Attributes:
        mechanism: ``dp_sgd``, ``bandmf`` or ``blt``.
        vectors: of earlier noise that are kept, of the size of the trained parameters.
        kept_bytes: of this rank's part of them.
        on_host: whether sums and noise are in host memory.
        elements: to which this rank adds noise.
        seconds: of drawing and adding, once for each logical batch; not in the predictions, which are of one physical
            batch.
    """

    mechanism: str
    vectors: int
    kept_bytes: int
    on_host: bool
    elements: int
    seconds: float

    def __str__(self) -> str:
        where = "host memory" if self.on_host else "the device"
        kept = f"keeps {self.vectors} vectors, {self.kept_bytes / 2**30:.2f} GiB in {where}; " if self.vectors else ""
        return (
            f"noise ({self.mechanism}): {kept}{self.elements:,} values in {self.seconds:.4f} s for each logical batch"
        )


def noise_cost(model: nn.Module, sharding: Sharding, machine: Hardware, privacy: PrivacyConfig) -> NoiseCost:
    """Counted from the code, for a model on any device.

    Args:
        model: with unsharded parameters.
        sharding: the engine.
        machine: whose bandwidth and host's rate of draws the time is for.
        privacy: its mechanism, bands or buffers, and ``secure_rng``.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    # Also replicas divide the noise among them.
    parts = [(sharding.part(p.numel(), True), torch.promote_types(p.dtype, torch.float32).itemsize) for p in trainable]
    vectors = {"bandmf": (privacy.bands or 1) - 1, "blt": privacy.buffers or 0}.get(privacy.mechanism, 0)
    moved = _PLAIN if privacy.mechanism == "dp_sgd" else _KEPT_DRAW
    moved += vectors * (_BUFFER if privacy.mechanism == "blt" else _BAND)
    on_host = sharding.sums_on_host or not machine.asynchronous
    if on_host:  # of a GPU's host the memory is taken to be as fast as the link
        bandwidth = machine.link if machine.asynchronous else machine.bandwidth
        seconds = sum(n * (machine.host_draw + moved * size / 4 / bandwidth) for n, size in parts)
        seconds *= _SECURE_ON_HOST if privacy.secure_rng else 1.0
    else:
        moved = _SECURE if privacy.secure_rng else moved
        seconds = sum(n * moved * size / 4 / machine.bandwidth for n, size in parts)
    return NoiseCost(
        mechanism=privacy.mechanism,
        vectors=vectors,
        kept_bytes=vectors * sum(n * size for n, size in parts),
        on_host=sharding.sums_on_host,
        elements=sum(n for n, _ in parts),
        seconds=seconds,
    )
