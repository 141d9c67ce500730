"""The clipped sums of a logical batch, where several processes train one model.

The engine shards, gathers and steps; dpft handles the gradients. No engine hook sees a gradient before it is private:
a weighted gradient goes directly from the layer to :meth:`ClippedSums.add`, which sums it over ranks and physical
batches in float32, whatever dtypes, averaging, clipping or compression the engine is configured with. After
:meth:`ClippedSums.release` each element has been noised, once, by the rank that owns it.
"""

from __future__ import annotations

import abc
import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dpft.engines.ranks import Ranks
from dpft.errors import EngineError
from dpft.noise import Place
from dpft.optimizer import Noise
from dpft.rules.base import full_shape

# Elements that are reduced, noised and gathered at a time.
BUCKET = 1 << 25
# Gradients being sent to other ranks at a time: one is computed while the previous one is sent.
IN_FLIGHT = 2


class Piece(Protocol):
    """Elements of one parameter that one rank updates."""

    @property
    def rank(self) -> int:
        """The owner."""
        ...

    @property
    def start(self) -> int:
        """The first element, in the parameter flattened."""
        ...

    @property
    def numel(self) -> int:
        """Their number."""
        ...


class ClippedSums(abc.ABC):
    """Float32 (or float64) sums over ranks and physical batches, and their noise.

    Args:
        parameters: the trainable ones by canonical name, as the engine left them.
        ranks: the processes.

    Attributes:
        owned: number of elements to which this rank adds noise.
        total: number of elements of all parameters: the sum of ``owned`` over all ranks.
        spread: whether they come as shares, by :meth:`accumulate`, and not by :meth:`add`.
    """

    spread = False

    def __init__(self, parameters: dict[str, nn.Parameter], ranks: Ranks) -> None:
        self.parameters, self.ranks = parameters, ranks
        self.shapes = {name: full_shape(p) for name, p in parameters.items()}
        self.total = sum(shape.numel() for shape in self.shapes.values())
        self._numbers = {name: number for number, name in enumerate(parameters)}
        self.owned = 0
        self._released = False  # the buffers hold a release: nothing may be added to it
        self._travelling: deque[tuple[Any, Callable[[], None]]] = deque()

    def _count_owned(self, owned: int) -> None:
        """Set :attr:`owned`; a collective.

        Raises:
            EngineError: the ranks' parts do not make up all parameters, each element once.
        """
        self.owned = owned
        covered = self.ranks.total(owned)
        if covered != self.total:
            raise EngineError(
                f"together the ranks own {covered} elements of trainable parameters, and there are {self.total}: "
                "noise would be missing or doubled. The engine's way of sharding has changed; this version of it is "
                "not supported."
            )

    @abc.abstractmethod
    def add(self, name: str, grad: Tensor) -> None:
        """Add this rank's part, of the whole shape, float32 or float64; the caller gives up ``grad``. A collective."""

    def equal_parts(self, name: str) -> int | None:
        """n, where rank r owns the elements r n to (r + 1) n of the flat parameter; None where :meth:`pieces` says it.

        Raises:
            EngineError: shares cannot be added to sums of this kind.
        """
        raise EngineError(f"{type(self).__name__} takes whole gradients only: sp_size needs FSDP2 or DeepSpeed ZeRO.")

    def pieces(self, name: str) -> Sequence[Piece]:
        """The elements of one parameter by their owner, where the parts are not equal."""
        raise NotImplementedError

    def place(self, name: str, start: int) -> Place:
        """Of the elements of one parameter from ``start`` on."""
        return Place(self._numbers[name], start, self.shapes[name].numel())

    def accumulate(self, name: str, own: Tensor) -> None:
        """Add to this rank's part of the sum, from its first element on; there may be padding after the last."""
        raise NotImplementedError

    @abc.abstractmethod
    def release(self, noise: Noise, std: float, divisor: float) -> None:
        """``(sum + N(0, std^2)) / divisor``, each element noised once. A collective.

        Raises:
            EngineError: another number of elements was noised than this rank owns.
        """

    @abc.abstractmethod
    def gradient(self, name: str) -> Tensor:
        """The released gradient, in the layout of the parameter's ``.grad``; this object keeps no reference to it."""

    @abc.abstractmethod
    def discard(self) -> None:
        """Drop the sums of a logical batch."""

    def later(self, work: Any, then: Callable[[], None]) -> None:
        """Let a collective run while the next gradient is computed; ``then`` uses its result."""
        self._travelling.append((work, then))
        while len(self._travelling) > IN_FLIGHT:
            self._arrive()

    def _arrive(self) -> None:
        work, then = self._travelling.popleft()
        if work is not None:
            work.wait()
        then()

    def settle(self) -> None:
        """Wait for the pending collectives, after which no gradient that was sent is kept."""
        while self._travelling:
            self._arrive()

    def _check_noised(self, count: int) -> None:
        # On all ranks together: one that continued would wait for the others.
        if self.ranks.any(count != self.owned, "noise"):
            raise EngineError(
                f"{count} elements were noised and this rank owns {self.owned}"
                + (", and on another rank the numbers differ" if count == self.owned else "")
                + "; nothing was released and no parameter has changed. This is a defect of dpft, or an engine that "
                "changed its sharding: report it."
            )

    def _forget(self) -> None:
        """Before a new logical batch: drop what is still being sent, which does not belong to it."""
        while self._travelling:
            work, _ = self._travelling.popleft()
            if work is not None:
                work.wait()
        self._released = False

    def check_new(self, name: str, grad: Tensor) -> None:
        if self._released:
            raise EngineError(
                "a gradient came after its logical batch was released, whose noise is drawn already; it was not "
                "added. Call backward once for each batch of the loader; after an error start a new iteration over it."
            )
        if self.shapes.get(name) != grad.shape:
            raise EngineError(
                f"a clipped gradient of shape {list(grad.shape)} came for {name!r}; expected "
                f"{list(self.shapes.get(name, []))}."
            )


