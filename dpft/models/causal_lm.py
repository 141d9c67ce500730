"""Specific to Hugging Face: the per-example loss of a causal LM, and the rules of its own layer classes."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dpft.errors import ClippingError
from dpft.models.head import IGNORE_INDEX, losses_of
from dpft.rules.base import Rule
from dpft.rules.experts import match_experts
from dpft.rules.linear import LinearRule
from dpft.rules.norm import ElementwiseRule
from dpft.rules.plain_parameters import TrackedRule
from dpft.rules.registry import register_matcher

_CAUSAL_LM = re.compile(r"(ForCausalLM|LMHeadModel)$")
_NORM = re.compile(r"(RMSNorm\w*|LayerNorm)$")


def per_example_causal_lm_losses(
    logits: Tensor,
    labels: Tensor | None = None,
    vocab_size: int | None = None,
    shift_labels: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    **kwargs: Any,
) -> Tensor:
    """Per-example losses: the mean cross-entropy over each example's own unmasked tokens.

    Replaces transformers' ``ForCausalLMLoss`` through ``model.loss_function``. ``num_items_in_batch`` is not
    used: dividing by the batch's number of tokens would make each example's gradient depend on the others.

    Args:
        logits: ``[B, T, V]``.
        labels: ``[B, T]``, shifted here; ``ignore_index`` where there is nothing to predict.
        vocab_size: V, as transformers passes it; not used.
        shift_labels: ``[B, T]``, labels that are shifted already.
        ignore_index: label of masked positions.
        **kwargs: whatever else transformers passes; not used.

    Returns:
        ``[B]`` float32; 0, with a zero gradient, for an example without any unmasked token.
    """
    if labels is None and shift_labels is None:
        raise ClippingError("the loss function was called without labels; expected labels [B, T]")
    if ignore_index == IGNORE_INDEX:
        losses = losses_of(logits, labels if shift_labels is None else shift_labels)
        if losses is not None:
            return losses
    if shift_labels is None:
        assert labels is not None
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.to(logits.device)
    if logits.shape[:-1] != targets.shape:
        raise ClippingError(f"logits {list(logits.shape)} do not fit labels {list(targets.shape)}")
    flat = F.cross_entropy(
        logits.float().reshape(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=ignore_index, reduction="none"
    )
    counts = (targets != ignore_index).sum(1).clamp(min=1)
    return flat.view(targets.shape).sum(1) / counts


def find_causal_lm(model: nn.Module) -> nn.Module | None:
    """The causal LM inside ``model`` (itself, or what PEFT or another container wraps), or None."""
    for module in model.modules():
        # On the class: PEFT's wrapper forwards attribute reads, but the loss is computed by the model inside.
        if hasattr(type(module), "loss_function") and (
            _CAUSAL_LM.search(type(module).__name__) or getattr(module, "loss_type", None) == "ForCausalLM"
        ):
            return module
    return None


def uses_loss_function(model: nn.Module, causal_lm: nn.Module | None) -> bool:
    """Whether the loss of ``model`` is that of ``causal_lm``'s loss function: the outermost head, which calls it."""
    outermost = next((module for module in model.modules() if hasattr(type(module), "loss_function")), None)
    if causal_lm is None or causal_lm is not outermost:
        return False
    code = getattr(inspect.unwrap(type(causal_lm).forward), "__code__", None)
    return code is not None and "loss_function" in code.co_names


def _match(module: nn.Module) -> Rule | None:
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        return LinearRule(transposed=True)
    if type(module).__name__ == "Llama4TextExperts" and type(module).__module__.startswith("transformers."):
        return TrackedRule(all_tokens=True)  # each expert multiplies all tokens, by zero those of others
    own = list(module.named_parameters(recurse=False))
    leaf = next(module.children(), None) is None
    known = type(module).__module__.startswith("transformers.")  # others may use their weight otherwise
    if known and leaf and own and _NORM.search(type(module).__name__) and all(p.dim() == 1 for _, p in own):
        return ElementwiseRule()
    return None


register_matcher(_match)
register_matcher(match_experts)
