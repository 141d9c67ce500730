"""The site of a parameter that is used as a plain tensor: a view of its value for each row, whose gradient is per row.

The rules of modules without a rule of their own stand on it: see :mod:`dpft.rules.tracked` and
:mod:`dpft.rules.row_by_row`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dpft.rules.base import Host, SiteFunction, per_example, running_pass


class Derived:
    """A value computed of parameters alone, with the graph that leads to it.

    Attributes:
        value: with a graph that ends in ``leaves``; a leaf itself where it is a parameter unchanged.
        leaves: what stands for the parameters in that graph: tensors that share their memory, outside of theirs.
        names: full canonical name of each.
        parameters: themselves.
    """

    __slots__ = ("leaves", "names", "parameters", "value")

    def __init__(
        self, value: Tensor, leaves: Sequence[Tensor], names: Sequence[str], parameters: Sequence[Tensor]
    ) -> None:
        self.value, self.leaves, self.names, self.parameters = value, list(leaves), list(names), list(parameters)

    def pull(self, grad: Tensor) -> list[Tensor]:
        """Each example's gradient of the value, ``[B, *value.shape]`` -> those of the parameters, ``[B, *shape]``."""
        if len(self.leaves) == 1 and self.leaves[0] is self.value:
            return [grad]
        found: Sequence[Tensor | None] = torch.autograd.grad(
            self.value, self.leaves, grad, retain_graph=True, is_grads_batched=True, allow_unused=True
        )
        rows = len(grad)
        return [
            leaf.new_zeros(rows, *leaf.shape) if each is None else each
            for each, leaf in zip(found, self.leaves, strict=True)
        ]


class ParameterSite(SiteFunction):
    """Expands a :class:`Derived` value ``[*shape]`` to ``[R, *shape]``, one for each row; the gradient is per row."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, tap: Tensor, host: Host, made: Derived, rows: int, *parameters: Tensor
    ) -> Any:
        ctx.save_for_backward(*parameters)
        ctx.host, ctx.made = host, made
        return value.expand(rows, *value.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        made: Derived = ctx.made
        running = running_pass(ctx.host, made.names[0])
        grad = per_example(g, ctx.host, made.names[0], made.value.dim())
        grad = grad.squeeze(1) if grad.shape[1] == 1 else grad.sum(1)  # several rows of an example
        pulled = made.pull(grad)
        given = [
            running.vector(name, each, p) for name, each, p in zip(made.names, pulled, ctx.saved_tensors, strict=True)
        ]
        return None, None, None, None, None, *given


def parameter_rows(host: Host, made: Derived, rows: int) -> Tensor:
    """``[R, *shape]``, a view of the value for each row, through a site node."""
    out: Tensor = ParameterSite.apply(made.value.detach(), host.tap, host, made, rows, *made.parameters)
    return out


def unchanged(parameter: Tensor, name: str) -> Derived:
    """A parameter's own value."""
    leaf = parameter.detach().requires_grad_()
    return Derived(leaf, [leaf], [name], [parameter])


class shadowed:  # used as a function
    """A context in which a module's parameters are read as other tensors; they stay registered for the engine.

    Args:
        module: of the parameters.
        keys: dotted name within the module -> full canonical name, of the parameters to replace.
        make: of a parameter and its full name, what is read instead.
    """

    def __init__(self, module: nn.Module, keys: dict[str, str], make: Callable[[Tensor, str], Tensor]) -> None:
        self._module, self._keys, self._make = module, keys, make
        self._before: list[tuple[dict[str, Any], str, Any]] = []

    def __enter__(self) -> None:
        for name, key in self._keys.items():
            path, _, last = name.rpartition(".")
            owner = self._module.get_submodule(path)
            # In the instance's __dict__ it comes before the registered parameter.
            self._before.append((owner.__dict__, last, owner.__dict__.get(last)))
            owner.__dict__[last] = self._make(owner._parameters[last], key)  # type: ignore[arg-type]  # registered, so not None

    def __exit__(self, *_: object) -> None:
        for attributes, name, before in reversed(self._before):
            if before is None:
                attributes.pop(name, None)
            else:
                attributes[name] = before