class ReplicatedSums(ClippedSums):
    """Every rank holds all parameters (data parallelism without an engine's wrapper).

    Sums stay on their rank until the release, which reduce-scatters them, adds noise to one part on each rank, and
    gathers the parts: as many bytes as one all-reduce, noise drawn once per element, replicas equal by construction.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], ranks: Ranks) -> None:
        super().__init__(parameters, ranks)
        self._sums: dict[str, Tensor] = {}
        self._buckets: list[list[str]] = [[]]
        filled = 0
        for name, shape in self.shapes.items():
            if filled and filled + shape.numel() > BUCKET:
                self._buckets.append([])
                filled = 0
            self._buckets[-1].append(name)
            filled += shape.numel()
        self._count_owned(sum(self._mine(names)[1] for names in self._buckets))

    def _mine(self, names: list[str]) -> tuple[int, int]:
        """Numbers of elements of a bucket: in one rank's part, padding included, and those that this rank owns."""
        numel = sum(self.shapes[name].numel() for name in names)
        part = -(-numel // self.ranks.world)
        return part, max(0, min(part, numel - self.ranks.rank * part))

    def _parts(self, names: list[str], first: int, end: int) -> Iterator[tuple[str, int, int]]:
        """Of the elements ``first`` to ``end`` of a bucket: their parameters, and in each the first and the number."""
        before = 0
        for name in names:
            numel = self.shapes[name].numel()
            start, stop = max(0, first - before), min(numel, end - before)
            if start < stop:
                yield name, start, stop - start
            before += numel

    def add(self, name: str, grad: Tensor) -> None:
        self.check_new(name, grad)
        if name in self._sums:
            self._sums[name].add_(grad)
        else:
            self._sums[name] = grad

    def release(self, noise: Noise, std: float, divisor: float) -> None:
        self._released = True
        noised = 0

        def finish(names: list[str], flat: Tensor, own: Tensor) -> None:
            nonlocal noised
            first, done = self.ranks.rank * own.numel(), 0
            for name, start, count in self._parts(names, first, first + self._mine(names)[1]):
                noise.add_(own[done : done + count], std, self.place(name, start))
                done += count
            noised += done
            own.div_(divisor)
            dist.all_gather_into_tensor(flat, own)
            start = 0
            for name in names:
                shape = self.shapes[name]
                self._sums[name] = flat[start : start + shape.numel()].view(shape)
                start += shape.numel()

        # One bucket is noised while the next one is reduced.
        for names in self._buckets:
            flat = self._flatten(names)
            own = flat.new_empty(flat.numel() // self.ranks.world)
            work = dist.reduce_scatter_tensor(own, flat, async_op=True)
            self.later(work, functools.partial(finish, names, flat, own))
        self.settle()
        self._check_noised(noised)

    def _flatten(self, names: list[str]) -> Tensor:
        """The sums of a bucket, concatenated and padded to equal parts, and no longer kept here."""
        wide = torch.float64 if any(self.parameters[name].dtype == torch.float64 for name in names) else torch.float32
        part = self._mine(names)[0]
        flat = torch.zeros(part * self.ranks.world, dtype=wide, device=self.parameters[names[0]].device)
        start = 0
        for name in names:
            held = self._sums.pop(name, None)
            if held is not None:
                flat[start : start + held.numel()] = held.reshape(-1)
            start += self.shapes[name].numel()
        return flat

    def gradient(self, name: str) -> Tensor:
        return self._sums.pop(name)

    def discard(self) -> None:
        self._forget()
        self._sums.clear()


class ShardedSums(ClippedSums):
    """Parameters are DTensors (FSDP2): each gradient is reduce-scattered as soon as it is added.

    On a mesh with a replicated dimension (HSDP) the first replica draws the noise and the others receive it.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], ranks: Ranks) -> None:
        from torch.distributed.tensor import DTensor, Replicate, Shard

        super().__init__(parameters, ranks)
        self._sums: dict[str, Tensor] = {}
        self._replicas: dict[str, list[Any]] = {}  # the groups along which a parameter is replicated
        self._starts: dict[str, int] = {}  # the first element of this rank's shard
        owned = 0
        for name, p in parameters.items():
            given: Any = p
            if not isinstance(given, DTensor):
                raise EngineError(
                    f"{name!r} is trainable and FSDP2 has not sharded it (ignored_modules?): its gradient would not "
                    "be summed over ranks. Remove it from ignored_modules, or freeze it."
                )
            replicated = [i for i, placement in enumerate(given.placements) if isinstance(placement, Replicate)]
            sharded = [i for i, placement in enumerate(given.placements) if i not in replicated]
            rows = [
                i
                for i, pl in enumerate(given.placements)
                if isinstance(pl, Shard) and type(pl) is Shard and pl.dim == 0
            ]
            if len(sharded) > 1 or rows != sharded:
                raise EngineError(f"{name!r} has placements {given.placements}; expected one Shard(0), and Replicate.")
            coordinate = given.device_mesh.get_coordinate()
            assert coordinate is not None
            first = 0
            for i in sharded:  # rows as torch.chunk divides them
                first = -(-given.shape[0] // given.device_mesh.size(i)) * coordinate[i]
            self._starts[name] = min(first, given.shape[0]) * (given.numel() // max(1, given.shape[0]))
            self._replicas[name] = [given.device_mesh.get_group(i) for i in replicated]
            if all(coordinate[i] == 0 for i in replicated):
                owned += given.to_local().numel()
        self._count_owned(owned)

    def add(self, name: str, grad: Tensor) -> None:
        from torch.distributed.tensor import DTensor, Partial

        self.check_new(name, grad)
        p: Any = self.parameters[name]
        whole = DTensor.from_local(grad, p.device_mesh, [Partial("sum")] * p.device_mesh.ndim, run_check=False)
        shard = whole.redistribute(p.device_mesh, p.placements, async_op=True)

        def arrived() -> None:
            local = shard.to_local()
            wait = getattr(local, "wait", None)
            local = (wait() if callable(wait) else local).to(p.to_local().device)
            if name in self._sums:
                self._sums[name].add_(local)
            else:
                self._sums[name] = local.clone() if local.data_ptr() == grad.data_ptr() else local

        self.later(None, arrived)

    def equal_parts(self, name: str) -> int | None:
        from torch.distributed.tensor import Shard

        p: Any = self.parameters[name]
        if tuple(p.placements) != (Shard(0),) or p.device_mesh.mesh.tolist() != list(range(self.ranks.world)):
            raise EngineError(
                f"{name!r} is sharded as {p.placements} over {p.device_mesh}; expected, with sp_size, Shard(0) over "
                "all ranks in their order."
            )
        rows = -(-p.shape[0] // self.ranks.world)  # as torch.chunk divides them
        return rows * (p.numel() // max(1, p.shape[0]))

    def accumulate(self, name: str, own: Tensor) -> None:
        p: Any = self.parameters[name]
        local = p.to_local()
        mine = own[: local.numel()].view(local.shape).to(local.device)
        self._sums[name] = self._sums[name].add_(mine) if name in self._sums else mine.clone()

    def release(self, noise: Noise, std: float, divisor: float) -> None:
        self._released = True
        self.settle()
        noised = 0
        for name, p in self.parameters.items():
            given: Any = p
            local = self._sums.get(name)
            if local is None:
                dtype = torch.promote_types(p.dtype, torch.float32)
                local = self._sums[name] = torch.zeros_like(given.to_local(), dtype=dtype)
            groups = self._replicas[name]
            if all(dist.get_rank(group) == 0 for group in groups):
                noise.add_(local, std, self.place(name, self._starts[name]))
                noised += local.numel()
            for group in groups:
                sent = local.to(self.ranks.device)  # where the group sends, if FSDP2 keeps the shard on the CPU
                dist.broadcast(sent, group=group, group_src=0)
                local = self._sums[name] = sent.to(local.device)
            local.div_(divisor)
        self._check_noised(noised)

    def gradient(self, name: str) -> Tensor:
        # DTensor.from_local would move a shard that FSDP2 keeps on the CPU to the mesh's device.
        grad: Any = torch.empty_like(self.parameters[name], requires_grad=False)
        grad.to_local().copy_(self._sums.pop(name))
        return cast(Tensor, grad)

    def discard(self) -> None:
        self._forget()
        self._sums.clear()
