"""Runs plain and private steps of a meta twin under a meter, as one process or as one rank of an engine."""

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

from dpft import kernels
from dpft.clipping.strategy_choice import Strategy
from dpft.errors import UnsupportedModuleError
from dpft.kernels import impl
from dpft.planning.step_meter import Operation, StepMeter
from dpft.planning.twin import on_meta
from dpft.wrap import get_state, unwrap, wrap

__all__ = ["ENGINES", "EngineName", "Meter", "Sharding", "Simulation", "ready_on_meta", "simulate", "simulated"]

EngineName = Literal["single", "ddp", "fsdp2", "zero1", "zero2", "zero3"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)
# The isolation check runs on backward 1, 2, 4, 8, ... of a batch: the step that is simulated is none of them.
_NEVER = 1 << 62


@dataclass(frozen=True)
class Sharding:
    """How an engine spreads what a rank holds; see ``docs/engines.md``.

    Attributes:
        engine: its name.
        world_size: ranks.
    """

    engine: EngineName = "single"
    world_size: int = 1

    @property
    def parameters(self) -> bool:
        """Whether a rank keeps only its part of the parameters, and gathers them to use them."""
        return self.engine in ("fsdp2", "zero3")

    @property
    def gradients(self) -> bool:
        """Whether a rank keeps only its part of the gradients, plain, or of the clipped sums, private."""
        return self.engine in ("fsdp2", "zero2", "zero3")

    @property
    def states(self) -> bool:
        """Whether a rank keeps only its part of the optimiser's states."""
        return self.engine not in ("single", "ddp")

    def part(self, numel: int, sharded: bool) -> int:
        """Elements of ``numel`` that a rank holds."""
        return math.ceil(numel / self.world_size) if sharded else numel


@dataclass(frozen=True)
class Simulation:
    """What one step does.

    Attributes:
        peak: bytes above parameters, buffers and the batch, of a step that finds no gradient.
        accumulating_peak: the same of one that finds the gradient of the physical batch before it, which it includes.
        operations: what the step runs, with counts.
    """

    peak: int
    accumulating_peak: int
    operations: Counter[Operation]

    def flops(self, attention: bool = True) -> int:
        """FLOPs, with or without fused attention."""
        return sum(op.flops * n for op, n in self.operations.items() if attention or not op.attention)


class _Rank:
    """Stands for an engine: takes the gradients as it would, and holds its part of their sums in float32."""

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
        """A hook for plain training: the engine takes the gradient from ``.grad`` as soon as it is there."""

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
    """Inside, the twin takes steps of ``strategy`` (None: plain) as a rank of ``sharding``; then it is as before."""
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
) -> Simulation:
    """Run two steps, ``model(input_ids=ids, labels=ids).loss.backward()``, the second onto the first's gradient.

    Args:
        twin: of :func:`dpft.planning.twin.make_twin`, or any causal LM of meta tensors in training mode.
        batch_size: B.
        seq_len: T; every row is full.
        strategy: of the private step; None for the plain one of Hugging Face.
        sharding: the engine; None is one process.
        loss_chunk: as in :func:`dpft.wrap`.
        gpu: whether kernels are to take the way that they take on a GPU.

    Raises:
        UnsupportedModuleError: the model cannot be run so, or ``strategy`` does not cover it.
    """
    ids = torch.empty((batch_size, seq_len), dtype=torch.int64, device="meta")
    found: list[tuple[int, Counter[Operation]]] = []
    prepared = _prepared(twin, strategy, sharding or Sharding(), batch_size, loss_chunk)
    with warnings.catch_warnings(), prepared:
        warnings.simplefilter("ignore")  # of models, about what they are asked: the real step will repeat them
        with StepMeter([*twin.parameters(), *twin.buffers(), ids]) as meter, simulated(meter, gpu):
            for _ in range(2):
                meter.reset()
                _step(twin, ids)
                found.append((meter.peak, meter.operations))
    # DistributedDataParallel, which private training does without, holds its buckets from step to step.
    buckets = strategy is None and sharding is not None and sharding.engine == "ddp"
    held = sum(p.numel() * p.element_size() for p in twin.parameters() if p.requires_grad) if buckets else 0
    return Simulation(found[0][0] + held, found[1][0] + held, found[0][1])


class Meter(Protocol):
    """What counts a simulated step."""

    def once(self, key: Hashable, run: Callable[[], Tensor]) -> Tensor:
        """``run()`` the first time; for the same ``key`` again what it cost, and a result of the same shape."""
        ...


def ready_on_meta(model: nn.Module) -> None:
    """Let a wrapped model of meta tensors step: without the isolation check, and without a look at what was found."""
    state = get_state(model)
    state.probed_at = _NEVER
    state.deferred_checks.deferred = True  # there is nothing to read


@contextlib.contextmanager
def simulated(meter: Meter, gpu: bool) -> Iterator[None]:
    """Inside, models of meta tensors take steps, their kernels as on a GPU or not.

    A layer's norm is run once for each shape, and counted whenever it is used.
    """

    def counted(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any) -> Tensor:
            shapes = [(a.shape, a.stride(), a.dtype) if isinstance(a, Tensor) else a for a in args]
            return meter.once((norm, *shapes), lambda: norm(*args))

        return call

    names = ("linear_sq_norm", "embedding_sq_norm")
    replaced: dict[str, Any] = {name: counted(getattr(kernels, name)) for name in names}
    with on_meta(), mock.patch.object(impl, "simulated_gpu", gpu), mock.patch.multiple(kernels, **replaced):
        yield


def _step(twin: nn.Module, ids: Tensor) -> None:
    try:
        loss = twin(input_ids=ids, labels=ids).loss
    except (TypeError, AttributeError, NotImplementedError, RuntimeError) as error:
        if isinstance(error, UnsupportedModuleError):
            raise
        raise UnsupportedModuleError(
            f"{type(twin).__name__} could not be run on meta tensors: {type(error).__name__}: {error}. Expected a "
            "causal LM that takes input_ids and labels and whose forward does not branch on the data (experts that "
            "are routed by the values of tokens do). Measure such a model instead."
        ) from error
    if not isinstance(loss, Tensor):
        raise UnsupportedModuleError(
            f"{type(twin).__name__} gave no loss for labels (got {type(loss).__name__}); expected a causal LM"
        )
    loss.backward()
