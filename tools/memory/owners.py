"""Who holds tensors during a step: the model, the optimiser, the batch, and what dpft or Opacus keep beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

import dpft
from tools.memory.events import Owners, Role


def owners_of(
    model: nn.Module, optimizer: Callable[[], Any], batch: Callable[[], list[Tensor]], library: str
) -> Owners:
    """Who is asked for tensors."""
    parameters = list(model.parameters())
    modules = list(model.modules())

    def steady() -> Iterator[tuple[Role, Tensor]]:
        yield from ((Role.PARAMETER, p) for p in parameters)
        yield from ((Role.BUFFER, b) for b in model.buffers())
        yield from ((Role.INPUT, ids) for ids in batch())

    def changing() -> Iterator[tuple[Role, Tensor]]:
        yield from ((Role.GRADIENT, p.grad) for p in parameters if p.grad is not None)
        for state in getattr(optimizer(), "state", {}).values():
            yield from ((Role.OPTIMIZER, t) for t in state.values() if isinstance(t, Tensor))
        if library == "dpft":
            held = dpft.book_keeping(model)
            yield from ((Role.NORM, t) for t in held.norms)
            yield from ((Role.KEPT, t) for t in held.kept)
        elif library == "opacus":
            yield from _held_by_opacus(parameters, modules)

    return Owners(steady, changing)


def _held_by_opacus(parameters: list[nn.Parameter], modules: list[nn.Module]) -> Iterator[tuple[Role, Tensor]]:
    """Opacus keeps norms and per-example gradients as attributes of parameters, and layers' inputs of modules."""
    for p in parameters:
        held = p.__dict__
        yield from ((Role.NORM, t) for t in _flat(held.get("_norm_sample")))
        for name in ("grad_sample", "summed_grad"):
            yield from ((Role.KEPT, t) for t in _flat(held.get(name)))
    for module in modules:
        yield from ((Role.KEPT, t) for t in _flat(module.__dict__.get("activations")))


def _flat(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _flat(one)
