"""Rules for linear maps: ``nn.Linear`` and, with ``transposed=True``, GPT-2's ``Conv1D``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dpft.rules.base import (
    Host,
    LinearUse,
    MatrixUse,
    SiteFunction,
    attribute,
    check_rows,
    full_shape,
    has_rows,
    known_rows,
    per_example,
    running_pass,
)
from dpft.rules.tracked import computed


class LinearSite(SiteFunction):
    """The node of ``y = x W^T + b``; saves only what autograd would save, ``x`` and ``W``.

    ``y`` is uninitialised: :func:`linear_site` fills it. A checkpoint stops its recomputation when the last tensor has
    been saved, and a Function saves after its forward: a product computed in here would be recomputed needlessly.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, tap: Tensor, site: Any) -> Tensor:
        ctx.save_for_backward(x, w, b)
        ctx.site = site
        return x.new_empty((*x.shape[:-1], site.use.out_features))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w, b = ctx.saved_tensors
        site = ctx.site
        running = running_pass(site.host, site.use.key)
        dx = None
        if ctx.needs_input_grad[0]:
            with site.host.hold(w):
                dx = g @ (w.mT if site.use.transposed else w).to(g.dtype)
        x3, g3 = (per_example(t, site.host, site.use.key) for t in (x, g))
        dw = running.matrix(site.use, x3, g3, w) if site.weight else None
        db = None
        if b is not None and site.bias_key is not None:
            dtype = torch.float64 if g3.dtype == torch.float64 else torch.float32
            db = running.vector(site.bias_key, g3.sum(1, dtype=dtype), b)
        return dx, dw, db, None, None


class _Site:
    """The non-tensor arguments of one linear node."""

    __slots__ = ("bias_key", "host", "use", "weight")

    def __init__(self, host: Host, use: LinearUse, weight: bool, bias_key: str | None) -> None:
        self.host, self.use, self.weight, self.bias_key = host, use, weight, bias_key


def linear_site(host: Host, keys: dict[str, str], x: Tensor, w: Tensor, b: Tensor | None, transposed: bool) -> Tensor:
    """Apply a linear map through a site node; under autocast in autocast's dtype, as ``F.linear`` would."""
    out_features, in_features = w.shape[::-1] if transposed else w.shape
    same = not x.requires_grad and known_rows(host) not in x.shape[:-1]
    if same and not has_rows(host, x.shape[:-1], *keys.values()):
        return _of_all_rows(host, keys, x, w, b, transposed)
    check_rows(host, x.shape[:-1], *keys.values())
    use = LinearUse(keys.get("weight", keys.get("bias", "")), out_features, in_features, transposed, host.impl)
    if "weight" in keys:
        host.record_use(use.key)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    site = _Site(host, use, "weight" in keys, keys.get("bias"))
    y: Tensor = LinearSite.apply(x, w, b, host.tap, site)
    with torch.no_grad():
        rows, product = x.reshape(-1, in_features), y.view(-1, out_features)
        w = w.to(x.dtype) if transposed else w.to(x.dtype).mT
        if b is None:
            torch.mm(rows, w, out=product)
        else:
            torch.addmm(b.to(x.dtype), rows, w, out=product)
    return y


def _of_all_rows(host: Host, keys: dict[str, str], x: Tensor, w: Tensor, b: Tensor | None, transposed: bool) -> Tensor:
    """A map of an input that is the same for all rows, an identity or a frozen weight: a value of parameters alone.

    An input that is not the same for all rows after all is seen by the isolation check by values.
    """
    trained = {name: p for name, p in (("weight", w), ("bias", b)) if name in keys and p is not None}

    def of_parameters(*values: Tensor) -> Tensor:
        at = dict(zip(trained, values, strict=True))
        weight = at.get("weight", w)
        return F.linear(x, weight.mT if transposed else weight, at.get("bias", b))

    return computed(host, [keys[name] for name in trained], list(trained.values()), of_parameters)


class LinearRule:
    """Rule of ``nn.Linear`` (``weight [d, p]``) or, transposed, of ``Conv1D`` (``weight [p, d]``)."""

    covers_children = False

    def __init__(self, transposed: bool = False) -> None:
        self.transposed = transposed

    def parameters(self, module: nn.Module) -> set[str]:
        return {name for name, p in module._parameters.items() if p is not None}

    def uses(self, module: nn.Module, keys: dict[str, str]) -> list[MatrixUse]:
        shape = full_shape(attribute(module, "weight"))
        if "weight" not in keys or len(shape) != 2:
            return []
        d, p = shape[::-1] if self.transposed else shape
        return [LinearUse(keys["weight"], d, p, self.transposed)]

    def forward(
        self, module: nn.Module, host: Host, keys: dict[str, str], plain: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        (x,) = (*args, *kwargs.values())
        return linear_site(host, keys, x, attribute(module, "weight"), attribute(module, "bias"), self.transposed)
