"""The generic rule: a module that uses its own parameters as plain tensors, in whatever way.

State-space layers (``A_log``, ``dt_bias``, ``D``), attention sinks, lambdas and scales, class tokens, position tables,
convolutions, norms of many kinds, a router's matrix. The module's own forward runs, and finds in the place of each
parameter a :class:`Tracked` tensor, which sees every torch function that it is given to:

- What is computed of parameters alone, ``-exp(A_log.float())``, is the same for all examples: it is tracked in turn.
- A function that also takes an activation is where the examples come in: :mod:`dpft.rules.tracked_functions` lets it
  compute the same values through a site, whose gradient is per example. A function that is not known there is refused.

It proves itself. A site gives each row of the batch a view of the same value, so that the forward's values do not
change, and the rows' gradients add up to the parameter's. What is left to show is that a row's view acts on the loss
of its own example only: that the isolation check by gradients (:mod:`dpft.clipping.probe`) compares in the first
backward, site by site. A tracked tensor that reaches an operation which torch does not report (a custom autograd
function) is found by the walk of the graph: it hangs on a node that no backward may reach.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpft.errors import UnsupportedModuleError
from dpft.rules.base import Host, SiteFunction, forward_batch_size
from dpft.rules.parameter import Derived, parameter_rows


class UnseenUse(SiteFunction):
    """The node behind a tracked tensor: only what torch reports to nobody uses its gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, tap: Tensor, names: list[str]) -> Tensor:
        ctx.names = names
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        raise unseen_use(ctx.names)


def unseen_use(names: list[str]) -> UnsupportedModuleError:
    """The error for a use of parameters that no torch function reports."""
    return UnsupportedModuleError(
        f"{names} is used by an operation that does not report to torch functions (a custom autograd function, or a "
        "kernel of another package), so its gradient is not seen per example. Wrap with strategy='per_example', write "
        "a rule (dpft.register_rule), or freeze it."
    )


class Tracked(Tensor):
    """A value computed of parameters alone; see the module docstring.

    Attributes:
        made: the value, and how it came from the parameters.
        host: the wrapped model's state.
        rows: R of the batch.
        transposed: whether this is the transpose of a parameter, and not another function of it.
        direct: whether this is a parameter, or its transpose, up to dtype.
        shared: whether something else may refer to the value: a view of it, or a site. Then it may not be changed.
    """

    made: Derived
    host: Host
    rows: int
    transposed: bool
    direct: bool
    shared: bool

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return _call(func, tuple(args), dict(kwargs or {}))


def track(host: Host, made: Derived, rows: int, direct: bool = False, transposed: bool = False) -> Tracked:
    """A tracked tensor of this value."""
    found: Tracked = UnseenUse.apply(made.value.detach(), host.tap, made.names).as_subclass(Tracked)
    found.made, found.host, found.rows, found.direct, found.transposed = made, host, rows, direct, transposed
    found.shared = made.value._is_view()
    return found


def computed(host: Host, names: list[str], parameters: list[Tensor], function: Callable[..., Tensor]) -> Tracked:
    """A tracked tensor of what ``function`` makes of parameters."""
    leaves = [p.detach().requires_grad_() for p in parameters]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        value = function(*leaves)
    return track(host, Derived(value, leaves, names, parameters), forward_batch_size(host, 1))


def derived(t: Tracked, value: Tensor) -> Tracked:
    """A tracked tensor of a value that was computed of that of ``t``."""
    return track(t.host, Derived(value, t.made.leaves, t.made.names, t.made.parameters), t.rows)


def rows_of(t: Tracked) -> Tensor:
    """``[R, *shape]``: the value for each row of the batch, through a site."""
    t.shared = True
    return parameter_rows(t.host, t.made, t.rows)


KNOWN: dict[str, Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]] = {}
"""By name, the functions of activations and tracked tensors: filled by :mod:`dpft.rules.tracked_functions`."""


