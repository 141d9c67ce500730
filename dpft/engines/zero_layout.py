"""How DeepSpeed's ZeRO shards the parameters: the only module that reads what DeepSpeed does not document.

ZeRO steps on flat float32 partitions. DeepSpeed documents no way to find which elements of which parameter lie where
in one, nor to set gradients exactly (``safe_set_full_grad`` rounds to bf16 under ZeRO-1 and 2, and fails under ZeRO-3
where a size is not a multiple of the ranks). So this module reads, of deepspeed 0.19:

- ZeRO-1, 2: ``parameter._hp_mapping``, ``optimizer.bit16_groups`` and ``optimizer.single_partition_of_fp32_groups``;
- ZeRO-2 with its optimiser on the CPU: ``engine.enable_backward_allreduce`` and ``optimizer.cpu_offload``;
- ZeRO-3: ``optimizer.grad_position``, ``optimizer.fp16_groups``, ``optimizer.fp32_partitioned_groups_flat``,
  ``parameter.ds_*``, ``parameter.all_gather`` and ``parameter.partition``; the modules' counters
  in :data:`_COUNTERS`.

Everything is verified: :func:`read_layout` compares the values of every part with the parameter's own, and checks that
the ranks' parts cover every element exactly once. A DeepSpeed that shards differently is refused before training.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dpft.engines.ranks import Ranks
from dpft.errors import EngineError

# The model's parameters as ZeRO groups them.
_GROUPS = {1: "bit16_groups", 2: "bit16_groups", 3: "fp16_groups"}


@dataclass(frozen=True)
class Fragment:
    """Elements of one parameter that one rank updates.

    Attributes:
        rank: of the owner.
        start: first element, in the parameter flattened.
        numel: number of elements.
        flat: number of the owner's flat partition, in the order of :attr:`Layout.flats`.
        offset: of the first element in that partition.
    """

    rank: int
    start: int
    numel: int
    flat: int
    offset: int


@dataclass(frozen=True)
class Layout:
    """ZeRO's sharding.

    Attributes:
        stage: 1, 2 or 3.
        flats: this rank's flat float32 partitions, which the innermost optimiser updates.
        fragments: of all ranks, by parameter name, in the order of their start.
    """

    stage: int
    flats: list[Tensor]
    fragments: dict[str, list[Fragment]]


def innermost(zero: Any) -> torch.optim.Optimizer:
    """The torch optimiser that ZeRO's own ``step`` calls.

    Raises:
        EngineError: there is none, or there are two.
    """
    inner = getattr(zero, "optimizer", None)
    if not isinstance(inner, torch.optim.Optimizer) or getattr(zero, "backup_optimizer", None) is not None:
        raise EngineError(
            f"DeepSpeed's {type(zero).__name__} steps {type(inner).__name__}"
            + (" and a backup_optimizer" if getattr(zero, "backup_optimizer", None) is not None else "")
            + "; expected one torch.optim.Optimizer under ZeRO-1, 2 or 3. Set zero_optimization.stage, and "
            "offload_optimizer.ratio to 1.0."
        )
    return inner


def skip_reduction(engine: Any) -> None:
    """ZeRO-1, 2 with the optimiser on the CPU: no reduction after backward, because it expects a filled bucket.

    Without offloading it must run: the reduction of no gradient gives ZeRO the zeros that it steps with.
    """
    if getattr(engine.optimizer, "cpu_offload", False):
        if not hasattr(engine, "enable_backward_allreduce"):
            raise EngineError("this DeepSpeed has no enable_backward_allreduce; dpft knows deepspeed 0.19.")
        engine.enable_backward_allreduce = False


def read_layout(zero: Any, stage: int, parameters: dict[str, nn.Parameter], ranks: Ranks) -> Layout:
    """The layout, verified; a collective.

    Args:
        zero: ``engine.optimizer``.
        stage: of ZeRO.
        parameters: the trainable ones, by name.
        ranks: the processes.

    Raises:
        EngineError: on all ranks; the layout is not what this module knows.
    """

    def mine() -> tuple[list[Tensor], dict[str, Fragment]]:
        stepped = {id(p) for group in getattr(zero, _GROUPS[stage], []) for p in group}
        unknown = sorted(name for name, p in parameters.items() if id(p) not in stepped)
        if unknown:
            raise EngineError(
                f"{unknown[:3]} of {len(unknown)} trainable parameters are not in DeepSpeed's groups: the optimiser "
                "was not given them, or this DeepSpeed groups differently. Make the optimiser with all parameters "
                "that require gradients, freeze the others, and use deepspeed 0.19."
            )
        try:
            flats = list(zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups)
            found = {
                name: fragment
                for name, p in parameters.items()
                if (fragment := _partitioned(zero, p, ranks) if stage == 3 else _mapped(p, ranks)) is not None
            }
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise EngineError(
                f"cannot read how this DeepSpeed shards ({type(error).__name__}: {error}); dpft knows deepspeed 0.19. "
                "Install that version, or use FSDP2."
            ) from error
        for name, fragment in found.items():
            _verify(name, parameters[name], fragment, flats)
        return flats, found

    flats, found = ranks.together(mine)
    everyone = ranks.gather(found)
    fragments: dict[str, list[Fragment]] = {}
    for name, p in parameters.items():
        parts = sorted((each[name] for each in everyone if name in each), key=lambda f: f.start)
        numel = getattr(p, "ds_numel", None) or p.numel()
        ends = [0]
        for part in parts:
            ends.append(part.start + part.numel)
        if ends[:-1] != [part.start for part in parts] or ends[-1] != numel:
            raise EngineError(
                f"the ranks' parts of {name!r} ({[(f.rank, f.start, f.numel) for f in parts]}) are not its {numel} "
                "elements, each once; this DeepSpeed shards in a way that dpft does not know."
            )
        fragments[name] = parts
    return Layout(stage, flats, fragments)


def _mapped(parameter: Any, ranks: Ranks) -> Fragment | None:
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Fragment(ranks.rank, int(low.start), int(low.numel), int(mapping.param_group_index), int(high.start))


def _partitioned(zero: Any, parameter: Any, ranks: Ranks) -> Fragment | None:
    group, offset, part = zero.grad_position[zero.get_param_id(parameter)]
    if dist.get_world_size(parameter.ds_process_group) != ranks.world:
        raise EngineError("parameters are sharded over a part of the ranks (hpZ, MiCS); expected all. Turn it off.")
    start = dist.get_rank(parameter.ds_process_group) * part
    numel = max(0, min(part, parameter.ds_numel - start))
    return Fragment(ranks.rank, start, numel, int(group), int(offset)) if numel else None


def _verify(name: str, parameter: Any, fragment: Fragment, flats: list[Tensor]) -> None:
    """Check that the flat partition has, at that place and in float32, the parameter's values."""
    flat = flats[fragment.flat]
    if flat.dtype != torch.float32 or flat.dim() != 1:
        raise EngineError(
            f"DeepSpeed steps on master weights of {flat.dtype} {list(flat.shape)}; expected flat float32. Remove "
            "bf16_master_weights_and_grads and bf16_optimizer_states from the DeepSpeed configuration."
        )
    if hasattr(parameter, "ds_tensor"):
        here = parameter.ds_tensor.detach().view(-1)[: fragment.numel]
    else:
        here = parameter.detach().view(-1)[fragment.start : fragment.start + fragment.numel]
    there = flat.detach()[fragment.offset : fragment.offset + fragment.numel]
    if here.shape != there.shape or not torch.equal(here.cpu(), there.to(here.dtype).cpu()):
        raise EngineError(
            f"DeepSpeed's master copy of {name!r} is not where dpft looks for it: gradients would go to other "
            "parameters. This version of DeepSpeed is not supported; dpft knows deepspeed 0.19."
        )


