"""Rule for ``nn.Embedding``: token, segment and learned position embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dpft.errors import ClippingError, UnsupportedModuleError
from dpft.rules.base import (
    EmbeddingUse,
    Host,
    SiteFunction,
    attribute,
    check_rows,
    forward_batch_size,
    has_rows,
    per_example,
    running_pass,
)
from dpft.rules.tracked import computed


class EmbeddingSite(SiteFunction):
    """``y = E[ids]`` with ids ``[B, ...]``; ids ``[1, ...]`` are expanded, so that the gradient has the batch too."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, w: Tensor, tap: Tensor, host: Host, use: EmbeddingUse, batch: int) -> Tensor:
        y = F.embedding(ids, w, use.padding_idx)
        if is_broadcast(ids, batch):
            # Position ids [1, T], whose embeddings the model broadcasts. A view: it takes no memory.
            y, ids = y.expand(batch, *y.shape[1:]), ids.expand(batch, *ids.shape[1:])
        ctx.save_for_backward(ids, w)
        ctx.host, ctx.use = host, use
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        ids, w = ctx.saved_tensors
        use: EmbeddingUse = ctx.use
        running = running_pass(ctx.host, use.key)
        ids2 = per_example(ids, ctx.host, use.key, feature_dims=0)
        dw = running.matrix(use, ids2, per_example(g, ctx.host, use.key), w)
        return None, dw, None, None, None, None


def is_broadcast(ids: Tensor, batch: int) -> bool:
    """Whether ids ``[1, ...]`` are shared by all ``batch`` examples."""
    return batch > 1 and ids.dim() > 1 and ids.shape[0] == 1


def embedding_site(host: Host, keys: dict[str, str], ids: Tensor, w: Tensor, padding_idx: int | None) -> Tensor:
    """Look up ``ids`` through a site node."""
    use = EmbeddingUse(keys["weight"], w.shape[0], w.shape[1], padding_idx)
    rows = host.batch_size
    shared = rows is not None and ids.dim() > 0 and not is_broadcast(ids, rows) and rows not in ids.shape
    if shared and not has_rows(host, ids.shape, use.key):
        # The same ids for all rows: positions [T], distances [T, T]. So are their embeddings, until they meet a row.
        return computed(host, [use.key], [w], lambda table: F.embedding(ids, table, padding_idx))
    if is_broadcast(ids, forward_batch_size(host, 1)) and ids.numel() >= w.shape[0]:
        # A whole table, of a prompt that all rows begin with: its gradients are as small as the output's. As a value
        # of parameters alone it keeps its shape, which the model may repeat for each row.
        return computed(host, [use.key], [w], lambda table: F.embedding(ids, table, padding_idx))
    if ids.dim() == 0 or (ids.dim() == 1 and host.batch_size is not None and host.input_dim > 1):
        raise ClippingError(
            f"{use.key!r} looks up ids of shape {list(ids.shape)} in a model whose input has {host.input_dim} "
            "dimensions, which may be one id per example or positions shared by all examples. Pass positions as "
            "[1, T], and one id per example as [B, 1]."
        )
    batch = forward_batch_size(host, ids.shape[0])
    if not is_broadcast(ids, batch):
        check_rows(host, ids.shape, use.key)
    # The cross term with a tied head needs ids [B, T]; others are handled like any shared weight.
    host.record_use(use.key, ids if ids.dim() == 2 and ids.shape[0] == batch else None)
    y: Tensor = EmbeddingSite.apply(ids, w, host.tap, host, use, batch)
    return y


class EmbeddingRule:
    """Rule of ``nn.Embedding``, ``weight [V, D]``; the ``padding_idx`` row receives no gradient."""

    covers_children = False

    def parameters(self, module: nn.Module) -> set[str]:
        for option in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(module, option, None):
                raise UnsupportedModuleError(
                    f"{type(module).__name__} has {option}={getattr(module, option)!r}, which makes the gradient of "
                    f"one example depend on others or changes the weight in the forward. Turn {option} off."
                )
        return {"weight"}

    def forward(
        self, module: nn.Module, host: Host, keys: dict[str, str], plain: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        (ids,) = (*args, *kwargs.values())
        return embedding_site(host, keys, ids, attribute(module, "weight"), attribute(module, "padding_idx"))
