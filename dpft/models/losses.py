"""The losses of every head: what a forward computes as a mean over the batch, computed per example.

The heads of transformers end in a functional loss of torch, called directly, by a module (``CrossEntropyLoss()``) or
by ``model.loss_function``. While :class:`PerExampleLosses` is active, such a call gives each example's own loss: what
transformers computes for the example alone. The model receives :class:`ExampleLosses` in place of the scalar, with
which it can do only what keeps examples apart.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dpft.clipping.deferred_checks import DeferredChecks
from dpft.errors import ClippingError
from dpft.models.targets import TargetRows

WAY_OUT = (
    "Wrap with strategy='per_example', use physical batches of one example, or leave the targets out, compute losses "
    "[B] from the outputs with reduction='none' and call dpft.clipped_loss(model, losses)."
)
_CLASSES = (F.cross_entropy, F.nll_loss)
_ELEMENTS = (
    F.mse_loss,
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
)
_SIGNATURES = {func: inspect.signature(func) for func in (*_CLASSES, *_ELEMENTS)}
_WEIGHTED_MEANS = (F.mse_loss, F.l1_loss, F.huber_loss)  # which divide by the sum of their weights


class ExampleLosses:
    """What a model gets in place of its loss: the losses ``[B]``, of which nothing is a function of two examples.

    It can be added to, subtracted from, multiplied and divided by Python numbers and its like, and moved to a device.
    """

    __slots__ = ("losses",)

    def __init__(self, losses: Tensor) -> None:
        self.losses = losses

    @property
    def device(self) -> torch.device:
        """Of the losses."""
        return self.losses.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the losses."""
        return self.losses.dtype

    def to(self, *args: Any, **kwargs: Any) -> ExampleLosses:
        """The same on the device named; the losses stay as precise as they are."""
        device = torch.empty(0, device=self.losses.device).to(*args, **kwargs).device
        return ExampleLosses(self.losses.to(device))

    def float(self) -> ExampleLosses:
        """The same."""
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        first, second = (*args, None, None)[:2]
        plain = isinstance(first, Tensor) and first.dim() == 0 and not first.requires_grad
        if name == "add_" and plain and isinstance(second, ExampleLosses) and len(args) == 2 and not kwargs:
            return ExampleLosses(second.losses + first)  # total = torch.zeros([]); total += loss
        _refuse(name)

    def __getattr__(self, name: str) -> Any:
        if hasattr(Tensor, name):
            _refuse(name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __neg__(self) -> ExampleLosses:
        return ExampleLosses(-self.losses)

    __hash__ = object.__hash__


def _arithmetic(name: str, swapped: bool) -> Callable[[ExampleLosses, Any], ExampleLosses]:
    """The method for one of + - * /, from the right where ``swapped``."""
    apply = getattr(operator, name)

    def method(self: ExampleLosses, other: Any) -> ExampleLosses:
        if isinstance(other, ExampleLosses):
            return ExampleLosses(apply(self.losses, other.losses.to(self.losses.device)))
        if isinstance(other, int | float):
            return ExampleLosses(apply(other, self.losses) if swapped else apply(self.losses, other))
        what = f"a tensor of shape {list(other.shape)}" if isinstance(other, Tensor) else f"a {type(other).__name__}"
        _refuse(f"{name} with {what}, which may depend on several examples (as an auxiliary loss does)")

    return method


def _refused(name: str) -> Callable[..., Any]:
    return lambda *_: _refuse(name)


for _name in ("add", "sub", "mul", "truediv"):
    setattr(ExampleLosses, f"__{_name}__", _arithmetic(_name, swapped=False))
    setattr(ExampleLosses, f"__r{_name}__", _arithmetic(_name, swapped=True))
for _name in ("bool", "float", "int", "eq", "ne", "lt", "le", "gt", "ge", "pow", "abs", "mod", "floordiv", "matmul"):
    setattr(ExampleLosses, f"__{_name}__", _refused(_name))


class LossError(ClippingError):
    """The losses of a batch cannot be told apart: nothing is trained on what one example alone gives instead."""


def _refuse(operation: str) -> NoReturn:
    """Refuse an operation on a model's loss."""
    raise LossError(
        f"the model's forward used its loss in {operation}. For a private training it holds a loss per example, which "
        "can only be added to, or multiplied with, numbers and other such losses: anything else may mix examples. "
        f"{WAY_OUT}"
    )


class PerExampleLosses(TorchFunctionMode):
    """While active, a functional loss of the batch's targets is computed per example.

    For one example alone the loss is the model's own scalar, which may be anything; only, a mean over no target at
    all is 0 with a zero gradient, and not NaN.

    Args:
        targets: of the forward, by argument.
        batch: B.
        checks: of the wrapped model.
        mask: ``attention_mask``. Where an answer is the position of a token, none of a row's padding is a candidate;
            else its loss would depend on the longest row beside it.
    """

    def __init__(self, targets: Mapping[str, Any], batch: int, checks: DeferredChecks, mask: Any = None) -> None:
        super().__init__()
        self._batch, self._names, self._mask = batch, sorted(targets), mask
        self._rows = TargetRows(targets, batch, checks)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _SIGNATURES:
            return self._loss(func, args, kwargs)
        out = func(*args, **kwargs)
        if args and self._rows.concerns(args):
            self._rows.follow(func, args, kwargs, out)
        return out

    def _loss(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bound = _SIGNATURES[func].bind(*args, **kwargs)
        bound.apply_defaults()
        call = bound.arguments
        if call["reduction"] == "none" and call.get("reduce") is None and call.get("size_average") is None:
            return func(*args, **kwargs)
        if self._batch > 1:
            self._check(func, call)
        if func is F.cross_entropy and self._rows.is_position(call["target"]):
            call.update(_among_tokens(call["input"], call["target"], call["ignore_index"], self._mask))
        if self._batch == 1:
            means = func in _CLASSES and call["reduction"] == "mean" and not _soft(call)
            return _example_losses(func, call, 1).reshape(()) if means else func(*args, **kwargs)
        return ExampleLosses(_example_losses(func, call, self._batch))

    def _check(self, func: Any, call: dict[str, Any]) -> None:
        """Refuse a loss of which it is not certain which part is which example's.

        Raises:
            ClippingError: names the loss, and what is wrong.
        """
        x, target, weights = call["input"], call["target"], (call.get("weight"), call.get("pos_weight"))
        of_examples = target in self._rows or (func in _ELEMENTS and x in self._rows)
        why = ""
        if call.get("reduce") is not None or call.get("size_average") is not None:
            why = "it has the arguments reduce or size_average, which torch has replaced by reduction"
        elif not of_examples:
            why = (
                f"its targets of shape {list(target.shape)} are not the call's {', '.join(self._names)}, viewed, "
                f"shifted or masked, with an equal number for each of {self._batch} examples (a selection of tokens, "
                "or targets made in the forward): it is not known which belongs to which example"
            )
        elif func in _ELEMENTS and x.shape != target.shape:
            why = f"outputs of shape {list(x.shape)} are compared with targets of shape {list(target.shape)}"
        elif func in _ELEMENTS and any(w is not None and not _of_classes(w, target) for w in weights):
            why = "it has a weight for each element, of which it is not known to which example it belongs"
        elif func in _WEIGHTED_MEANS and call.get("weight") is not None:
            why = "it divides by the sum of its weights"
        if why:
            raise LossError(f"{func.__name__} in the model's forward cannot be computed per example: {why}. {WAY_OUT}")


def _of_classes(weight: Tensor, target: Tensor) -> bool:
    """Whether a weight of elements is one of classes, the same for every row."""
    return weight.numel() == 1 or weight.dim() < target.dim()


def _among_tokens(x: Tensor, target: Tensor, ignored: int, mask: Any) -> dict[str, Tensor]:
    """Scores ``[B, T]`` of the columns and the one that is right ``[B]``, without those that are padding."""
    if not isinstance(mask, Tensor) or mask.shape != x.shape or target.shape != x.shape[:1]:
        return {}
    real = mask.to(x.device) > 0
    inside = real.gather(1, target.clamp(0, x.shape[1] - 1).unsqueeze(1)).squeeze(1)
    scores = x.float() if x.element_size() < 4 else x
    return {
        "input": scores.masked_fill(~real, torch.finfo(scores.dtype).min),
        "target": torch.where(inside, target, ignored),
    }


def _soft(call: Mapping[str, Any]) -> bool:
    """Whether the targets of a classification are probabilities of the classes."""
    target: Tensor = call["target"]
    return target.is_floating_point() and target.shape == call["input"].shape


def _wide(value: Any) -> Any:
    """In float32, if it is a tensor in 16 bits: as the losses of a causal LM are computed."""
    half = isinstance(value, Tensor) and value.is_floating_point() and value.element_size() < 4
    return value.float() if half else value


def _example_losses(func: Any, call: Mapping[str, Any], batch: int) -> Tensor:
    """``[B]``: torch's loss with its reduction, for each example alone; 0 where a mean is over no target.

    Args:
        func: the functional loss.
        call: its arguments.
        batch: B; the elements are whole examples, one after another.
    """
    call = {name: _wide(value) for name, value in call.items()}
    target = call["target"]
    elements = func(**{**call, "reduction": "none"})
    rows = elements.reshape(batch, -1)
    if call["reduction"] == "sum":
        return rows.sum(1)
    if func not in _CLASSES or _soft(call):
        return rows.mean(1)
    counted = target != call["ignore_index"]
    weight = call["weight"]
    sizes = counted if weight is None else torch.where(counted, weight[torch.where(counted, target, 0)], 0.0)
    total = sizes.reshape(batch, -1).sum(1)
    return rows.sum(1) / torch.where(total > 0, total, 1)


def loss_of(out: Any) -> Any:
    """The loss in what a model of transformers returned, or None."""
    if isinstance(out, tuple):
        return out[0] if out else None
    return out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", None)


def with_loss(out: Any, loss: Tensor) -> Any:
    """What a model returned, with another loss."""
    if isinstance(out, tuple):
        return (loss, *out[1:])
    if isinstance(out, MutableMapping):
        out["loss"] = loss
    else:
        out.loss = loss
    return out
