"""Runs plain and private steps of a meta twin under a step meter, as one process or as one rank of an engine."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpft.clipping.clip_groups import ClipGroupsSpec
from dpft.clipping.strategy_choice import Strategy
from dpft.errors import UnsupportedModuleError
from dpft.kernels import impl
from dpft.kernels.gram import REMEMBERED, InputCache
from dpft.kernels.head import HeadProducts, chunked_head_loss
from dpft.planning.blocks import (
    OFFLOADED,
    SHALLOW,
    deeper_counts,
    deeper_operations,
    deeper_parts,
    deeper_peaks,
    phases,
    repeated_blocks,
    shortened,
)
from dpft.planning.long_text import HostMeter, find_long_context, offloading, spread_attention
from dpft.planning.parts import HEAD, Parts
from dpft.planning.rank import ENGINES, EngineName, Rank, Sharding
from dpft.planning.step_meter import Cost, Operation, StepMeter
from dpft.planning.twin import on_meta
from dpft.rules import base
from dpft.rules import head as rules_head
from dpft.wrap import get_state, unwrap, wrap

__all__ = ["ENGINES", "EngineName", "Meter", "Sharding", "Simulation", "ready_on_meta", "simulate", "simulated"]

# The isolation check runs on backward 1, 2, 4, 8, ...: the simulated step is never one of them.
_NEVER = 1 << 62
# The phase behind a step.
_END = ("end", 0, "last")


@dataclass(frozen=True)
class Simulation:
    """Memory and operations of one step.

    Attributes:
        peak: bytes above parameters, buffers and the batch, of a step that starts without gradients.
        accumulating_peak: the same for a step that adds to the previous physical batch's gradient, which is included.
        operations: of the step, with counts.
        offloaded: what is in host memory at most, of checkpoints' inputs: bytes of a tensor, and how many there are.
        parts: bytes of ``accumulating_peak`` by name; empty without long context.
        at_peak: what ran then.
        layer: operations of a layer's forward, and of its backward with the recomputation.
    """

    peak: int
    accumulating_peak: int
    operations: Counter[Operation]
    offloaded: Counter[int] = field(default_factory=Counter)
    parts: dict[str, int] = field(default_factory=dict)
    at_peak: str = ""
    layer: tuple[Counter[Operation], Counter[Operation]] = field(default_factory=lambda: (Counter(), Counter()))

    def flops(self, attention: bool = True) -> int:
        """FLOPs, with or without fused attention."""
        return sum(op.flops * n for op, n in self.operations.items() if attention or not op.attention)


@contextlib.contextmanager
def _prepared(
    twin: nn.Module,
    strategy: Strategy | None,
    sharding: Sharding,
    batch_size: int,
    loss_chunk: int | Literal["auto"] | None,
    clip_groups: ClipGroupsSpec | None,
) -> Iterator[None]:
    """A context in which the twin's steps use ``strategy`` (None: plain) on a rank of ``sharding``; then undone."""
    rank = None if sharding.engine == "single" and not sharding.sums_on_host else Rank(sharding, batch_size)
    hooks = []
    plain_long = strategy is None and find_long_context(twin) is not None
    if plain_long:  # with the chunked head, too
        ready_on_meta(wrap(twin, clipping="none", loss_chunk=loss_chunk))
    if strategy is not None:
        ready_on_meta(wrap(twin, strategy=strategy, loss_chunk=loss_chunk, clip_groups=clip_groups))
        get_state(twin).engine = rank
    elif rank is not None and sharding.gradients:
        named = [(name, p) for name, p in twin.named_parameters() if p.requires_grad]
        hooks = [p.register_post_accumulate_grad_hook(rank.take(name)) for name, p in named]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        if strategy is not None or plain_long:
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
    in_transit: int | None = None,
    clip_groups: ClipGroupsSpec | None = None,
) -> Simulation:
    """Run two steps, ``model(input_ids=ids, labels=ids).loss.backward()``; the second accumulates onto the first.

    Args:
        twin: from :func:`dpft.planning.twin.make_twin`, or any causal LM on meta in training mode.
        batch_size: B.
        seq_len: T; every row is full.
        strategy: of the private step; None for the plain one, which under long context has a chunked head, too.
        sharding: the engine; None is one process.
        loss_chunk: as in :func:`dpft.wrap`.
        gpu: whether kernels run as on a GPU.
        whole: run the twin with all of its blocks, however many there are.
        costs: what was counted once, shared by simulations of the same ``gpu``.
        in_transit: checkpoints' inputs go to host memory, and the device still holds so many whose copies have not
            ended: 2 on a GPU. None: they stay on the device. Of twins with long context.
        clip_groups: as in :func:`dpft.wrap`.

    Raises:
        UnsupportedModuleError: the model cannot run on meta tensors, or ``strategy`` does not cover it.
    """
    shards = sharding or Sharding()
    run = functools.partial(_run, twin, batch_size, seq_len, strategy, shards, loss_chunk, clip_groups, gpu, costs)
    blocks = None if whole else repeated_blocks(twin)
    found: list[_Step] = []
    if blocks is not None:
        runs = []
        shallow = SHALLOW if in_transit is None else OFFLOADED
        for few in shallow:
            with shortened(twin, blocks, few):
                runs.append(run(in_transit, blocks))
        deeper = [_deeper(a, b, len(blocks), shallow) for a, b in zip(*runs, strict=True)]
        found = [step for step in deeper if step is not None]
    if len(found) < 2:
        found = run(in_transit, None)
    # DistributedDataParallel, which private training does not use, keeps its buckets between steps.
    buckets = strategy is None and sharding is not None and sharding.engine == "ddp"
    held = sum(p.numel() * p.element_size() for p in twin.parameters() if p.requires_grad) if buckets else 0
    first, second = found
    # Tiles find the shape of their output once, in the first step.
    steady = first if find_long_context(twin) is None else second
    phase = max(second.phases, key=lambda phase: second.phases[phase])
    return Simulation(
        first.peak + held,
        second.peak + held,
        steady.operations,
        second.offloaded,
        {name: size for name, size in second.parts.get(phase, Counter()).items() if size},
        _words(phase),
        second.layer,
    )


