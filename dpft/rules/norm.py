"""Rules for normalisation layers: ``nn.LayerNorm``, ``nn.RMSNorm``, and Hugging Face's elementwise-affine norms."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dpft.rules.base import (
    Host,
    MatrixUse,
    SiteFunction,
    attribute,
    check_rows,
    forward_batch_size,
    full_shape,
    is_flattened,
    per_example,
    running_pass,
)
from dpft.rules.parameter import parameter_rows, shadowed, unchanged
from dpft.rules.plain_parameters import TrackedRule
from dpft.rules.tracked import replaced


class LayerNormSite(SiteFunction):
    """``y = (x - mean) / std * w + b`` over the last ``len(shape)`` dimensions; saves x, mean, 1/std and w."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor | None, b: Tensor | None, tap: Tensor, site: Any) -> Tensor:
        weight, bias = (None if p is None else p.to(x.dtype) for p in (w, b))
        y, mean, rstd = torch.native_layer_norm(x, site.shape, weight, bias, site.eps)
        ctx.save_for_backward(x, mean, rstd, w, b)
        ctx.site = site
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, w, b = ctx.saved_tensors
        site = ctx.site
        running = running_pass(site.host, site.keys.get("weight", site.keys.get("bias", "")))
        dtype = torch.promote_types(x.dtype, torch.float32)
        alone = running.batch_size == 1 and x.dtype == dtype  # then the sums over all rows are the example's gradients
        wanted = [alone and name in site.keys for name in ("weight", "bias")]
        dx: Any = None
        dw: Any = None
        db: Any = None
        if ctx.needs_input_grad[0] or any(wanted):
            with contextlib.ExitStack() as present:
                for p in (w, b):
                    if p is not None:
                        present.enter_context(site.host.hold(p))
                weight, bias = (None if p is None else p.to(x.dtype) for p in (w, b))
                mask = [ctx.needs_input_grad[0], *wanted]
                dx, dw, db = torch.ops.aten.native_layer_norm_backward(
                    g, x, site.shape, mean, rstd, weight, bias, mask
                )
        dims = len(site.shape)
        if w is not None and "weight" in site.keys:
            key = site.keys["weight"]
            if not alone:
                products = ((x.to(dtype) - mean) * rstd).mul_(g)
                dw = per_example(products, site.host, key, dims).sum(1)
            dw = running.vector(key, dw.view(-1, *site.shape), w)
        if b is not None and "bias" in site.keys:
            key = site.keys["bias"]
            if not alone:
                db = per_example(g, site.host, key, dims).sum(1, dtype=dtype)
            db = running.vector(key, db.view(-1, *site.shape), b)
        return dx, dw, db, None, None


class _LayerNorm:
    __slots__ = ("eps", "host", "keys", "shape")

    def __init__(self, host: Host, keys: dict[str, str], shape: list[int], eps: float) -> None:
        self.host, self.keys, self.shape, self.eps = host, keys, shape, eps


class LayerNormRule:
    """Rule of ``nn.LayerNorm``, ``weight`` and ``bias`` of ``normalized_shape``."""

    covers_children = False

    def parameters(self, module: nn.Module) -> set[str]:
        return {name for name, p in module._parameters.items() if p is not None}

    def uses(self, module: nn.Module, keys: dict[str, str]) -> list[MatrixUse]:
        return []

    def forward(
        self, module: nn.Module, host: Host, keys: dict[str, str], plain: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        (x,) = (*args, *kwargs.values())
        if torch.is_autocast_enabled(x.device.type):
            x = x.float()  # autocast runs layer_norm in float32
        shape = list(attribute(module, "normalized_shape"))
        check_rows(host, x.shape[: x.dim() - len(shape)], *keys.values())
        site = _LayerNorm(host, keys, shape, attribute(module, "eps"))
        return LayerNormSite.apply(x, attribute(module, "weight"), attribute(module, "bias"), host.tap, site)


class ElementwiseRule:
    """Rule of a module that only broadcasts its vector parameters over ``x [B, ..., features]``.

    The RMSNorm of every Hugging Face family (``w * x_hat``, ``(1 + w) * x_hat``, float32 inside or not): the
    module's own forward runs, with each parameter replaced by a view with a leading batch dimension.
    """

    covers_children = False

    def parameters(self, module: nn.Module) -> set[str]:
        return {name for name, p in module._parameters.items() if p is not None and len(full_shape(p)) == 1}

    def uses(self, module: nn.Module, keys: dict[str, str]) -> list[MatrixUse]:
        return []

    def forward(
        self, module: nn.Module, host: Host, keys: dict[str, str], plain: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        x, *rest = args
        if any(full_shape(getattr(module, name)) != x.shape[-1:] for name in keys):
            # its forward lays the features out in another way (xLSTM's, of several heads)
            return TrackedRule().forward(module, host, keys, plain, *args, **kwargs)
        batch = forward_batch_size(host, x.shape[0])
        check_rows(host, x.shape[:-1], *keys.values())
        shape = None
        if host.flattening.issuperset(keys.values()) and is_flattened(x.shape[:-1], batch):
            shape = x.shape
            x, rest, kwargs = replaced(
                (x, rest, kwargs), lambda t: t.unflatten(0, (batch, -1)) if t.shape[:-1] == shape[:-1] else t
            )
        else:
            batch = x.shape[0]

        def for_each_row(p: Tensor, key: str) -> Tensor:
            return parameter_rows(host, unchanged(p, key), batch).view(batch, *[1] * (x.dim() - 1 - p.dim()), *p.shape)

        with shadowed(module, keys, for_each_row):
            y = plain(x, *rest, **kwargs)
        return y if shape is None else y.reshape(*shape[:-1], y.shape[-1])


class RMSNormRule(ElementwiseRule):
    """Rule of ``nn.RMSNorm``, whose fused kernel does not accept a weight with a batch dimension."""

    def parameters(self, module: nn.Module) -> set[str]:
        return {name for name, p in module._parameters.items() if p is not None}

    def forward(
        self, module: nn.Module, host: Host, keys: dict[str, str], plain: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        def scaled(x: Tensor) -> Tensor:
            x_hat = F.rms_norm(x, tuple(attribute(module, "normalized_shape")), None, attribute(module, "eps"))
            return x_hat * attribute(module, "weight")

        return super().forward(module, host, keys, scaled, *args, **kwargs)
