"""What the functions of torch do with a tracked parameter and an activation, through sites: exact per example.

Each function here gets a call as :class:`~dpft.rules.tracked.Tracked` has seen it, and returns what the call would,
or ``NotImplemented`` where it does not apply: then the call is one of parameters alone, or refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor

from dpft.errors import UnsupportedModuleError
from dpft.kernels.convolution import RowConvolution
from dpft.rules.base import check_rows, has_rows
from dpft.rules.embedding import embedding_site
from dpft.rules.linear import linear_site
from dpft.rules.tracked import Tracked, derived, rows_of

Call = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]


def is_tracked(value: Any) -> TypeGuard[Tracked]:
    """Whether a value is a :class:`~dpft.rules.tracked.Tracked`."""
    return isinstance(value, Tracked)


def _bound(names: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(names.split(), args, strict=False)) | kwargs


# --- element by element ----------------------------------------------------------------------------------------------

_ELEMENTWISE = """
    add radd iadd sub subtract rsub isub mul multiply rmul imul div divide rdiv truediv rtruediv
    itruediv true_divide pow rpow where maximum minimum fmax fmin lerp addcmul addcdiv masked_fill
    copysign hypot atan2 logaddexp xlogy remainder clamp clamp_min clamp_max eq ne lt le gt ge
"""


def _elementwise(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A function with broadcasting: each tracked tensor gets the batch as a leading dimension."""
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    tracked = [t for t in tensors if is_tracked(t)]
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    rows = tracked[0].rows
    repeats = _leading(shape, tensors, tracked[0])
    if repeats is None or any(t.dim() == len(shape) and t.shape[0] != 1 for t in tracked):
        return NotImplemented

    def with_rows(t: Any) -> Any:
        if not is_tracked(t):
            return t
        t = derived(t, t.made.value.squeeze(0)) if t.dim() == len(shape) else t
        each = rows_of(t).view(rows, *[1] * (len(shape) - 1 - t.dim()), *t.shape)
        return each if repeats == 1 else each.repeat_interleave(repeats, 0)

    for t in tracked:
        check_rows(t.host, shape[:1], *t.made.names)
    return func(*(with_rows(a) for a in args), **{name: with_rows(a) for name, a in kwargs.items()})


def _leading(shape: torch.Size, tensors: list[Any], t: Tracked) -> int | None:
    """How many rows of the result ``shape`` each row of the batch has, if an activation has all of them; else None."""
    led = any(not is_tracked(t) and t.dim() == len(shape) and t.shape[:1] == shape[:1] for t in tensors)
    if not led or not shape or shape[0] == 0:
        return None
    return shape[0] // t.rows if has_rows(t.host, shape[:1], *t.made.names) else None


def _add(t: Tensor, bias: Any) -> Tensor:
    """``t`` plus a bias that may be tracked or None."""
    if bias is None:
        return t
    if not is_tracked(bias):
        return t + bias
    found = _elementwise(torch.add, (t, bias), {})
    if found is NotImplemented:
        raise _shape_refusal(bias, t)
    return found


def _shape_refusal(tracked: Any, x: Tensor) -> UnsupportedModuleError:
    return UnsupportedModuleError(
        f"{', '.join(tracked.made.names)} meets a tensor of shape {list(x.shape)} in a batch of {tracked.rows} rows: "
        "its first dimension is not the batch, so it is not known which example a row belongs to. Wrap with "
        "strategy='per_example', or freeze it."
    )


