"""Rules for any module: it runs once for each row of the batch, or its author says what the gradients are."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dpft.errors import ClippingError, UnsupportedModuleError
from dpft.rules.base import (
    Host,
    MatrixUse,
    SiteFunction,
    check_rows,
    forward_batch_size,
    full_shape,
    per_example,
    running_pass,
)
from dpft.rules.parameter import parameter_rows, shadowed, unchanged
from dpft.rules.plain_parameters import own_parameters
from dpft.rules.tracked import leaves_of, replaced

GradSample = Callable[[nn.Module, list[Tensor], Tensor], Mapping[Any, Tensor]]


@dataclass(frozen=True)
class Places:
    """Which dimension of a module's inputs and outputs is the batch.

    Attributes:
        inputs: by name of the argument; those that are not named are the same for all rows.
        outputs: of the output's tensors, in order.
    """

    inputs: dict[str, int] = field(default_factory=dict)
    outputs: tuple[int, ...] = ()


class RowByRowRule:
    """Runs the module on one row of the batch after the other, each with its own view of the parameters.

    Exact for every module that treats the rows of its input alike and apart, at the FLOPs of the batch, in as many
    calls as there are rows; the parameters' per-example gradients are kept, ``[B, *shape]``.

    Args:
        places: of a module: where the batch is; None: dimension 0 of every input whose first dimension is the batch
            (or a multiple of it, ``[B * T, ...]``), and of every output.
    """

    covers_children = True

    def __init__(self, places: Callable[[nn.Module], Places] | None = None) -> None:
        self._places = places

    def parameters(self, module: nn.Module) -> set[str]:
        return {name for name, _ in module.named_parameters(remove_duplicate=False)}

    def uses(self, module: nn.Module, keys: dict[str, str]) -> list[MatrixUse]:
        return []

    def forward(
        self, module: nn.Module, host: Host, keys: dict[str, str], plain: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        bound = inspect.signature(plain).bind(*args, **kwargs)
        places = None if self._places is None else self._places(module)
        rows = forward_batch_size(host, _leading(bound.arguments, places))
        row = _splitter(bound.arguments, places, rows, host, list(keys.values()))
        views = {
            name: parameter_rows(host, unchanged(module.get_parameter(name), key), rows).unbind(0)
            for name, key in keys.items()
        }
        at = {key: views[name] for name, key in keys.items()}
        outputs = []
        for i in range(rows):
            with shadowed(module, keys, lambda p, key, i=i: at[key][i]), _flat_weights(module):  # type: ignore[misc]  # i is bound at once
                outputs.append(plain(*row(bound.args, i), **row(bound.kwargs, i)))
        return _joined(outputs, None if places is None else places.outputs, type(module).__name__)


def _leading(arguments: dict[str, Any], places: Places | None) -> int:
    """R as the inputs say; for a module that is called outside of the model's forward."""
    for name, value in arguments.items():
        dim = 0 if places is None else places.inputs.get(name)
        t = next(leaves_of(value), None)
        if t is not None and dim is not None and t.dim() > dim:
            return int(t.shape[dim])
    return 1


def _splitter(
    arguments: dict[str, Any], places: Places | None, rows: int, host: Host, names: list[str]
) -> Callable[[Any, int], Any]:
    """A function that takes row i out of the arguments of a call.

    Raises:
        ClippingError: an input has another number of rows than the batch.
    """
    dims: dict[int, int] = {}
    for name, value in arguments.items():
        for t in leaves_of(value):
            if places is None:
                if t.dim() > 0 and (t.shape[0] == rows or t.is_floating_point()):
                    check_rows(host, t.shape[:1], *names)
                    dims[id(t)] = 0
            elif name in places.inputs:
                dim = dims[id(t)] = places.inputs[name]
                if t.dim() <= dim or t.shape[dim] != rows:
                    raise ClippingError(
                        f"{names[0]!r}: {name} has shape {list(t.shape)} in a batch of {rows} rows; expected them in "
                        f"dimension {dim}. Wrap with strategy='per_example', or freeze the module."
                    )

    def take(t: Tensor, i: int) -> Tensor:
        dim = dims.get(id(t))
        if dim is None:
            return t
        each = t.shape[dim] // rows
        return t.narrow(dim, i * each, each)

    return lambda tree, i: replaced(tree, lambda t: take(t, i))


