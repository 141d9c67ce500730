"""Long contexts on a meta twin: tiles, checkpoints' inputs in host memory, and tokens that are spread over ranks."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from dpft.long_context import blocks
from dpft.long_context.install import LongContext, install
from dpft.long_context.offload import OffloadedCheckpoint, Offloader
from dpft.long_context.tiles import TileSize
from dpft.planning.twin import on_meta
from dpft.wrap import LONG_CONTEXT

__all__ = [
    "IN_TRANSIT",
    "HostMeter",
    "find_long_context",
    "install_on_meta",
    "offloading",
    "page_locked_bytes",
    "spread_attention",
    "total_bytes",
]

# Inputs of checkpoints that a GPU still holds while they are copied to the host (dpft.long_context.offload).
IN_TRANSIT = 2
# Layers that mix tokens and are called with one tensor, as a block is: recurrent ones and convolutions.
_MIXING = (nn.modules.conv._ConvNd, nn.RNNBase, nn.ZeroPad2d)


class HostMeter:
    """Tensors that an offloader has in page-locked host memory.

    Attributes:
        most: bytes of a tensor, and how many of them there were when there were most.

    Args:
        in_transit: tensors whose copies have not ended, so that the device still holds them: 2 on a GPU.
    """

    def __init__(self, in_transit: int) -> None:
        self._live: Counter[int] = Counter()
        self.most: Counter[int] = Counter()
        self._outgoing: deque[Tensor] = deque(maxlen=in_transit)

    def park(self, t: Tensor) -> MetaCopy:
        """For :class:`~dpft.long_context.offload.Offloader`."""
        size = t.numel() * t.element_size()
        copy = MetaCopy(t, self.ended)
        self._live[size] += 1
        if total_bytes(self._live) > total_bytes(self.most):
            self.most = +self._live
        weakref.finalize(copy, self._died, size)
        self._outgoing.append(t)
        return copy

    def ended(self) -> None:
        """The backward has begun: whatever was on its way to the host has arrived."""
        self._outgoing.clear()

    def _died(self, size: int) -> None:
        self._live[size] -= 1

    def reset(self) -> None:
        """Begin anew, from what is there."""
        self.most = +self._live


def total_bytes(tensors: Counter[int]) -> int:
    """Bytes of tensors that are given by their sizes."""
    return sum(size * count for size, count in tensors.items())


def page_locked_bytes(tensors: Counter[int]) -> int:
    """What the host gives for them: torch rounds the size of a page-locked storage up to a power of two."""
    return sum((1 << (size - 1).bit_length()) * count for size, count in tensors.items())


class MetaCopy:
    """A tensor without data in host memory (:class:`dpft.long_context.offload.Parked`)."""

    def __init__(self, t: Tensor, ended: Callable[[], None]) -> None:
        self._shape, self._dtype, self._device, self._ended = t.shape, t.dtype, t.device, ended
        self._incoming: Tensor | None = None

    def fetch(self) -> None:
        self._ended()
        if self._incoming is None:
            self._incoming = torch.empty(self._shape, dtype=self._dtype, device=self._device)

    def get(self) -> Tensor:
        self.fetch()
        found, self._incoming = self._incoming, None
        assert found is not None
        return found


def find_long_context(model: nn.Module) -> LongContext | None:
    """What :func:`dpft.long_context` installed on a model or a part of it; None if it is not on."""
    return next((m.__dict__[LONG_CONTEXT] for m in model.modules() if LONG_CONTEXT in m.__dict__), None)


def install_on_meta(twin: nn.Module, tile_mlp: TileSize | None = "auto", offloader: Offloader | None = None) -> None:
    """:func:`dpft.long_context` on a twin, whose blocks are found by their shapes, as there are no values.

    A module that has what mixes tokens (a convolution, a recurrent layer) is no block.

    Raises:
        ValueError: as :func:`dpft.long_context`.
    """

    def same_shape(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
        return a.shape == b.shape

    may_be = blocks._may_be_block

    def may_be_block(module: nn.Module, inside: bool) -> bool:
        return may_be(module, inside) and not any(isinstance(m, _MIXING) for m in module.modules())

    with (
        on_meta(),
        mock.patch.object(blocks, "_is_elsewhere", lambda parameter: False),
        mock.patch.object(blocks, "_may_be_block", may_be_block),
        mock.patch.object(blocks, "_close", same_shape),
    ):
        install(twin, tile_mlp, offloader or Offloader())


@contextlib.contextmanager
def offloading(twin: nn.Module, meter: HostMeter | None) -> Iterator[None]:
    """A context in which the checkpoints of a twin offload their inputs to ``meter``, or, if None, do not."""
    installed = find_long_context(twin)
    if installed is None:
        yield
        return
    functions = [layer.__dict__.get("_gradient_checkpointing_func") for layer in installed.layers]
    offloaded = [function for function in functions if isinstance(function, OffloadedCheckpoint)]
    before = [function._offloader for function in offloaded]
    least = before[0]._least if before else 0
    offloader = Offloader(None if meter is None else meter.park, least)
    for function in offloaded:
        function._offloader = offloader
    try:
        yield
    finally:
        for function, own in zip(offloaded, before, strict=True):
            function._offloader = own


@dataclass(frozen=True)
class _Exchange:
    """Ulysses' all-to-all, as DeepSpeed computes it: both directions take a copy to send and a tensor to receive."""

    size: int

    def gather(self, t: Tensor, heads: int) -> Tensor:
        """``[B, h, t, D]`` of the rank's tokens to ``[B, heads, t * S, D]`` of its share of the heads."""
        batch, own, tokens, dim = t.shape
        if own < heads * self.size:  # fewer heads of keys than ranks: they are repeated
            t = t.repeat_interleave(heads * self.size // own, dim=1)
        sent = t.permute(2, 0, 1, 3).reshape(tokens, batch, self.size, heads, dim).permute(2, 0, 1, 3, 4).contiguous()
        received: Tensor = _AllToAll.apply(sent)
        return received.reshape(self.size * tokens, batch, heads, dim).permute(1, 2, 0, 3).contiguous()

    def spread(self, t: Tensor) -> Tensor:
        """``[B, h / S, t * S, D]`` to ``[B, h, t, D]``."""
        batch, heads, tokens, dim = t.shape
        own = tokens // self.size
        sent = t.permute(2, 0, 1, 3).reshape(self.size, own, batch, heads * dim).contiguous()
        received: Tensor = _AllToAll.apply(sent)
        back = received.permute(1, 2, 0, 3).reshape(own, batch, self.size * heads, dim)
        return back.permute(1, 2, 0, 3)


class _AllToAll(torch.autograd.Function):
    """What arrives is as large as what was sent."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        return torch.empty_like(t)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return torch.empty_like(g.contiguous())


def spread_attention(plain: Callable[..., Tensor], size: int) -> Callable[..., Tensor]:
    """``F.scaled_dot_product_attention`` of one of ``size`` ranks of Ulysses: all tokens of its share of the heads."""

    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        exchange = _Exchange(size)
        heads, kv_heads = query.shape[1] // size, max(1, key.shape[1] // size)
        q, k, v = exchange.gather(query, heads), exchange.gather(key, kv_heads), exchange.gather(value, kv_heads)
        return exchange.spread(plain(q, k, v, *args, **kwargs))

    return attention