def _expand(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A class token that is repeated for each row of the batch, or a table of H heads for each of ``[B * H, ...]``."""
    t = args[0]
    if not is_tracked(t):
        return NotImplemented
    others = [a.detach() if isinstance(a, Tensor) else a for a in args[1:]]
    made = func(t.made.value, *others, **kwargs)
    if (
        t.rows > 1
        and func.__name__ == "repeat"
        and made.dim() == t.dim()
        and made.shape[0] == t.rows * t.shape[0] > t.rows
    ):
        return rows_of(derived(t, made[: t.shape[0]])).flatten(0, 1)
    new = made.dim() > t.dim() or t.shape[0] == 1
    if not (new and t.rows > 1 and made.dim() > 0 and made.shape[0] == t.rows):
        return NotImplemented
    return rows_of(derived(t, made[0]))


# --- matrices --------------------------------------------------------------------------------------------------------


def _product(x: Tensor, w: Any, b: Any, transposed: bool) -> Any:
    """``x W^T + b``, or ``x W + b`` where ``transposed``; any of W and b may be tracked."""
    if is_tracked(x):
        return NotImplemented
    t = w if is_tracked(w) else b
    if not x.requires_grad and not has_rows(t.host, x.shape[:-1], *t.made.names):
        return NotImplemented  # an input that is the same for all rows
    if not is_tracked(w):
        return _add(x @ (w if transposed else w.mT), b)
    if w.direct and w.dim() == 2:
        keys = {"weight": w.made.names[0]}
        (weight,) = w.made.parameters
        kept = b is None or (is_tracked(b) and b.direct and b.dim() == 1)
        bias = b.made.parameters[0] if kept and b is not None else None
        if bias is not None:
            keys["bias"] = b.made.names[0]
        y = linear_site(w.host, keys, x, weight, bias, transposed != w.transposed)
        return y if kept else _add(y, b)
    if w.dim() != 2:
        return NotImplemented
    check_rows(w.host, x.shape[:-1], *w.made.names)
    each = rows_of(w)
    y = x.reshape(w.rows, -1, x.shape[-1]) @ (each if transposed else each.mT)
    return _add(y.view(*x.shape[:-1], y.shape[-1]), b)


def _linear(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call = _bound("input weight bias", args, kwargs)
    return _product(call["input"], call["weight"], call.get("bias"), transposed=False)


def _addmm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call = _bound("input mat1 mat2", args, kwargs)
    if call.keys() - {"input", "mat1", "mat2"}:
        return NotImplemented
    return _product(call["mat1"], call["mat2"], call["input"], transposed=True)


def _matmul(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call = _bound("input other", args, kwargs)
    x, w = call["input"], call["other"] if "other" in call else call["mat2"]
    if func.__name__ == "__rmatmul__":
        x, w = w, x
    elif (found := _bmm(func, (x, w), {})) is not NotImplemented:
        return found
    if is_tracked(w) and not is_tracked(x):
        if w.dim() == 1 and _holds_rows(x, w):
            each = rows_of(w)
            check_rows(w.host, x.shape[:-1], *w.made.names)
            return (x.reshape(w.rows, -1, x.shape[-1]) @ each.unsqueeze(2)).view(x.shape[:-1])
        if w.dim() == 2:
            return _product(x, w, None, transposed=True)
    if is_tracked(x) and not is_tracked(w) and 2 <= x.dim() < w.dim() and w.shape[0] == x.rows:
        return rows_of(x).view(x.rows, *[1] * (w.dim() - 1 - x.dim()), *x.shape) @ w
    t, other = (x, w) if is_tracked(x) else (w, x)
    if t.dim() == other.dim() > 2 and t.shape[0] == 1 and other.shape[0] == t.rows:
        each = rows_of(derived(t, t.made.value.squeeze(0)))
        return each @ w if t is x else x @ each
    return NotImplemented


def _bmm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``x [H, N, p] @ W [H, p, d]``, a matrix for each of H heads or experts; the N tokens are those of the batch."""
    plain = func.__name__ in ("bmm", "matmul", "__matmul__")
    call = _bound("x w" if plain else "bias x w", args, kwargs)
    x, w, bias = (call.get(name) for name in ("x", "w", "bias"))
    if x is None or w is None or is_tracked(x) or not is_tracked(w) or x.dim() != 3 or w.dim() != 3:
        return NotImplemented
    if x.shape[0] != w.shape[0] or not has_rows(w.host, x.shape[1:2], *w.made.names):
        return NotImplemented
    heads, tokens, features = x.shape
    y = x.view(heads, w.rows, -1, features).transpose(0, 1) @ rows_of(w)  # [B, H, N / B, d]
    if bias is not None:
        wide = bias if bias.dim() == 3 else derived(bias, bias.made.value.unsqueeze(0))
        y = y + (rows_of(wide) if is_tracked(wide) else wide)
    return y.transpose(0, 1).reshape(heads, tokens, -1)


def _holds_rows(x: Tensor, w: Any) -> bool:
    """Whether an operand may be an activation: it has a gradient, or the batch in front."""
    return x.requires_grad or (x.dim() > 1 and x.shape[0] % w.rows == 0)


def _einsum(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The batch's letter, first in an activation and in the result, goes in front of the tracked operand's."""
    spec, operands = args[0], args[1] if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:]
    if not isinstance(spec, str) or "->" not in spec or len(operands) != 2:
        return NotImplemented
    inputs, out = spec.replace(" ", "").split("->")
    terms = inputs.split(",")
    at = next(i for i, t in enumerate(operands) if is_tracked(t))
    t, x = operands[at], operands[1 - at]
    if "..." in terms[1 - at]:  # its dimensions get letters
        free = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in spec]
        letters = "".join(free[: x.dim() - len(terms[1 - at]) + 3])
        terms[1 - at], out = terms[1 - at].replace("...", letters), out.replace("...", letters)
    if "." in "".join((*terms, out)):
        return NotImplemented
    if is_tracked(x) or not out or terms[1 - at][0] != out[0] or out[0] in terms[at] or x.shape[0] != t.rows:
        return NotImplemented
    terms[at] = out[0] + terms[at]
    both = [x, x]
    both[at] = rows_of(t)
    return torch.einsum(f"{','.join(terms)}->{out}", *both)


def _embedding(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call = _bound("input weight padding_idx max_norm norm_type scale_grad_by_freq sparse", args, kwargs)
    ids, w = call["input"], call["weight"]
    if any(call.get(option) for option in ("max_norm", "scale_grad_by_freq", "sparse")):
        raise UnsupportedModuleError(
            f"{', '.join(w.made.names)} is looked up with max_norm, scale_grad_by_freq or sparse, which make the "
            "gradient of one example depend on others or change the weight in the forward. Turn the option off."
        )
    if w.direct and not w.transposed:
        padding = call.get("padding_idx")
        if padding is not None and padding < 0:
            padding += w.shape[0]
        return embedding_site(w.host, {"weight": w.made.names[0]}, ids, w.made.parameters[0], padding)
    if call.get("padding_idx") is not None or ids.shape[0] != w.rows:
        return NotImplemented
    return rows_of(w)[torch.arange(w.rows, device=ids.device).view(-1, *[1] * (ids.dim() - 1)), ids]


def _getitem(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A table that is looked up by ids of each row; all other indices are the same for every example."""
    t, index = args
    ids = isinstance(index, Tensor) and not is_tracked(index) and index.dtype in (torch.int64, torch.int32)
    if not (ids and is_tracked(t) and index.dim() >= 2 and t.rows > 1 and index.shape[0] == t.rows):
        return NotImplemented
    return _embedding(func, (index, t), {})


# --- convolutions and norms ------------------------------------------------------------------------------------------


_SETTINGS = (("stride", 1), ("padding", 0), ("dilation", 1))


def _each_dim(value: Any, dims: int) -> list[int]:
    return [value] * dims if isinstance(value, int) else list(value) * (dims // len(value))


def _convolution(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A convolution with the filters' gradient for each row.

    Where there is no formula for it, the rows are groups of one convolution: row i's channels meet its view of the
    filters.
    """
    names = "input weight bias stride padding dilation groups"
    if "transpose" in func.__name__:
        names = "input weight bias stride padding output_padding groups dilation"
    call = _bound(names, args, kwargs)
    x, w, b = call.pop("input"), call.pop("weight"), call.pop("bias", None)
    if is_tracked(x):
        return NotImplemented
    b = _of_channels(b, w.dim() - 2)
    if not is_tracked(w):
        return _add(func(x, w, None, **call), b)
    if x.dim() != w.dim():
        raise _shape_refusal(w, x)
    rows, each = w.rows, rows_of(w)
    check_rows(w.host, x.shape[:1], *w.made.names)
    if func.__name__ in ("conv1d", "conv2d") and not isinstance(call.get("padding", 0), str):
        dims = w.dim() - 2
        settings = [_each_dim(call.get(name, default), dims) for name, default in _SETTINGS]
        return _add(RowConvolution.apply(x, each, (*settings, call.get("groups", 1))), b)
    space = x.shape[2:]
    folded = x.reshape(rows, -1, *x.shape[1:]).transpose(0, 1).reshape(-1, rows * x.shape[1], *space)
    call["groups"] = rows * call.get("groups", 1)
    y = func(folded, each.reshape(-1, *w.shape[1:]), None, **call)
    y = y.unflatten(1, (rows, -1)).transpose(0, 1)
    return _add(y.reshape(-1, *y.shape[2:]), b)


def _of_channels(p: Any, space: int) -> Any:
    """A parameter ``[C]`` as ``[C, 1, ...]``, for activations ``[B, C, ...]`` of ``space`` more dimensions."""
    shape = (-1, *[1] * space)
    if p is None:
        return None
    return derived(p, p.made.value.view(shape)) if is_tracked(p) else p.view(shape)


def _normed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A norm without its affine parameters, and these as products and sums."""
    group = func.__name__ == "group_norm"
    call = _bound("input count weight bias eps" if group else "input normalized_shape weight bias eps", args, kwargs)
    x, w, b = call.pop("input"), call.pop("weight", None), call.pop("bias", None)
    if is_tracked(x):
        return NotImplemented
    if group:
        w, b = (_of_channels(p, x.dim() - 2) for p in (w, b))
        y = func(x, call["num_groups"] if "num_groups" in call else call["count"], eps=call.get("eps", 1e-5))
    else:
        y = func(x, call["normalized_shape"], eps=call.get("eps", 1e-5 if func.__name__ == "layer_norm" else None))
    return _add(_scaled(y, w), b)


def _instance_normed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """As :func:`_normed`; the statistics are of each row alone, unless running ones are kept: these are refused."""
    call = _bound("input running_mean running_var weight bias use_input_stats momentum eps", args, kwargs)
    x, w, b = call["input"], call.get("weight"), call.get("bias")
    if is_tracked(x) or call.get("running_mean") is not None:
        return NotImplemented
    y = func(x, eps=call.get("eps", 1e-5))
    w, b = (_of_channels(p, x.dim() - 2) for p in (w, b))
    return _add(_scaled(y, w), b)


def _prelu(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call = _bound("input weight", args, kwargs)
    x, w = call["input"], call["weight"]
    if is_tracked(x) or not is_tracked(w):
        return NotImplemented
    w = _of_channels(w, x.dim() - 2) if w.numel() > 1 else w
    return torch.where(x > 0, x, _scaled(x, w))


def _scaled(x: Tensor, w: Any) -> Tensor:
    """``x`` times a parameter that may be tracked or None."""
    if w is None:
        return x
    found = _elementwise(torch.mul, (x, w), {}) if is_tracked(w) else x * w
    if found is NotImplemented:
        raise _shape_refusal(w, x)
    return found


def _attention(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A bias ``[1, H, T, S]`` of the attention's logits."""
    call = _bound("query key value attn_mask dropout_p is_causal", args, kwargs)
    q, bias = call["query"], call.get("attn_mask")
    others = any(is_tracked(t) for name, t in call.items() if name != "attn_mask")
    if others or not is_tracked(bias) or q.shape[0] != bias.rows or bias.dim() != 4 or bias.shape[0] != 1:
        return NotImplemented
    each = rows_of(derived(bias, bias.made.value.squeeze(0)))
    return func(**call | {"attn_mask": each})


FUNCTIONS: dict[str, Call] = {
    **dict.fromkeys(_ELEMENTWISE.split(), _elementwise),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to", "repeat", "tile"), _expand),
    "linear": _linear,
    "addmm": _addmm,
    "baddbmm": _bmm,
    **dict.fromkeys(("matmul", "rmatmul", "mm", "mv", "bmm"), _matmul),
    "einsum": _einsum,
    "embedding": _embedding,
    "getitem": _getitem,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _convolution),
    **dict.fromkeys(("layer_norm", "rms_norm", "group_norm"), _normed),
    "scaled_dot_product_attention": _attention,
    "instance_norm": _instance_normed,
    "prelu": _prelu,
}
