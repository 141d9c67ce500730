"""Runs plain and private steps of a meta twin under a step meter, as one process or as one rank of an engine."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args
from unittest import mock

import torch
from torch import Tensor, nn

from dpft.clipping.strategy_choice import Strategy
from dpft.errors import UnsupportedModuleError
from dpft.kernels import impl
from dpft.kernels.gram import REMEMBERED, InputCache
from dpft.kernels.head import HeadProducts, chunked_head_loss
from dpft.planning.blocks import SHALLOW, deeper_operations, deeper_peak, phases, repeated_blocks, shortened
from dpft.planning.step_meter import Cost, Operation, StepMeter
from dpft.planning.twin import on_meta
from dpft.rules import base
from dpft.rules import head as rules_head
from dpft.wrap import get_state, unwrap, wrap

__all__ = ["ENGINES", "EngineName", "Meter", "Sharding", "Simulation", "ready_on_meta", "simulate", "simulated"]

EngineName = Literal["single", "ddp", "fsdp2", "zero1", "zero2", "zero3"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)
# The isolation check runs on backward 1, 2, 4, 8, ...: the simulated step is never one of them.
_NEVER = 1 << 62


@dataclass(frozen=True)
class Sharding:
    """What an engine shards over its ranks; see ``docs/engines.md``.

    Attributes:
        engine: its name.
        world_size: number of ranks.
    """

    engine: EngineName = "single"
    world_size: int = 1

    @property
    def parameters(self) -> bool:
        """Whether a rank keeps only its shard of the parameters, and gathers them to use them."""
        return self.engine in ("fsdp2", "zero3")

    @property
    def gradients(self) -> bool:
        """Whether a rank keeps only its shard of the gradients (plain) or of the clipped sums (private)."""
        return self.engine in ("fsdp2", "zero2", "zero3")

    @property
    def states(self) -> bool:
        """Whether a rank keeps only its shard of the optimiser's states."""
        return self.engine not in ("single", "ddp")

    def part(self, numel: int, sharded: bool) -> int:
        """Number of elements that a rank holds of ``numel``."""
        return math.ceil(numel / self.world_size) if sharded else numel


@dataclass(frozen=True)
class Simulation:
    """Memory and operations of one step.

    Attributes:
        peak: bytes above parameters, buffers and the batch, of a step that starts without gradients.
        accumulating_peak: the same for a step that adds to the previous physical batch's gradient, which is included.
        operations: of the step, with counts.
    """

    peak: int
    accumulating_peak: int
    operations: Counter[Operation]

    def flops(self, attention: bool = True) -> int:
        """FLOPs, with or without fused attention."""
        return sum(op.flops * n for op, n in self.operations.items() if attention or not op.attention)


class _Rank:
    """Stand-in for an engine: takes the gradients as it would, and keeps its part of their sums in float32."""

    alone = False
    reentrant = True

    def __init__(self, sharding: Sharding, batch_size: int) -> None:
        self.sharding, self.sharded, self.max_batch_size = sharding, sharding.parameters, batch_size
        self._sums: dict[str, Tensor] = {}

    def _add_to(self, name: str, grad: Tensor, dtype: torch.dtype) -> None:
        part = grad.flatten()[: self.sharding.part(grad.numel(), self.sharding.gradients)]
        if name in self._sums:
            self._sums[name].add_(part)
        else:
            self._sums[name] = part.to(dtype, copy=True)

    def add(self, name: str, grad: Tensor) -> None:
        self._add_to(name, grad, torch.promote_types(grad.dtype, torch.float32))

    def take(self, name: str) -> Callable[[Tensor], None]:
        """A hook for plain training: moves the gradient from ``.grad`` to the engine as soon as it is accumulated."""

        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            self._add_to(name, parameter.grad, parameter.grad.dtype)
            parameter.grad = None

        return hook

    def settle(self) -> None:
        return None

    def any(self, flag: bool) -> bool:
        return flag

    def same_everywhere(self, words: str) -> bool:
        return True

    def hold(self, weight: Tensor) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def rewind(self) -> Callable[[], None]:
        return lambda: None

    def leaves(self) -> dict[str, Tensor]:
        return {}


@contextlib.contextmanager
def _prepared(
    twin: nn.Module,
    strategy: Strategy | None,
    sharding: Sharding,
    batch_size: int,
    loss_chunk: int | Literal["auto"] | None,
) -> Iterator[None]:
    """A context in which the twin's steps use ``strategy`` (None: plain) on a rank of ``sharding``; then undone."""
    rank = None if sharding.engine == "single" else _Rank(sharding, batch_size)
    hooks = []
    if strategy is not None:
        ready_on_meta(wrap(twin, strategy=strategy, loss_chunk=loss_chunk))
        get_state(twin).engine = rank
    elif rank is not None and sharding.gradients:
        named = [(name, p) for name, p in twin.named_parameters() if p.requires_grad]
        hooks = [p.register_post_accumulate_grad_hook(rank.take(name)) for name, p in named]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        if strategy is not None:
            unwrap(twin)
        twin.zero_grad(set_to_none=True)


