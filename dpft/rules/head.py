"""The site of a language model's head fused with its loss: it returns per-example losses and keeps no logits.

Its forward computes the gradients together with the losses, chunk by chunk, while a chunk's logits exist
(:mod:`dpft.kernels.head`); its backward only passes them to the running pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpft.kernels.checksums import checksum
from dpft.kernels.gram import InputCache
from dpft.kernels.head import chunked_head_loss, gradient_rows_at_tokens, keeps_weight_gradient
from dpft.kernels.linear import LOW_PRECISION_SLACK, Method, sq_norm
from dpft.kernels.weighted import RowWeights, weighted_sum_
from dpft.rules.base import LinearUse, SiteFunction, running_pass


@dataclass(frozen=True)
class ProductUse:
    """A weight whose per-example gradients exist already: ``x [B, V, D]``, to be multiplied by ``g [B, 1, 1]``.

    The multiplier of an example is the gradient with respect to its loss, 1 unless the caller transformed the loss.
    """

    key: str
    out_features: int
    in_features: int

    def upper_sq_norm(self, x: Tensor, g: Tensor, method: Method | None, inputs: InputCache | None = None) -> Tensor:
        sq = sq_norm(x) * g.flatten().double().square()
        return sq * (1 + LOW_PRECISION_SLACK) ** 2 if g.dtype.itemsize < 4 else sq

    def grad_sq_norm(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return self.add_grad(x, g, None), sq_norm(x) * g.flatten().double().square()

    def add_grad(self, x: Tensor, g: Tensor, out: Tensor | None) -> Tensor:
        return x * g.to(x.dtype) if out is None else out.addcmul_(x, g.to(x.dtype))

    def weighted_grad(
        self, x: Tensor, g: Tensor, weights: RowWeights, out: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        # In place if possible: nothing reads the per-example gradients after this.
        grad = weighted_sum_(x, weights.factors, dtype, g.flatten(), weights.finite)
        return grad if out is None else out.add_(grad)

    def watched(self, g: Tensor) -> Tensor:
        return g

    def seen(self, x: Tensor, g: Tensor) -> Tensor:
        sums = checksum(g)
        return torch.cat([sums, torch.zeros_like(sums)])  # x was computed in the forward, and kept

    def grad_numel(self) -> int:
        return self.out_features * self.in_features

    def rows_at(self, ids: Tensor, x: Tensor, g: Tensor, padding_idx: int | None) -> Tensor | None:
        return gradient_rows_at_tokens(x, ids, padding_idx) * g.to(x.dtype)


@dataclass(frozen=True)
class HeadUse(LinearUse):
    """A head whose loss is computed in chunks. It keeps different tensors from those of a linear layer."""

    def kept_bytes(self, batch_size: int, seq_len: int, itemsize: int) -> int | None:
        """Bytes of per-example gradients that the forward keeps; None if it keeps ``(h, g)``, as a linear layer."""
        if not keeps_weight_gradient(seq_len, self.in_features, itemsize):
            return None
        return batch_size * self.grad_numel() * max(itemsize, 4)


@dataclass(frozen=True)
class HeadPair(LinearUse):
    """``h`` and the gradient of the logits; the multipliers ``seeds [B, 1, 1]`` of the losses are in h already."""

    seeds: Tensor | None = None

    def watched(self, g: Tensor) -> Tensor:
        assert self.seeds is not None
        return self.seeds


class HeadLossSite(SiteFunction):
    """Per-example losses ``[B]`` of ``h [B, T, D]``, ``W [V, D]`` and targets ``[B, T]``."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, w: Tensor, b: Tensor | None, tap: Tensor, site: Any) -> Tensor:
        weight, bias = w.to(h.dtype), None if b is None else b.to(h.dtype)
        with torch.autocast(h.device.type, enabled=False):
            made = chunked_head_loss(
                h,
                weight,
                bias,
                site.targets,
                site.chunk,
                need_dh=ctx.needs_input_grad[0],
                need_weight=ctx.needs_input_grad[1],
                need_bias=ctx.needs_input_grad[2],
            )
        ctx.save_for_backward(w, b, made.dh, made.weight, made.bias, made.g, None if made.g is None else h)
        ctx.site = site
        site.targets = None
        return made.losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, seeds: Tensor) -> tuple[Tensor | None, ...]:
        w, b, dh, grads, bias_grads, g, h = ctx.saved_tensors
        site, each = ctx.site, seeds.view(-1, 1, 1)
        dx = None if dh is None else dh * each.to(dh.dtype)
        dw = db = None
        if site.native:
            # Per-example strategy, or no clipping: the gradient of the sum of the losses goes to autograd as it is.
            if ctx.needs_input_grad[1]:
                each_dw = (g.mT @ h if grads is None else grads).mul_(each)
                dw = each_dw.squeeze(0) if len(each_dw) == 1 else each_dw.sum(0)
            if ctx.needs_input_grad[2]:
                db = bias_grads.mul_(seeds.unsqueeze(1)).sum(0)
            return dx, dw, db, None, None
        running = running_pass(site.host, site.keys.get("weight", site.keys.get("bias", "")))
        if "weight" in site.keys:
            vocab, dim = site.shape
            if grads is None and not running.probing:
                # The multiplier goes on h, the smaller; a probe computes no product, and must see it on the gradient.
                pair = HeadPair(site.keys["weight"], vocab, dim, impl=site.host.impl, seeds=each)
                dw = running.matrix(pair, h * each.to(h.dtype), g, w)
            else:
                dw = running.matrix(ProductUse(site.keys["weight"], vocab, dim), grads, each, w)
        if "bias" in site.keys:
            db = running.vector(site.keys["bias"], bias_grads * seeds.unsqueeze(1), b)
        return dx, dw, db, None, None
