"""Memory of one rank between steps, and of gathered parameters during a step."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor, nn

from dpft.planning.simulate import Sharding

__all__ = ["OPTIMIZERS", "OptimizerName", "host_bytes", "resting_bytes"]

# Page-locked buffers between device and sums (dpft.engines.host): bytes of one, and how many.
PIECE, BUFFERS = 1 << 26, 2

OptimizerName = Literal["adamw", "sgd"]
OPTIMIZERS: tuple[OptimizerName, ...] = get_args(OptimizerName)


def resting_bytes(model: nn.Module, sharding: Sharding, optimizer: OptimizerName | None) -> dict[str, int]:
    """Bytes that a rank holds besides those that the simulated step allocates, by kind.

    ``docs/engines.md`` has the layouts. Gradients and clipped sums are not included, since the simulated step
    allocates them, except for the gradients that ZeRO-3 keeps.

    Args:
        model: with unsharded parameters, on any device.
        sharding: the engine.
        optimizer: whose states are counted; None: none.
    """
    parameters = list(model.parameters())
    trainable = [p for p in parameters if p.requires_grad]
    held = sum(sharding.part(p.numel(), sharding.parameters) * p.element_size() for p in parameters)
    found = {"parameters and buffers": held + sum(_bytes(b) for b in model.buffers())}
    deepspeed = sharding.engine.startswith("zero")
    if optimizer is not None and not sharding.sums_on_host:
        # DeepSpeed updates a float32 copy of its shard; the others the parameters, with states in their dtype.
        states = 2 if optimizer == "adamw" else 0
        found["optimiser states"] = sum(
            sharding.part(p.numel(), sharding.states) * (4 * (states + 1) if deepspeed else states * p.element_size())
            for p in trainable
        )
    if sharding.engine == "zero3":  # kept between steps; the other stages free theirs
        found["DeepSpeed's gradients"] = sum(sharding.part(p.numel(), True) * p.element_size() for p in trainable)
    if sharding.parameters:
        blocks = _repeated(model)
        inside = {id(p) for block in blocks for p in block.parameters()}
        outside = sum(_bytes(p) for p in parameters if id(p) not in inside)
        largest = max((sum(_bytes(p) for p in block.parameters()) for block in blocks), default=0)
        # One block is in use while the next one is gathered.
        found["gathered parameters"] = min(outside + 2 * largest, sum(map(_bytes, parameters)))
    return {name: size for name, size in found.items() if size}


def host_bytes(model: nn.Module, sharding: Sharding, optimizer: OptimizerName | None, gpu: bool) -> dict[str, int]:
    """Bytes that a rank has in host memory besides offloaded checkpoints, by kind: those of ``sums_device="cpu"``."""
    if not sharding.sums_on_host:
        return {}
    # float32, or float64 for float64 parameters
    each = sum(p.numel() * max(4, p.element_size()) for p in model.parameters() if p.requires_grad)
    found = {"clipped sums": each, "page-locked buffers": BUFFERS * PIECE if gpu else 0}
    if optimizer is not None:
        found["float32 masters"] = each
        found["optimiser states"] = 2 * each if optimizer == "adamw" else 0
    return {name: size for name, size in found.items() if size}


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


def _repeated(model: nn.Module) -> list[nn.Module]:
    """The decoder's blocks: the longest list of modules of one class."""
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList)]
    return max((found for found in lists if len({type(m) for m in found}) == 1), key=len, default=[])