# For how many more backwards a module's weights have to be gathered, and how many gradients of its inputs are pending
# before they are partitioned again. ZeRO-3 counts them up in the forward, for one backward.
_COUNTERS = ("applied_pre_backward_ref_cnt", "ds_grads_remaining")


class Rewind:
    """ZeRO-3: lets one graph be traversed more than once, each time gathering the weights that the modules need.

    Args:
        model: the bare model, after a forward and before a traversal of its graph.
    """

    def __init__(self, model: nn.Module) -> None:
        self._counters = [
            (module, name, module.__dict__[name])
            for module in model.modules()
            for name in _COUNTERS
            if name in module.__dict__
        ]

    def __call__(self) -> None:
        """Before another traversal: reset the counters to what they were before the first."""
        for module, name, value in self._counters:
            module.__dict__[name] = value


@contextmanager
def held(weight: Any) -> Iterator[None]:
    """ZeRO-3: the whole weight within the context, also if the engine has partitioned it already."""
    status = getattr(weight, "ds_status", None)
    if status is None or status.name == "AVAILABLE":
        yield
        return
    if status.name == "INFLIGHT":
        raise EngineError(
            "ZeRO-3 is still prefetching a weight that a backward needs now. Set stage3_prefetch_bucket_size to "
            "0 in zero_optimization, or use strategy='one_pass'."
        )
    weight.all_gather()
    try:
        yield
    finally:
        weight.partition()