@dataclass(frozen=True)
class _Step:
    """One step: peak, operations; and what :class:`Simulation` has, by phase."""

    peak: int
    operations: Counter[Operation]
    phases: dict[Any, int]
    parts: dict[Any, Counter[str]]
    offloaded: Counter[int]
    layer: tuple[Counter[Operation], Counter[Operation]]


def _deeper(few: _Step, more: _Step, count: int, shallow: tuple[int, int]) -> _Step | None:
    """A step of ``count`` blocks, from those of ``shallow`` ones; None if it is not that simple."""
    phases = deeper_peaks(few.phases, more.phases, count, shallow)
    if phases is None:
        return None
    operations = deeper_operations(few.operations, more.operations, count, shallow)
    offloaded = deeper_counts(few.offloaded, more.offloaded, count, shallow)
    parts = deeper_parts(few.parts, more.parts, few.phases, more.phases, count, shallow)
    return _Step(max(phases.values()), operations, phases, parts, offloaded, more.layer)


def _words(phase: Any) -> str:
    kind, _, place = phase
    if kind == "between":
        return "head and loss" if place == "last" else "between two layers"
    if kind == "after":
        return "the embedding's backward, and the release"
    return f"the {kind} of a layer"


def _run(
    twin: nn.Module,
    batch_size: int,
    seq_len: int,
    strategy: Strategy | None,
    sharding: Sharding,
    loss_chunk: int | Literal["auto"] | None,
    clip_groups: ClipGroupsSpec | None,
    gpu: bool,
    costs: dict[Hashable, Cost] | None,
    in_transit: int | None,
    blocks: nn.ModuleList | None,
) -> list[_Step]:
    """Two steps of the twin as it is; ``blocks``: with peaks by phase."""
    ids = torch.empty((batch_size, -(-seq_len // sharding.sequence)), dtype=torch.int64, device="meta")
    found: list[_Step] = []
    installed = find_long_context(twin)
    parts = None if installed is None else Parts(twin, installed)
    host = None if in_transit is None else HostMeter(in_transit)
    if blocks is None and installed is not None:
        blocks = next((m for m in twin.modules() if isinstance(m, nn.ModuleList) and installed.layers[0] in m), None)
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")  # the model's warnings: the real step will repeat them
        stack.enter_context(offloading(twin, host))
        stack.enter_context(_prepared(twin, strategy, sharding, batch_size, loss_chunk, clip_groups))
        meter = StepMeter([*twin.parameters(), *twin.buffers(), ids], costs, parts)
        stack.enter_context(meter)
        stack.enter_context(simulated(meter, gpu, meter, parts))
        if sharding.sequence > 1:
            attention = spread_attention(F.scaled_dot_product_attention, sharding.sequence)
            stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", attention))
        if parts is not None:
            stack.enter_context(parts.watching())
        if blocks is not None:
            stack.enter_context(phases(meter, blocks))
        for _ in range(2):
            meter.reset()
            if host is not None:
                host.reset()
            _step(twin, ids)
            meter.enter(_END)
            forward, backward = (
                meter.phase_operations.get((*kind, "first"), Counter()) for kind in (("forward", 0), ("backward", 1))
            )
            found.append(
                _Step(
                    meter.peak,
                    meter.operations,
                    {phase: peak for phase, peak in meter.phases.items() if phase != _END},
                    meter.phase_parts,
                    Counter() if host is None else host.most,
                    (forward, backward),
                )
            )
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
def simulated(meter: Meter, gpu: bool, steps: StepMeter | None = None, parts: Parts | None = None) -> Iterator[None]:
    """A context in which models on meta can run steps, with the kernels of a GPU or of a CPU.

    The norm of a layer of long texts is run once for each shape and counted whenever it is used; in short texts layers
    with the same input share products. For ``steps`` so is the head with its loss. ``parts`` is told what it is.
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
        with contextlib.nullcontext() if parts is None else parts.inside(HEAD):
            return steps.once((*shapes, *kwargs.items()), lambda: chunked_head_loss(*args, **kwargs), HEAD)

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