def leaves_of(tree: Any) -> Iterator[Tensor]:
    """The tensors in the arguments of a call."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, list | tuple):
        for part in tree:
            yield from leaves_of(part)
    elif isinstance(tree, dict):
        for part in tree.values():
            yield from leaves_of(part)


def replaced(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The arguments of a call with ``change`` of every tensor."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, list | tuple):
        parts = [replaced(part, change) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    if isinstance(tree, dict):
        return {name: replaced(part, change) for name, part in tree.items()}
    return tree


# dtype and layout alone: what comes out is still the parameter, for a rule that casts it itself
_CASTS = frozenset({"to", "float", "half", "bfloat16", "double", "type", "type_as", "contiguous"})
_TRANSPOSES = frozenset({"t", "T", "mT", "transpose", "swapaxes", "swapdims", "permute"})
_WRITES = frozenset(
    {"__set__", "__setitem__", "__iadd__", "__isub__", "__imul__", "__imatmul__", "__itruediv__", "__ifloordiv__"}
    | {"__imod__", "__ipow__"}
)
# of their second tensor only shape, dtype or device counts
_OF_KIND = frozenset({"to", "type_as", "view_as", "reshape_as"})


def _call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Any call that a tracked tensor takes part in."""
    name = getattr(func, "__name__", "")
    given = list(leaves_of((args, kwargs)))
    tracked = [t for t in given if isinstance(t, Tracked)]
    others = [t for t in given if not isinstance(t, Tracked)]
    if name == "__get__":
        name = func.__self__.__name__  # a property
    first = args[0] if args else None
    if name in _OF_KIND:
        if not isinstance(first, Tracked):
            return func(*replaced(args, _detached), **replaced(kwargs, _detached))
        others = []
    writes = name in _WRITES or (name.endswith("_") and not name.endswith("__"))
    if isinstance(first, Tracked) and writes:
        if first.direct or first.shared or name == "__set__" or any(t.requires_grad for t in others):
            raise refusal(tracked, func, "which changes it in place")
        return _changed(func, first, args, kwargs, tracked)
    known = KNOWN.get(name.strip("_"))
    if known is not None:
        out = known(func, args, kwargs)
        if out is not NotImplemented:
            return out
    if any(t.requires_grad for t in others) or name == "__set__":
        if tracked[0].rows != 1:
            raise refusal(tracked, func, "together with activations")
        # the batch is one example, whose gradient is the parameter's
        return func(*replaced(args, _alone), **replaced(kwargs, _alone))
    if isinstance(first, Tensor) and writes:
        return _written(func, first, args, kwargs, tracked)
    return _of_parameters_alone(func, name, args, kwargs, tracked)


def _written(func: Any, into: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], tracked: list[Tracked]) -> Any:
    """A call that writes values of parameters into a tensor of none, ``dense[places] = w``, which is tracked then.

    Views of its memory are not tracked: they hang on the node that no backward may reach.
    """
    if type(into) is not Tensor or into._is_view():
        raise refusal(tracked, func, "which writes it into a view, or into a parameter")
    value = into.clone()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        out = func(value, *replaced(args[1:], _value), **replaced(kwargs, _value))
    if value.requires_grad:
        found = track(tracked[0].host, Derived(value, *_roots_of(tracked)), tracked[0].rows)
        into.copy_(found.as_subclass(Tensor))
        into.__class__ = Tracked
        vars(into).update(vars(found))
    else:
        into.copy_(value)
    return into if isinstance(out, Tensor) else out


def _changed(func: Any, into: Tracked, args: tuple[Any, ...], kwargs: dict[str, Any], tracked: list[Tracked]) -> Any:
    """A call that changes a value of parameters in place, by others or by constants."""
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        out = func(into.made.value, *replaced(args[1:], _value), **replaced(kwargs, _value))
    into.made = Derived(into.made.value, *_roots_of(tracked))
    return into if isinstance(out, Tensor) else out


def _value(t: Tensor) -> Tensor:
    return t.made.value if isinstance(t, Tracked) else t


def _alone(t: Tensor) -> Tensor:
    return rows_of(t)[0] if isinstance(t, Tracked) else t


def _detached(t: Tensor) -> Tensor:
    return t.made.value.detach() if isinstance(t, Tracked) else t


def _of_parameters_alone(
    func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], tracked: list[Tracked]
) -> Any:
    """The result of a call without activations, tracked where a gradient leads through it."""
    # A checkpoint's hooks would recompute the whole block for the small graph behind a site.
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        out = func(*replaced(args, _value), **replaced(kwargs, _value))
    first = tracked[0]
    roots = _roots_of(tracked)
    same = first.direct and len(tracked) == 1 and isinstance(out, Tensor) and out.dim() == 2
    before = first.made.value
    turned = same and name in _TRANSPOSES
    turned = turned and out.shape == before.shape[::-1] and out.stride() == before.stride()[::-1]
    kept = first.direct and len(tracked) == 1 and name in _CASTS

    def wrapped(t: Tensor) -> Tensor:
        for operand in tracked:
            operand.shared = (
                operand.shared or t.untyped_storage()._cdata == operand.made.value.untyped_storage()._cdata
            )
        if not t.requires_grad:
            return t
        return track(first.host, Derived(t, *roots), first.rows, turned or kept, first.transposed != turned)

    return replaced(out, wrapped)


def _roots_of(tracked: list[Tracked]) -> tuple[list[Tensor], list[str], list[Tensor]]:
    """The leaves of all of these values, their names, and the parameters that they stand for; each once."""
    found = {
        id(leaf): (leaf, name, p)
        for t in tracked
        for leaf, name, p in zip(t.made.leaves, t.made.names, t.made.parameters, strict=True)
    }
    leaves, names, parameters = zip(*found.values(), strict=True)
    return list(leaves), list(names), list(parameters)


def refusal(tracked: list[Tracked], func: Any, how: str) -> UnsupportedModuleError:
    """The error for a function that per-example gradients are not known of."""
    names = sorted({name for t in tracked for name in t.made.names})
    name = getattr(func, "__qualname__", None) or getattr(func, "__name__", str(func))
    return UnsupportedModuleError(
        f"{', '.join(names)} is given to {name} {how}, of which dpft does not know the gradient of each example. Wrap "
        "with strategy='per_example', write a rule for the module (dpft.register_rule), or freeze it."
    )
