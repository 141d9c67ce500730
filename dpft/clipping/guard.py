"""The last line of defence: hooks on the parameters that refuse a gradient which is no clipped sum."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dpft.clipping.state import ClipState
from dpft.errors import ClippingError
from dpft.rules.base import running_pass


def guard_parameters(state: ClipState) -> None:
    """Register hooks that raise for a gradient that reaches a parameter in any other way than a clipped sum.

    It also sees what a reentrant checkpoint hides from the walk of the graph. Called before every forward, since a
    deep copy of a model has parameters without hooks. fp16 parameters get float32 gradients: rounded to fp16, small
    entries grow, and the clipped sum with them.
    """
    ids = {name: id(p) for name, p in state.parameters.items()}
    if state.guarded == ids:
        return

    def guard(name: str) -> Callable[[Tensor | None], None]:
        def hook(grad: Tensor | None) -> None:
            if grad is None:  # autograd calls the hooks of parameters without a gradient too
                return
            if state.active is None and name not in state.delivering:
                running_pass(state, name)  # raises
            if len(state.parameters[name]._backward_hooks or ()) > 1:
                raise ClippingError(f"{name!r} has a gradient hook besides dpft's, which may change it. Remove it.")
            if state.active is None:
                given = state.delivering.pop(name)
                if len(given) == 1 and given[0] != (grad.data_ptr(), grad._version):
                    state.broken = state.unfinished = True
                    raise ClippingError(
                        f"something was added to the clipped gradient of {name!r}: the loss has a term besides the "
                        "clipped losses, which reaches the parameter unclipped. Add it to each example's loss before "
                        "it is clipped, or give weight decay to the optimiser."
                    )
            elif not state.active.weighted:
                raise ClippingError(
                    f"a gradient that no rule has seen reached {name!r} in a norm pass: the parameter is used "
                    "by an operation other than its module's forward. Wrap with strategy='per_example', or freeze it."
                )

        return hook

    for handle in state.hooks:
        handle.remove()
    state.hooks = [p.register_hook(guard(name)) for name, p in state.parameters.items()]
    for p in state.parameters.values():
        if p.dtype == torch.float16:
            p.grad_dtype = torch.float32
    state.guarded = ids
