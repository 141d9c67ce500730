"""Rule for ``nn.Embedding``: token, segment and learned position embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dpft.errors import UnsupportedModuleError
from dpft.rules.base import (
    EmbeddingUse,
    Host,
    MatrixUse,
    SiteFunction,
    attribute,
    check_rows,
    forward_batch_size,
    full_shape,
    has_rows,
    known_rows,
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


def _same_for_all(host: Host, ids: Tensor, key: str) -> bool:
    """Whether ids are the same for all rows: positions [T], distances [T, T].

    So are their embeddings, until they meet a row. Ids ``[B]`` in a model with more dimensions are taken for positions
    of as many tokens; if they are one id of each row, the function that adds them to the rows refuses them.
    """
    rows = known_rows(host)
    if rows is None or rows == 1 or is_broadcast(ids, rows):
        return False
    if ids.dim() <= 1 and host.input_dim > 1:
        return ids.dim() == 0 or not has_rows(host, ids.shape, key) or len(ids) == rows
    return rows not in ids.shape and not has_rows(host, ids.shape, key)


def embedding_site(host: Host, keys: dict[str, str], ids: Tensor, w: Tensor, padding_idx: int | None) -> Tensor:
    """Look up ``ids`` through a site node."""
    use = EmbeddingUse(keys["weight"], w.shape[0], w.shape[1], padding_idx)
    if _same_for_all(host, ids, use.key):
        return computed(host, [use.key], [w], lambda table: F.embedding(ids, table, padding_idx))
    ids = ids.long()  # int32 is allowed, too
    whole = is_broadcast(ids, forward_batch_size(host, 1)) and ids.numel() >= w.shape[0]
    if whole and not (host.engine is not None and host.engine.sharded):  # ZeRO-3's hooks hide what a module returns
        # A whole table, of a prompt that all rows begin with: its gradients are as small as the output's. As a value
        # of parameters alone it keeps its shape, which the model may repeat for each row.
        return computed(host, [use.key], [w], lambda table: F.embedding(ids, table, padding_idx))
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

    def uses(self, module: nn.Module, keys: dict[str, str]) -> list[MatrixUse]:
        shape = full_shape(attribute(module, "weight"))
        return [EmbeddingUse(keys["weight"], shape[0], shape[1])] if "weight" in keys else []

    def forward(
        self, module: nn.Module, host: Host, keys: dict[str, str], plain: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        (ids,) = (*args, *kwargs.values())
        return embedding_site(host, keys, ids, attribute(module, "weight"), attribute(module, "padding_idx"))
