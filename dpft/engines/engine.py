"""The engine that Accelerate was launched with, and its set-up, so that clipped sums reach its optimiser."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import has_torch_function

from dpft.engines import zero_layout
from dpft.engines.deepspeed_config import NO_LEAF_MODULES
from dpft.engines.host import HostOptimizer, HostSums, Staging
from dpft.engines.ranks import Ranks, limit_waiting
from dpft.engines.sequence import SequenceGroup, SpreadSums, use_ulysses
from dpft.engines.sums import ClippedSums, ReplicatedSums, ShardedSums
from dpft.engines.zero import ZeroOptimizer, ZeroSums
from dpft.optimizer import DPOptimizer

# Engines under which each gradient is reduced as soon as it is added: all ranks must add the same ones in one order.
SENDS_AT_ONCE = ("fsdp2", "zero2", "zero3")

Kind = Literal["single", "ddp", "fsdp2", "zero1", "zero2", "zero3"]


class TrainingEngine:
    """Implements :class:`dpft.clipping.state.Engine` for each of the engines.

    Attributes:
        kind: which engine.
        alone: see the protocol.
        sharded: see the protocol.
        gathers_by_call: see the protocol.
        reentrant: see the protocol.
        max_batch_size: see the protocol.
        sums: the clipped sums.
        sequence: see the protocol.
        spread: see the protocol.
        still: called once per backward, before any step; raises if the optimiser that steps is not the one that
            :func:`launch` set up.
    """

    def __init__(
        self,
        kind: Kind,
        model: nn.Module,
        ranks: Ranks,
        sums: ClippedSums,
        max_batch_size: int,
        sequence: SequenceGroup | None = None,
    ) -> None:
        self.kind, self.ranks, self.sums, self.max_batch_size = kind, ranks, sums, max_batch_size
        self.sharded = kind in ("fsdp2", "zero3")
        self.gathers_by_call = kind == "zero3"
        self.alone = kind == "single"
        self.reentrant = kind in ("single", "ddp", "fsdp2")
        self._model = model
        self.sequence, self.spread = sequence, None if sequence is None else SpreadSums(sums, sequence)
        self._leaves: dict[str, Tensor] | None = None
        self.still: Callable[[], None] = lambda: None

    def add(self, name: str, grad: Tensor) -> None:
        self.sums.add(name, grad)

    def settle(self) -> None:
        self.sums.settle()
        self.still()  # DeepSpeed steps when the backward has ended, inside accelerator.backward

    def any(self, flag: bool) -> bool:
        return self.ranks.any(flag, "the isolation check")

    def pick(self, count: int) -> int:
        return self.ranks.from_first(random.SystemRandom().randrange(count))

    def same_everywhere(self, words: str) -> bool:
        return self.kind not in SENDS_AT_ONCE or self.ranks.same(words)

    def hold(self, weight: Tensor) -> AbstractContextManager[None]:
        return zero_layout.held(weight) if self.kind == "zero3" else nullcontext()

    def rewind(self) -> Callable[[], None]:
        return zero_layout.Rewind(self._model) if self.kind == "zero3" else _nothing_to_rewind

    def leaves(self) -> dict[str, Tensor]:
        if self.kind != "fsdp2":
            return {}
        if self._leaves is None:
            self._leaves = _unsharded_leaves(self._model)
        return self._leaves


def _nothing_to_rewind() -> None:
    pass


def _unsharded_leaves(model: nn.Module) -> dict[str, Tensor]:
    """The unsharded parameters that FSDP2 substitutes for its shards, collected module by module.

    They are the same objects in every forward: FSDP2 only allocates and frees their storage.
    """
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    leaves: dict[str, Tensor] = {}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            for name, p in model.named_parameters():
                given: Any = p
                if p.requires_grad and not isinstance(given, DTensor):
                    leaves[name] = p
            module.reshard()
    return leaves


def kind_of(accelerator: Any) -> Kind:
    """The engine that the accelerator was launched with, without checking its configuration."""
    from accelerate.utils import DistributedType  # here, so that `import dpft` does without Accelerate

    if accelerator.distributed_type == DistributedType.FSDP:
        return "fsdp2"
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        kinds: dict[int, Kind] = {1: "zero1", 2: "zero2", 3: "zero3"}
        return kinds[int(accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage"])]
    return "ddp" if accelerator.num_processes > 1 else "single"


def launch(
    accelerator: Any,
    kind: Kind,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ranks: Ranks,
    max_batch_size: int,
    make: Callable[..., DPOptimizer],
    sequence: SequenceGroup | None = None,
) -> tuple[nn.Module, nn.Module, TrainingEngine, DPOptimizer, Any]:
    """Prepare model and optimiser under an engine of several processes, or of one with its sums in host memory.

    Args:
        accelerator: Accelerate's.
        kind: from :func:`kind_of`.
        model: wrapped.
        optimizer: the user's, on the model's parameters.
        ranks: the processes.
        max_batch_size: rows of the largest physical batch.
        make: ``make(cls, optimizer, sums)`` -> the private optimiser.
        sequence: the group among which the tokens of an example are split; None: one rank has them all.

    Returns:
        The prepared model, the bare one inside it, the engine, the private optimiser, and the object on which the loop
        calls ``step``.
    """
    if kind == "fsdp2":
        if sequence is not None:
            use_ulysses(accelerator, model)
        private = make(DPOptimizer, optimizer, None)
        prepared, stepped = accelerator.prepare(model, private)
        bare = accelerator.unwrap_model(prepared)
        sums: ClippedSums = ShardedSums(_trainable(bare), ranks)
        private.sums = sums
    elif kind == "single":
        prepared = accelerator.prepare_model(model)
        bare = accelerator.unwrap_model(prepared)
        trained = _trainable(bare)
        host_sums = HostSums(trained, ranks, Staging(next(iter(trained.values())).device))
        sums = host_sums
        private = make(HostOptimizer, optimizer, host_sums)
        stepped = accelerator.prepare_optimizer(private, device_placement=False)  # else its state went to the device
    elif kind == "ddp":
        # Without DistributedDataParallel: its buckets have the parameters' dtype, and would only take memory here.
        prepared = accelerator.prepare_model(model, evaluation_mode=True)
        bare = accelerator.unwrap_model(prepared)
        with torch.no_grad():
            for tensor in [*bare.parameters(), *bare.buffers()]:
                dist.broadcast(tensor, src=0)
        sums = ReplicatedSums(_trainable(bare), ranks)
        private = make(DPOptimizer, optimizer, sums)
        stepped = accelerator.prepare_optimizer(private)
    else:
        plugin = accelerator.state.deepspeed_plugin
        if plugin.is_auto("train_micro_batch_size_per_gpu"):
            plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = max_batch_size
        # No gradient ever fills DeepSpeed's buckets: they need no memory, and DeepSpeed must not expect them to exist.
        plugin.deepspeed_config["zero_optimization"]["contiguous_gradients"] = False
        plugin.deepspeed_config["zero_optimization"]["leaf_module"] = dict(NO_LEAF_MODULES)
        if kind != "zero3":
            plugin.deepspeed_config["zero_optimization"]["overlap_comm"] = False
        prepared, _ = accelerator.prepare(model, optimizer)
        _let_linear_be_seen()
        if kind != "zero3":
            zero_layout.skip_reduction(prepared)
        bare = accelerator.unwrap_model(prepared)
        zero: Any = prepared.optimizer
        parameters = _trainable(bare)
        layout = zero_layout.read_layout(zero, int(kind[-1]), parameters, ranks)
        zero_sums = ZeroSums(parameters, ranks, layout)
        sums = zero_sums
        private = stepped = make(ZeroOptimizer, zero_layout.innermost(zero), zero_sums)
    limit_waiting(getattr(accelerator.init_handler, "timeout", None))
    return prepared, bare, TrainingEngine(kind, bare, ranks, sums, max_batch_size, sequence), private, stepped


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _let_linear_be_seen() -> None:
    """ZeRO-3 replaces ``F.linear`` by a custom autograd function, which reports to no torch function.

    A rule that reads parameters as tracked tensors would refuse the model: these get torch's own.
    """
    replaced, native = F.linear, torch._C._nn.linear
    if replaced is native or getattr(replaced, "_dpft_reports", False):
        return

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        seen = has_torch_function((input, weight, bias))
        found: Tensor = native(input, weight, bias) if seen else replaced(input, weight, bias)
        return found

    setattr(linear, "_dpft_reports", True)  # noqa: B010  # a function has no such attribute to mypy
    setattr(F, "linear", linear)  # noqa: B010  # as DeepSpeed does
