"""Steps of deep models from steps of shallow ones: one block is like the next.

A step of n equal blocks runs each operation ``a + b n`` times. Its memory is a sequence of phases: the forward of a
block, head and loss, the backward of a block, what follows. The peak of the first, or the last, of its kind is affine
in n, and between those two it is affine in the block's place: each block before it adds what a forward keeps, as one
more does to the last, and each behind it what a backward keeps, as one more does to the first. So simulated steps of 2
and 3 blocks give those of n.
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
# The device still holds the inputs of two blocks while they are copied to the host.
OFFLOADED = (3, 4)
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


def deeper_peaks(
    few: Mapping[Any, int], more: Mapping[Any, int], count: int, shallow: tuple[int, int] = SHALLOW
) -> dict[Any, int] | None:
    """The peaks by phase of ``count`` blocks from those of ``shallow`` ones; None if it is not that simple."""
    a, b = shallow
    ends = {phase for phase in few if phase[2] != "between"}
    if ends != {phase for phase in more if phase[2] != "between"}:
        return None
    grown = {phase: (more[phase] - few[phase]) // (b - a) for phase in ends}
    peaks = {phase: few[phase] + grown[phase] * (count - a) for phase in ends}
    for phase in more.keys() - ends:
        # the block nearest to one of the ends
        steepest = max(grown.get((*phase[:2], end), 0) for end in ("first", "last"))
        peaks[phase] = more[phase] + steepest * (count - b)
    return peaks


def deeper_parts(
    few: Mapping[Any, Counter[str]],
    more: Mapping[Any, Counter[str]],
    few_peaks: Mapping[Any, int],
    more_peaks: Mapping[Any, int],
    count: int,
    shallow: tuple[int, int] = SHALLOW,
) -> dict[Any, Counter[str]]:
    """Bytes by name of the peaks that :func:`deeper_peaks` finds."""
    a, b = shallow
    found: dict[Any, Counter[str]] = {}
    for phase, parts in more.items():
        like, steps = phase, (count - a) // (b - a)
        start = few.get(phase)
        if start is None or phase[2] == "between":
            ends = [(*phase[:2], end) for end in ("first", "last") if (*phase[:2], end) in few]
            if not ends:
                continue
            like = max(ends, key=lambda end: more_peaks[end] - few_peaks[end])
            start, steps = parts, (count - b) // (b - a)
        names = start.keys() | more[like].keys()
        found[phase] = Counter({n: start[n] + (more[like][n] - few[like][n]) * steps for n in names})
    return found


def deeper_counts(
    few: Counter[int], more: Counter[int], count: int, shallow: tuple[int, int] = SHALLOW
) -> Counter[int]:
    """How many tensors of each size are offloaded by ``count`` blocks."""
    a, b = shallow
    return Counter({size: few[size] + (more[size] - few[size]) * (count - a) // (b - a) for size in more})


def deeper_operations(
    few: Counter[Operation], more: Counter[Operation], count: int, shallow: tuple[int, int] = SHALLOW
) -> Counter[Operation]:
    """The operations of ``count`` blocks.

    One that runs over the parameters of all blocks (foreach) is as often in both, with other bytes.
    """
    a, b = shallow
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
