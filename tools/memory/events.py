"""What a tracker writes down: storages, and what happened to them when."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

PLAIN = (Tensor, nn.Parameter)  # types with a storage of their own; a subclass is made of such tensors


class Role(enum.IntEnum):
    """Who holds a storage; of several holders the one of the least value is the storage's component."""

    PARAMETER = 0
    BUFFER = 1
    INPUT = 2
    GRADIENT = 3
    OPTIMIZER = 4
    NORM = 5
    SAVED = 6
    CHECKPOINT = 7
    KEPT = 8
    RECOMPUTED = 9


class Kind(enum.IntEnum):
    """What an event says."""

    BIRTH = 0
    DEATH = 1
    HOLD = 2
    DROP = 3
    MARK = 4


@dataclass
class Storage:
    """One storage.

    Attributes:
        size: bytes.
        shape: of the tensor that it was born as, or first seen in.
        dtype: of that tensor.
        operator: of ATen, that made it; empty where it was there before.
        module: in whose forward or backward that was; empty where it is not known.
        private: whether code of a private step made it.
        becomes: what it ends as, by one tensor handing it on to another.
    """

    size: int
    shape: tuple[int, ...]
    dtype: str
    operator: str
    module: str
    private: bool
    becomes: Role | None = None


class Event(NamedTuple):
    """Something that happened.

    Attributes:
        at: nanoseconds of ``time.perf_counter_ns``.
        kind: what.
        storage: its index; of a mark, the mark's.
        role: of a hold or a drop.
    """

    at: int
    kind: Kind
    storage: int
    role: Role | None = None


class Operation(NamedTuple):
    """An operation: how many events there were when it had ended or raised, where it ran, which it was."""

    events: int
    module: str
    operator: str


@dataclass
class Owners:
    """Asked for the tensors that they hold: ``steady`` at marks, ``changing`` also within a phase."""

    steady: Callable[[], Iterable[tuple[Role, Tensor]]]
    changing: Callable[[], Iterable[tuple[Role, Tensor]]]