def _joined(outputs: list[Any], dims: tuple[int, ...] | None, kind: str) -> Any:
    """The outputs of rows as one output of the batch."""
    first = outputs[0]
    leaves = [list(leaves_of(out)) for out in outputs]
    if any(len(each) != len(leaves[0]) for each in leaves):
        raise ClippingError(f"{kind} returned another number of tensors for one row than for another")
    where = dims or (0,) * len(leaves[0])
    parts = list(zip(*leaves, strict=True))
    together = iter([torch.cat(part, dim) for part, dim in zip(parts, where, strict=False)])
    return replaced(first, lambda t: next(together))


@contextlib.contextmanager
def _flat_weights(module: nn.Module) -> Any:
    """A recurrent layer reads its parameters from a list of its own."""
    if not isinstance(module, nn.RNNBase):
        yield
        return
    before = module._flat_weights
    module.__dict__["_flat_weights"] = [getattr(module, name) for name in module._flat_weights_names]
    try:
        yield
    finally:
        module.__dict__["_flat_weights"] = before


def _recurrent(module: nn.Module) -> Places:
    batch = 0 if module.batch_first else 1
    return Places({"input": batch, "hx": 1}, (batch, 1, 1))


def _attention(module: nn.Module) -> Places:
    batch = 0 if module.batch_first else 1
    return Places({"query": batch, "key": batch, "value": batch, "key_padding_mask": 0}, (batch, 0))


RECURRENT, ATTENTION, ROWS = RowByRowRule(_recurrent), RowByRowRule(_attention), RowByRowRule()


class GradSampleSite(SiteFunction):
    """The identity on a module's output; its backward asks the module's author for the per-example gradients."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, tap: Tensor, site: Any, count: int, *saved: Tensor) -> Tensor:
        ctx.save_for_backward(*saved)
        ctx.site, ctx.count = site, count
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        module, host, keys, function = ctx.site
        parameters, inputs = ctx.saved_tensors[: ctx.count], list(ctx.saved_tensors[ctx.count :])
        running = running_pass(host, next(iter(keys.values())))
        with contextlib.ExitStack() as present:
            for p in parameters:
                present.enter_context(host.hold(p))
            found = function(module, inputs, g)
        by_name = {(key if isinstance(key, str) else _name_of(module, key)): grad for key, grad in found.items()}
        given = []
        for (name, key), p in zip(keys.items(), parameters, strict=True):
            grad, shape = by_name.get(name), full_shape(p)
            if grad is None or grad.shape[1:] != shape:
                got = None if grad is None else list(grad.shape)
                raise ClippingError(
                    f"the rule of {type(module).__name__} gave {got} for {key!r}; expected per-example gradients of "
                    f"shape [B, {', '.join(map(str, shape))}], by the parameter or its name"
                )
            each = per_example(grad, host, key, len(shape))
            given.append(running.vector(key, each.squeeze(1) if each.shape[1] == 1 else each.sum(1), p))
        return g, None, None, None, *given, *[None] * len(inputs)


def _name_of(module: nn.Module, parameter: Any) -> str:
    return next((name for name, p in own_parameters(module).items() if p is parameter), "")


class GradSampleRule:
    """A rule from a function of the module, its inputs and its output's gradient; see :func:`dpft.register_rule`."""

    covers_children = False

    def __init__(self, function: GradSample) -> None:
        self._function = function

    def parameters(self, module: nn.Module) -> set[str]:
        return set(own_parameters(module))

    def uses(self, module: nn.Module, keys: dict[str, str]) -> list[MatrixUse]:
        return []

    def forward(
        self, module: nn.Module, host: Host, keys: dict[str, str], plain: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        inputs = [t.detach() for t in leaves_of((args, kwargs))]
        if inputs and inputs[0].dim():
            check_rows(host, inputs[0].shape[:1], *keys.values())
        with shadowed(module, keys, lambda p, key: p.detach()):
            y = plain(*args, **kwargs)
        if not isinstance(y, Tensor):
            raise UnsupportedModuleError(
                f"{type(module).__name__} returned a {type(y).__name__}; a rule that is a function of the output's "
                "gradient needs one tensor. Register 'rows' for it instead."
            )
        parameters = [module.get_parameter(name) for name in keys]
        site = (module, host, keys, self._function)
        return GradSampleSite.apply(y, host.tap, site, len(parameters), *parameters, *inputs)
