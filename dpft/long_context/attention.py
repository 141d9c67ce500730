"""Attention without a mask ``[T, T]``.

transformers builds one wherever a batch is padded, documents are packed into a row, or a layer sees a window. Under
:func:`dpft.long_context` its attention functions and masks have an implementation of ours by name: the mask is a
:class:`Spans`, a few numbers, and the attention runs torch's fused kernel document by document, and of a window block
of queries by block of queries with the keys of its window alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

NAME = "dpft_long_context"
"""Of the implementation, in transformers' registries and a model's configuration."""
# Queries of a block: the mask of one is [block, block + window].
_BLOCKS = 256, 2048
# Rows of a mask by which a description of it is checked.
_CHECKED = 16
# Implementations whose own masks are compact.
_COMPACT = ("flash_attention", "flex_attention")
_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")


@dataclass(frozen=True)
class Spans:
    """Which keys a query sees.

    Attributes:
        causal: those before it and itself, in its document; otherwise all that are real.
        window: of those, itself and the ``window - 1`` before it; None: all.
        documents: of each row the lengths of its documents, one after the other; None: every row is one.
        real: of each row its real keys, where not all are: their number, if they come first, or their places ``[n]``.
    """

    causal: bool
    window: int | None = None
    documents: list[list[int]] | None = None
    real: list[int | Tensor] | None = None


def mask_of(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    device: Any = "cpu",
    **kwargs: Any,
) -> Any:
    """In the place of transformers' ``sdpa_mask``, with its arguments: a :class:`Spans`, or None for plain attention.

    Generation with a cache, and attention to another text, have transformers' masks.

    Raises:
        ValueError: padding in front of text that is causal; or a mask that is none of the kinds above.
    """
    if q_length != kv_length or q_length < 2 or isinstance(q_offset, Tensor) or q_offset != 0 or kv_offset != 0:
        from transformers.masking_utils import sdpa_mask

        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            device=device,
            **kwargs,
        )
    if torch.device(device).type == "meta":
        # A model without values (a plan's): all rows are full, and a mask is the same on any device.
        device, attention_mask = "cpu", None
    rows = torch.arange(batch_size, device=device).view(-1, 1, 1, 1)
    head = torch.zeros((1, 1, 1, 1), dtype=torch.long, device=device)
    at = torch.arange(q_length, device=device)

    def seen(queries: Tensor, keys: Tensor) -> Tensor:
        found = mask_function(rows, head, queries.view(1, 1, *queries.shape), keys.view(1, 1, *keys.shape))
        return found.expand(batch_size, 1, *torch.broadcast_shapes(queries.shape, keys.shape))[:, 0].bool()

    causal = not bool(seen(at[:-1, None], at[1:, None]).any())
    padding = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.bool()
    if causal:
        _refuse_left_padding(padding)
        spans = _causal(seen(at[1:, None], at[:-1, None])[:, :, 0], q_length, local_size)
    else:
        spans = Spans(False, real=None if padding is None else [_real(row) for row in padding])
    _check(spans, seen, at)
    return None if spans in (Spans(True), Spans(False)) else spans


def _causal(same: Tensor, length: int, window: int | None) -> Spans:
    """From ``same [B, T - 1]``: whether a token sees the one before it."""
    documents: list[list[int]] | None = None
    if not bool(same.all()):
        documents = []
        for row in same.cpu():
            ends = [*((~row).nonzero().flatten() + 1).tolist(), length]
            documents.append([end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)])
    longest = length if documents is None else max(max(row) for row in documents)
    return Spans(True, window if window is not None and window < longest else None, documents)


def _refuse_left_padding(padding: Tensor | None) -> None:
    if padding is not None and bool((padding[:, 1:] & ~padding[:, :-1]).any()):
        raise ValueError(
            "the attention_mask has padding before real tokens, for which dpft.long_context would need a mask [T, T]; "
            "padding on the right is seen by no token of a causal model, and dropped. Use tokenizer.padding_side = "
            "'right'"
        )


def _real(row: Tensor) -> int | Tensor:
    count = int(row.sum())
    return count if bool(row[:count].all()) else row.nonzero().flatten()


def _check(spans: Spans, seen: Callable[[Tensor, Tensor], Tensor], at: Tensor) -> None:
    """Compare some rows of the mask with their description.

    Raises:
        ValueError: it is another mask.
    """
    length = len(at)
    queries = torch.linspace(0, length - 1, min(length, _CHECKED), device=at.device).round().long()
    found = seen(queries[:, None], at[None, :])
    expected = torch.ones_like(found)
    if spans.causal:
        distance = queries[:, None] - at[None, :]
        expected &= distance >= 0
        if spans.window is not None:
            expected &= distance < spans.window
        for row, lengths in zip(expected, spans.documents or [], strict=False):
            number = torch.repeat_interleave(torch.tensor(lengths)).to(at.device)
            row &= number[queries][:, None] == number[None, :]
    if not torch.equal(found, expected):
        raise ValueError(
            "a layer's attention mask is neither causal with documents or a window, nor all tokens of a text: it "
            "would have [T, T] entries. Use one with compact masks (attn_implementation='flex_attention' or "
            "'flash_attention_2'), or train without dpft.long_context"
        )


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """In the place of transformers' ``sdpa_attention_forward``, which computes each piece.

    Args:
        module: the attention layer.
        query: ``[B, H, T, D]``; key and value: ``[B, H', T, D]``.
        attention_mask: a :class:`Spans`; anything else goes to transformers' function as it is.
        dropout: probability.
        scaling: of the scores.
        is_causal: of transformers.
        **kwargs: of transformers.

    Returns:
        ``[B, T, H, D]``, and None.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if not isinstance(attention_mask, Spans):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
    if kwargs.get("position_bias") is not None or query.shape[2] != key.shape[2]:
        raise ValueError("a position bias, or keys of another text, would need a mask [T, T] in dpft.long_context")
    spans = attention_mask

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        causal = spans.causal and mask is None
        found: Tensor = sdpa_attention_forward(module, q, k, v, mask, dropout, scaling, is_causal=causal, **kwargs)[0]
        return found

    whole = [[query.shape[2]]] * len(query)
    documents = whole if spans.documents is None else spans.documents
    if spans.real is None and all(lengths == documents[0] for lengths in documents):
        return _row(run, query, key, value, documents[0], spans.window), None
    real = [None] * len(query) if spans.real is None else spans.real
    rows = zip(query.split(1), key.split(1), value.split(1), documents, real, strict=True)
    outputs = []
    for q, k, v, lengths, keys in rows:
        # Queries at padding see the real keys, too, as in transformers; where no key is real they see all.
        if isinstance(keys, Tensor) and len(keys):
            k, v = (t.index_select(2, keys) for t in (k, v))
        elif isinstance(keys, int) and keys:
            k, v = k[:, :, :keys], v[:, :, :keys]
        outputs.append(run(q, k, v) if not spans.causal else _row(run, q, k, v, lengths, spans.window))
    return torch.cat(outputs), None


def _row(
    run: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, lengths: list[int], window: int | None
) -> Tensor:
    """``[B, T, H, D]`` of rows with documents of these lengths."""
    # One node splits them all: its backward is one concatenation, and not a [T] of zeros for each piece.
    pieces = zip(*(t.split(lengths, 2) for t in (q, k, v)), strict=True)
    outputs = [_document(run, q_part, k_part, v_part, window) for q_part, k_part, v_part in pieces]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


def _document(run: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    length = q.shape[2]
    if window is None or window >= length:
        return run(q, k, v)
    size = max(_BLOCKS[0], min(_BLOCKS[1], window))
    before = -(-(window - 1) // size)  # blocks of keys before the queries' own
    blocks = [list(t.split(size, 2)) for t in (q, k, v)]
    outputs = []
    for i, queries in enumerate(blocks[0]):
        first = max(0, i - before)
        keys, values = (torch.cat(of[first : i + 1], 2) if first < i else of[i] for of in blocks[1:])
        at = torch.arange(keys.shape[2], device=q.device)
        distance = at[-queries.shape[2] :, None] - at[None, :]
        outputs.append(run(queries, keys, values, ((distance >= 0) & (distance < window))[None, None]))
    return torch.cat(outputs, 1)


def replace_attention(model: nn.Module) -> list[tuple[Any, str]]:
    """Let the model's configurations name our attention where they name one that would build masks ``[T, T]``.

    Returns:
        For :func:`restore_attention`.

    Raises:
        ValueError: an attention that cannot be computed by the fused kernel.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before: list[tuple[Any, str]] = []
    for module in model.modules():
        config = getattr(module, "config", None)
        name = getattr(config, "_attn_implementation_internal", None)
        if not hasattr(module, "_can_set_attn_implementation") or any(config is known for known, _ in before):
            continue
        if not isinstance(name, str) or name == NAME or any(kind in name for kind in _COMPACT):
            continue
        if name == "eager":
            _refuse_eager(module)
        elif name != "sdpa" or not module._can_set_attn_implementation():  # type: ignore[operator]  # a method of transformers
            continue
        before.append((config, name))
    if before:
        ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, mask_of)
    for config, _ in before:
        config._attn_implementation_internal = NAME
    return before


def restore_attention(before: list[tuple[Any, str]]) -> None:
    """Undo :func:`replace_attention`."""
    for config, name in before:
        config._attn_implementation_internal = name


def _refuse_eager(module: nn.Module) -> None:
    config: Any = module.config
    reasons = []
    if not (getattr(module, "_supports_sdpa", False) and module._can_set_attn_implementation()):  # type: ignore[operator]  # a method of transformers
        reasons.append("the model does not support sdpa")
    if getattr(config, "attn_logit_softcapping", None) is not None:
        reasons.append("its scores are capped")
    if any(name.rpartition(".")[2] == "sinks" for name, _ in module.named_parameters()):
        reasons.append("it has attention sinks")
    if any(getattr(config, name, 0.0) for name in _DROPOUTS):
        reasons.append("it drops scores at random")
    if reasons:
        raise ValueError(
            f"{type(module).__name__} has attention 'eager', which needs [T, T] scores, and the fused kernel cannot "
            f"take its place: {', '.join(reasons)}. Load it with attn_implementation='flash_attention_2' or "
            "'flex_attention', if it supports one of them"
        )
