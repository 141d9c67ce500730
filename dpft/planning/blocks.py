"""Steps of deep models from steps of shallow ones: one block is like the next.

A step of n equal blocks runs each operation ``a + b n`` times. Its memory is a sequence of phases: the forward of a
block, head and loss, the backward of a block, what follows. The peak of the first, or the last, of its kind is affine
in n, and between those two it is affine in the block's place. So simulated steps of 2 and 3 blocks give those of n.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dpft.planning.step_meter import Operation, StepMeter

SHALLOW = (2, 3)
# Fewer blocks are simulated as they are.
DEEP = 6


def repeated_blocks(model: nn.Module) -> nn.ModuleList | None:
    """The model's list of more than :data:`DEEP` equal blocks, if it has exactly one list of blocks."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    outer = [m for m in lists if not any(m in list(other.modules())[1:] for other in lists)]
    config: Any = getattr(model, "config", None)
    if len(outer) != 1 or len(outer[0]) <= DEEP or getattr(config, "num_hidden_layers", None) != len(outer[0]):
        return None
    kinds = getattr(config, "layer_types", None) or []
    same = len(set(kinds)) <= 1 and len({_likeness(block) for block in outer[0]}) == 1
    return outer[0] if same else None


def _likeness(block: nn.Module) -> tuple[Any, ...]:
    """What two equal blocks have in common: their modules' classes, parameters and plain settings."""
    plain = (int, float, bool, str, type(None))
    modules = []
    for path, module in block.named_modules():
        settings = {
            k: v for k, v in module.__dict__.items() if isinstance(v, plain) and k not in ("layer_idx", "_idx")
        }
        modules.append((path, type(module), tuple(sorted((k, repr(v)) for k, v in settings.items()))))
    shapes = [(n, p.shape, p.dtype, p.requires_grad) for n, p in block.named_parameters(remove_duplicate=False)]
    return (*modules, *shapes)


@contextlib.contextmanager
def shortened(model: nn.Module, blocks: nn.ModuleList, count: int) -> Iterator[None]:
    """A context in which the model has the first ``count`` of its blocks."""
    config: Any = model.config
    kept = dict(blocks._modules)
    blocks._modules = {name: kept[name] for name in list(kept)[:count]}
    config.num_hidden_layers = count
    try:
        yield
    finally:
        blocks._modules = kept
        config.num_hidden_layers = len(kept)


@contextlib.contextmanager
def phases(meter: StepMeter, blocks: nn.ModuleList) -> Iterator[None]:
    """A context in which the meter keeps the peak of each phase of its steps, by the phase's place from both ends."""
    last = len(blocks) - 1
    traversals = 0
    backward = False

    def place(i: int) -> str:
        return "first" if i == 0 else "last" if i == last else "between"

    def starts(name: str, i: int) -> Callable[[Tensor], None]:
        def hook(grad: Tensor) -> None:
            nonlocal traversals, backward
            backward = True
            traversals += name == "backward" and i == last
            meter.enter((name, traversals, place(i)))

        return hook

    def before(i: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal backward, traversals
            if torch._C._current_graph_task_id() != -1:
                return  # a checkpoint's recomputation
            if i == 0 and backward:
                backward, traversals = False, 0
            meter.enter(("forward", 0, place(i)))
            hidden = args[0] if args else kwargs.get("hidden_states")
            if i == 0 and isinstance(hidden, Tensor) and hidden.requires_grad:
                hidden.register_hook(starts("after", 0))

        return hook

    def after(i: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            if torch._C._current_graph_task_id() != -1:
                return
            meter.enter(("between", 0, place(i)))
            hidden = out[0] if isinstance(out, tuple) else out
            if isinstance(hidden, Tensor) and hidden.requires_grad:
                hidden.register_hook(starts("backward", i))

        return hook

    hooks: list[Any] = []
    for i, block in enumerate(blocks):
        hooks.append(block.register_forward_pre_hook(before(i), with_kwargs=True))
        hooks.append(block.register_forward_hook(after(i)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def deeper_peak(few: Mapping[Any, int], more: Mapping[Any, int], count: int) -> int | None:
    """The peak of ``count`` blocks from the peaks by phase of :data:`SHALLOW` ones; None if it is not that simple."""
    a, b = SHALLOW
    if few.keys() != {phase for phase in more if phase[2] != "between"}:
        return None
    peaks = {phase: few[phase] + (more[phase] - few[phase]) * (count - a) // (b - a) for phase in few}
    for phase, peak in more.items():
        ends = [more.get((*phase[:2], end), 0) for end in ("first", "last")]
        if phase[2] == "between" and peak > max(ends):
            return None
    return max(peaks.values())


def deeper_operations(few: Counter[Operation], more: Counter[Operation], count: int) -> Counter[Operation]:
    """The operations of ``count`` blocks.

    One that runs over the parameters of all blocks (foreach) is as often in both, with other bytes.
    """
    a, b = SHALLOW
    steps = (count - a) // (b - a)
    found = Counter({op: few[op] + (more[op] - few[op]) * steps for op in few.keys() & more.keys()})
    alone: list[list[Operation]] = [sorted(x.keys() - y.keys(), key=_order) for x, y in ((few, more), (more, few))]
    for op, longer in zip(*alone, strict=False):
        if _order(op)[:2] != _order(longer)[:2] or few[op] != more[longer]:
            continue
        moved = op.moved + (longer.moved - op.moved) * steps
        flops = op.flops + (longer.flops - op.flops) * steps
        found[replace(op, moved=moved, flops=flops)] += few[op]
    return +found


def _order(op: Operation) -> tuple[str, str, int, int]:
    return op.name, str(op.dtype), op.moved, op.flops
