"""One rank of an engine, in a simulated step: what it shards, and what it takes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = ["ENGINES", "EngineName", "Rank", "Sharding", "Shares"]

EngineName = Literal["single", "ddp", "fsdp2", "zero1", "zero2", "zero3"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)


@dataclass(frozen=True)
class Sharding:
    """What an engine shards over its ranks; see ``docs/engines.md``.

    Attributes:
        engine: its name.
        world_size: number of ranks.
        sequence: S, ranks over which the tokens of an example are spread; it divides ``world_size``.
        sums_on_host: whether clipped sums and optimiser are in host memory (``sums_device="cpu"``), of one process.
    """

    engine: EngineName = "single"
    world_size: int = 1
    sequence: int = 1
    sums_on_host: bool = False

    @property
    def parameters(self) -> bool:
        """Whether a rank keeps only its shard of the parameters, and gathers them to use them."""
        return self.engine in ("fsdp2", "zero3")

    @property
    def gradients(self) -> bool:
        """Whether a rank keeps only its shard of the gradients (plain) or of the clipped sums (private)."""
        return self.engine in ("fsdp2", "zero2", "zero3") or self.sequence > 1

    @property
    def states(self) -> bool:
        """Whether a rank keeps only its shard of the optimiser's states."""
        return self.engine not in ("single", "ddp")

    def part(self, numel: int, sharded: bool) -> int:
        """Number of elements that a rank holds of ``numel``."""
        return math.ceil(numel / self.world_size) if sharded else numel


class Shares:
    """A rank's part in the gradients of an example whose tokens are spread, without data; a ``Spread``.

    Of each gradient a rank keeps one share of S, and holds the whole one while it is on its way.
    """

    def __init__(self, sharding: Sharding, add: Callable[[str, Tensor], None]) -> None:
        self._size, self._add = sharding.sequence, add
        # Where there are several groups, a gradient is put into another order before it is sent.
        self._copies = sharding.world_size > sharding.sequence

    def share(self, name: str, grad: Tensor) -> Callable[[], Tensor]:
        sent = grad.clone() if self._copies else grad
        own = sent.new_empty(math.ceil(sent.numel() / self._size))

        def arrived(sent: Tensor = sent) -> Tensor:  # which is held until then
            return own

        return arrived

    def add_share(self, name: str, share: Tensor | None) -> None:
        if share is not None:
            self._add(name, share)

    def total(self, values: Tensor) -> Tensor:
        return values.clone()

    def same_everywhere(self, words: str) -> bool:
        return True


class Rank:
    """Stand-in for an engine: takes the gradients as it would, and keeps its part of their sums in float32."""

    gathers_by_call = False  # of ZeRO-3, for which no tiles are planned
    reentrant = True
    sequence = None  # the twin's input has one rank's tokens

    def __init__(self, sharding: Sharding, batch_size: int) -> None:
        self.spread = Shares(sharding, self.add) if sharding.sequence > 1 else None
        self.alone = sharding.sums_on_host
        self.sharding, self.sharded, self.max_batch_size = sharding, sharding.parameters, batch_size
        self._sums: dict[str, Tensor] = {}

    def _add_to(self, name: str, grad: Tensor, dtype: torch.dtype, ranks: int) -> None:
        """``ranks``: to which the gradient is given, where gradients are sharded."""
        if self.sharding.sums_on_host:
            return
        part = grad.flatten()[: math.ceil(grad.numel() / ranks) if self.sharding.gradients else grad.numel()]
        if name in self._sums:
            self._sums[name].add_(part)
        else:
            self._sums[name] = part.to(dtype, copy=True)

    def add(self, name: str, grad: Tensor) -> None:
        # Of a spread example it is a share, 1 / S of the elements.
        ranks = self.sharding.world_size // self.sharding.sequence
        self._add_to(name, grad, torch.promote_types(grad.dtype, torch.float32), ranks)

    def take(self, name: str) -> Callable[[Tensor], None]:
        """A hook for plain training: moves the gradient from ``.grad`` to the engine as soon as it is accumulated."""

        def hook(parameter: Tensor) -> None:
            if parameter.grad is None:  # clipping="none" runs a backward within the backward, which had it
                return
            self._add_to(name, parameter.grad, parameter.grad.dtype, self.sharding.world_size)
            parameter.grad = None

        return hook

    def settle(self) -> None:
        return None

    def any(self, flag: bool) -> bool:
        return flag

    def pick(self, count: int) -> int:
        return 0

    def same_everywhere(self, words: str) -> bool:
        return True

    def hold(self, weight: Tensor) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def rewind(self) -> Callable[[], None]:
        return lambda: None

    def leaves(self) -> dict[str, Tensor]:
        return {}
