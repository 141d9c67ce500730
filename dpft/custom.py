"""Rules of one's own: ``register_rule`` and ``check_rule``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dpft.errors import ClippingError
from dpft.rules import registry
from dpft.rules.row_by_row import ROWS, GradSample, GradSampleRule
from dpft.rules.tracked import leaves_of, replaced
from dpft.wrap import clipped_loss, stats, wrap

__all__ = ["check_rule", "register_rule"]


def register_rule(
    cls: type[nn.Module], rule: GradSample | Literal["rows"] | None = None
) -> Callable[[GradSample], GradSample] | None:
    """Say how the per-example gradients of a kind of module are computed, where dpft refuses it or is slow.

    As Opacus's ``register_grad_sampler``, and used as a decorator like it::

        @dpft.register_rule(MyLayer)
        def my_layer(layer, activations, backprops):
            return {layer.weight: torch.einsum("btd,btp->bdp", backprops, activations[0])}

        dpft.check_rule(MyLayer(8, 8), torch.randn(3, 5, 8))

    Args:
        cls: the class; its subclasses too, unless they have a forward of their own.
        rule: a function ``(layer, activations, backprops)``: the layer, its tensor inputs and the gradient of its one
            output tensor, all with the batch as dimension 0; returns, by parameter or by its name,
            ``[B, *parameter.shape]`` for each trainable parameter of the layer itself. Or ``"rows"``: run the module,
            and what is in it, once for each row: exact for every module whose rows do not act on each other. None: use
            as a decorator.

    Raises:
        TypeError: ``cls`` is not a class of modules, or ``rule`` something else.
    """
    given: Any = cls
    if not (isinstance(given, type) and issubclass(given, nn.Module)):
        raise TypeError(f"cls is {cls!r}; expected a class of torch.nn.Module")
    if rule is None:

        def decorate(function: GradSample) -> GradSample:
            register_rule(cls, function)
            return function

        return decorate
    if rule == "rows":
        registry.register_rule(cls, ROWS)
    elif callable(rule):
        registry.register_rule(cls, GradSampleRule(rule))
    else:
        raise TypeError(f"rule is {rule!r}; expected a function or 'rows'")
    return None


class _Held(nn.Module):
    """A module behind an input that depends on a parameter, so that the gradient of the input counts too."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.shift = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, *inputs: Any) -> Tensor:
        moved = replaced(inputs, lambda t: t + self.shift if t.is_floating_point() and t.requires_grad else t)
        found = next(t for t in leaves_of(self.module(*moved)) if t.is_floating_point())
        return found.flatten(1)


def check_rule(module: nn.Module, *inputs: Any, tolerance: float = 1e-6) -> float:
    """Hold the rules of ``module`` against the gradients of one example at a time, in float64.

    Args:
        module: with trainable parameters; a copy is used. Without dropout.
        *inputs: of its forward; tensors have the batch, of two rows or more, as dimension 0.
        tolerance: of the relative difference.

    Returns:
        The largest relative difference of a norm or of a clipped sum, under one-pass and two-pass.

    Raises:
        UnsupportedModuleError: a parameter without a rule.
        ClippingError: a difference above the tolerance; says where.
    """
    given = replaced(inputs, lambda t: t.detach().double() if t.is_floating_point() else t)
    rows = next(leaves_of(given)).shape[0]
    held = _Held(copy.deepcopy(module).double())

    def losses(model: nn.Module, inputs: Any) -> Tensor:
        moving = replaced(inputs, lambda t: t.detach().requires_grad_() if t.is_floating_point() else t)
        out: Tensor = model(*moving)
        weights = torch.linspace(0.5, 1.5, out.shape[1], dtype=out.dtype, device=out.device)
        return (torch.sin(out) * weights).sum(1)

    named = {name: p for name, p in held.named_parameters() if p.requires_grad}
    each = []
    for i in range(rows):
        row = replaced(given, lambda t, i=i: t[i : i + 1] if t.dim() and t.shape[0] == rows else t)  # type: ignore[misc]  # i is bound at once
        grads: Sequence[Tensor | None] = torch.autograd.grad(
            losses(held, row).sum(), list(named.values()), allow_unused=True
        )
        each.append([torch.zeros_like(p) if g is None else g for p, g in zip(named.values(), grads, strict=True)])
    norms = torch.stack([torch.stack([g.square().sum() for g in grads]).sum().sqrt() for grads in each])
    bound = float(norms.median())
    factors = (bound / norms).clamp(max=1.0)
    sums = [
        torch.stack([f * grads[k] for f, grads in zip(factors, each, strict=True)]).sum(0) for k in range(len(named))
    ]
    worst = 0.0
    for strategy in _STRATEGIES:
        model = wrap(copy.deepcopy(held), max_grad_norm=bound, strategy=strategy)
        clipped_loss(model, losses(model, given)).backward()
        found = dict(model.named_parameters())
        differences = {"the norms": _apart(stats(model).norms.double(), norms, floor=2.0**-23)}
        size = 1e-6 * max(float(total.abs().max()) for total in sums)  # a gradient that is zero has only rounding
        for name, expected in zip(named, sums, strict=True):
            grad = found[name].grad
            differences[name] = _apart(torch.zeros_like(expected) if grad is None else grad, expected, size)
        for name, by in differences.items():
            if not by <= tolerance:
                raise ClippingError(
                    f"{strategy}: {name} differ by {by:.2g} (relative) from the gradients of one example at a time; "
                    f"at most {tolerance:g} is allowed. The rule of {type(module).__name__}, or of a layer in it, is "
                    "wrong, or the module mixes its rows or draws random numbers."
                )
            worst = max(worst, by)
    return worst


_STRATEGIES: Sequence[Literal["one_pass", "two_pass"]] = ("one_pass", "two_pass")


def _apart(found: Tensor, expected: Tensor, size: float = 0.0, floor: float = 0.0) -> float:
    """Difference relative to ``expected``, or to ``size``; 0 below ``floor``, the precision ``found`` is kept in."""
    by = float((found - expected).abs().max()) / max(float(expected.abs().max()), size, 1e-300)
    return by if by > floor else 0.0
