"""Communication between the ranks of one training, other than gradients: counts, errors, consistency checks.

Everything here is a collective: all ranks call it, in the same order. The only exchanged values that depend on the
private data are the number of physical batches, whose maximum all ranks learn, and with ``adaptive_clip`` the number
of clipped examples, whose total they learn; neither is written anywhere.
"""

from __future__ import annotations

import hashlib
import pickle
import zlib
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dpft.errors import EngineError

T = TypeVar("T")


class Ranks:
    """The processes that share the logical batches; one process is the trivial case.

    Args:
        device: where collectives run: the training's device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        several = dist.is_available() and dist.is_initialized()
        self.world = dist.get_world_size() if several else 1
        self.rank = dist.get_rank() if several else 0

    def _range(self, value: int, about: str) -> tuple[int, int]:
        """The smallest and the largest of all ranks' values; all ranks must pass the same ``about``."""
        if self.world == 1:
            return value, value
        topic = zlib.crc32(about.encode())
        tensor = torch.tensor([value, -value, topic, -topic], dtype=torch.int64, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        largest, smallest, first, last = tensor.tolist()
        if first != topic or last != -topic:
            raise EngineError(
                f"the ranks are out of step: this one exchanges {about}, another one something else. Every rank must "
                "take the same batches from the loader and make the same calls."
            )
        return -smallest, largest

    def maximum(self, value: int, about: str = "physical batches") -> int:
        """The largest of all ranks' values."""
        return self._range(value, about)[1]

    def minimum(self, value: int, about: str = "memory") -> int:
        """The smallest of all ranks' values."""
        return self._range(value, about)[0]

    def total(self, value: int) -> int:
        """The sum of all ranks' values."""
        if self.world == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.int64, device=self.device)
        dist.all_reduce(tensor)
        return int(tensor.item())

    def same(self, words: str) -> bool:
        """Whether all ranks pass the same string."""
        number = int.from_bytes(hashlib.sha256(words.encode()).digest()[:7], "big")
        smallest, largest = self._range(number, "parameters")
        return smallest == largest

    def any(self, flag: bool, about: str = "a flag") -> bool:
        """Whether it is true on any rank."""
        return bool(self._range(int(flag), about)[1])

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of the ranks. Any picklable object; not for secrets."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: T) -> T:
        """Rank 0's value. It is sent over the process group's own connections and stored nowhere."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def together(self, act: Callable[[], T]) -> T:
        """Run ``act`` on every rank; an exception on one rank is raised on all, so that no rank is left waiting.

        Raises:
            Exception: this rank's own; or, where only others failed, one of theirs.
        """
        result: T | None = None
        error: Exception | None = None
        try:
            result = act()
        except Exception as raised:
            error = raised
        if not self.any(error is not None, "an error"):
            assert error is None
            return result  # type: ignore[return-value]  # act has returned, so this is its result, whatever its type
        errors = self.gather(None if error is None else _portable(error))
        if error is not None:
            raise error
        rank, theirs = next((rank, e) for rank, e in enumerate(errors) if e is not None)
        if hasattr(theirs, "add_note"):  # Python 3.11
            theirs.add_note(f"(raised on rank {rank}, and here because all ranks stop together)")
        raise theirs

    def agree(self, facts: dict[str, Any], what: str) -> None:
        """Refuse to continue unless all ranks pass the same facts.

        Raises:
            EngineError: on all ranks; names what differs and each rank's value.
        """
        stated = self.gather(facts)
        for name in sorted({name for each in stated for name in each}):
            values = [each.get(name, "(nothing)") for each in stated]
            if any(value != values[0] for value in values):
                raise EngineError(
                    f"the ranks disagree on {what} {name!r}: "
                    + ", ".join(f"rank {rank} has {value!r}" for rank, value in enumerate(_apart(values)))
                    + ". Give every rank the same value, from one source such as a file or an option."
                )


def _apart(values: list[Any]) -> list[Any]:
    """The values; of lists and dictionaries only the first entry in which they differ."""
    if all(isinstance(value, dict) for value in values):
        values = [list(value.items()) for value in values]
    if not all(isinstance(value, list) for value in values):
        return values
    for entries in zip(*values, strict=False):
        if any(entry != entries[0] for entry in entries):
            return list(entries)
    return [f"{len(value)} entries" for value in values]


def _portable(error: Exception) -> Exception:
    """A picklable exception: the same one, or an EngineError with its message."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return EngineError(f"{type(error).__name__}: {error}")
    return error


def limit_waiting(limit: timedelta | None) -> None:
    """Set the run's timeout on every process group.

    DeepSpeed, and a mesh of several dimensions, create process groups without it, so that a rank which hangs would
    block the others for torch's default timeout (30 minutes, 10 under NCCL). torch has no public way to set the
    timeout of an existing group: only this function uses the private one.

    Args:
        limit: ``InitProcessGroupKwargs.timeout`` of the Accelerator; None leaves the defaults.
    """
    if limit is None:
        return
    c10d: Any = dist.distributed_c10d
    for group in list(c10d._world.pg_map):
        c10d._set_pg_timeout(limit, group)