def simulate(
    twin: nn.Module,
    batch_size: int,
    seq_len: int,
    strategy: Strategy | None = None,
    sharding: Sharding | None = None,
    loss_chunk: int | Literal["auto"] | None = "auto",
    gpu: bool = False,
    whole: bool = False,
    costs: dict[Hashable, Cost] | None = None,
) -> Simulation:
    """Run two steps, ``model(input_ids=ids, labels=ids).loss.backward()``; the second accumulates onto the first.

    Args:
        twin: from :func:`dpft.planning.twin.make_twin`, or any causal LM on meta in training mode.
        batch_size: B.
        seq_len: T; every row is full.
        strategy: of the private step; None for the plain one.
        sharding: the engine; None is one process.
        loss_chunk: as in :func:`dpft.wrap`.
        gpu: whether kernels run as on a GPU.
        whole: run the twin with all of its blocks, however many there are.
        costs: what was counted once, shared by simulations of the same ``gpu``.

    Raises:
        UnsupportedModuleError: the model cannot run on meta tensors, or ``strategy`` does not cover it.
    """
    blocks = None if whole else repeated_blocks(twin)
    if blocks is not None:
        count = len(blocks)
        runs = []
        for few in SHALLOW:
            with shortened(twin, blocks, few):
                runs.append(_run(twin, batch_size, seq_len, strategy, sharding, loss_chunk, gpu, blocks, costs))
        peaks = [deeper_peak(a.phases, b.phases, count) for a, b in zip(*runs, strict=True)]
        operations = deeper_operations(runs[0][0].operations, runs[1][0].operations, count)
        found = [_Step(peak, operations, {}) for peak in peaks if peak is not None]
    if blocks is None or len(found) < 2:
        found = _run(twin, batch_size, seq_len, strategy, sharding, loss_chunk, gpu, None, costs)
    # DistributedDataParallel, which private training does not use, keeps its buckets between steps.
    buckets = strategy is None and sharding is not None and sharding.engine == "ddp"
    held = sum(p.numel() * p.element_size() for p in twin.parameters() if p.requires_grad) if buckets else 0
    return Simulation(found[0].peak + held, found[1].peak + held, found[0].operations)


@dataclass(frozen=True)
class _Step:
    """Peak, operations, and peaks by phase of one step."""

    peak: int
    operations: Counter[Operation]
    phases: dict[Any, int]


def _run(
    twin: nn.Module,
    batch_size: int,
    seq_len: int,
    strategy: Strategy | None,
    sharding: Sharding | None,
    loss_chunk: int | Literal["auto"] | None,
    gpu: bool,
    blocks: nn.ModuleList | None,
    costs: dict[Hashable, Cost] | None,
) -> list[_Step]:
    """Two steps of the twin as it is; ``blocks``: with peaks by phase."""
    ids = torch.empty((batch_size, seq_len), dtype=torch.int64, device="meta")
    found: list[_Step] = []
    prepared = _prepared(twin, strategy, sharding or Sharding(), batch_size, loss_chunk)
    with warnings.catch_warnings(), prepared:
        warnings.simplefilter("ignore")  # the model's warnings: the real step will repeat them
        meter = StepMeter([*twin.parameters(), *twin.buffers(), ids], costs)
        labelled = contextlib.nullcontext() if blocks is None else phases(meter, blocks)
        with meter, simulated(meter, gpu, meter), labelled:
            for _ in range(2):
                meter.reset()
                _step(twin, ids)
                found.append(_Step(meter.peak, meter.operations, dict(meter.phases)))
    return found


class Meter(Protocol):
    """A meter of simulated steps."""

    def once(self, key: Hashable, run: Callable[[], Tensor]) -> Tensor:
        """``run()`` the first time; for the same ``key`` again, count its cost and return a result of that shape."""
        ...


def ready_on_meta(model: nn.Module) -> None:
    """Let a wrapped model on meta run steps: without the isolation check, and without reading deferred checks."""
    state = get_state(model)
    state.probed_at = state.isolated_at = _NEVER
    state.deferred_checks.deferred = True  # meta tensors have no values to read


@contextlib.contextmanager
def simulated(meter: Meter, gpu: bool, steps: StepMeter | None = None) -> Iterator[None]:
    """A context in which models on meta can run steps, with the kernels of a GPU or of a CPU.

    The norm of a layer of long texts is run once for each shape and counted whenever it is used; in short texts layers
    with the same input share products. For ``steps`` so is the head with its loss.
    """

    def counted(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any) -> Tensor:
            if args[0].shape[1] <= REMEMBERED:
                return norm(*args)
            shapes = [(a.shape, a.stride(), a.dtype) for a in args if isinstance(a, Tensor)]
            rest = [a for a in args if not isinstance(a, Tensor | InputCache)]
            return meter.once((norm, *shapes, *rest), lambda: norm(*args))

        return call

    def head_once(*args: Any, **kwargs: Any) -> HeadProducts:
        shapes = [(a.shape, a.stride(), a.dtype) if isinstance(a, Tensor) else a for a in args]
        if steps is None:
            return chunked_head_loss(*args, **kwargs)
        return steps.once((*shapes, *kwargs.items()), lambda: chunked_head_loss(*args, **kwargs))

    names = ("upper_sq_norm", "embedding_sq_norm")
    replaced: dict[str, Any] = {name: counted(getattr(base, name)) for name in names}
    with (
        on_meta(),
        mock.patch.object(impl, "simulated_gpu", gpu),
        mock.patch.multiple(base, **replaced),
        mock.patch.object(rules_head, "chunked_head_loss", head_once),
    ):
        yield


def _step(twin: nn.Module, ids: Tensor) -> None:
    try:
        loss = twin(input_ids=ids, labels=ids).loss
    except (TypeError, AttributeError, NotImplementedError, RuntimeError) as error:
        if isinstance(error, UnsupportedModuleError):
            raise
        raise UnsupportedModuleError(
            f"{type(twin).__name__} could not be run on meta tensors: {type(error).__name__}: {error}. Expected a "
            "causal LM that takes input_ids and labels, without data-dependent control flow or shapes (as in the "
            "routing of a mixture of experts). Measure such a model instead."
        ) from error
    if not isinstance(loss, Tensor):
        raise UnsupportedModuleError(
            f"{type(twin).__name__} returned no loss for labels (got {type(loss).__name__}); expected a causal LM"
        )
    loss.backward()
