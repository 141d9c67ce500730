"""The meta twin of a model (the same modules with tensors that have shapes and no data), and patches to run it.

Running the same code on meta tensors gives its allocations and operations without a formula for any of them. A few
functions must be patched for a device without kernels: inside :func:`on_meta`, and for meta tensors only.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpft.clipping.state import ClipState
from dpft.errors import UnsupportedModuleError
from dpft.kernels import impl
from dpft.long_context.attention import NAME as LONG_ATTENTION
from dpft.rules.experts import match_experts
from dpft.wrap import LONG_CONTEXT, unwrap

__all__ = ["make_twin", "on_meta"]

_PATCHING = threading.RLock()
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_OWN_HOOKS = ("torch.", "transformers.", "peft.")


def make_twin(model: nn.Module, dtype: torch.dtype | None, checkpointing: bool | None) -> nn.Module:
    """A copy of ``model`` on the meta device, unwrapped and in training mode; no data is copied.

    The user's hooks are removed, since they could act on a step that is not real. The twin uses the fused attention
    kernel, unless the model's attention is eager.

    Args:
        model: on any device, wrapped or not. It is read, not changed.
        dtype: of the twin's floating-point parameters; None keeps theirs.
        checkpointing: on (non-reentrant), off, or None for the model's setting.

    Raises:
        UnsupportedModuleError: parameters that are not plain tensors, a model that was prepared for an engine, or one
            without gradient checkpointing.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        state = module.__dict__.get("_dpft_state")
        if isinstance(state, ClipState) and state.engine is not None:
            raise UnsupportedModuleError(
                "the model was prepared for an engine, which may have sharded it; plan before dpft.prepare, with "
                "engine= and world_size="
            )
        held = [*module._parameters.values(), *module._buffers.values(), *module.__dict__.values()]
        memo.update({id(t): _meta(t, dtype) for t in held if isinstance(t, Tensor)})
    twin = copy.deepcopy(model, memo)
    if any("_dpft_state" in module.__dict__ for module in twin.modules()):
        twin = unwrap(twin)
    for module in twin.modules():
        for name in _HOOKS:
            hooks = getattr(module, name)
            for key in [k for k, hook in hooks.items() if not _is_own(hook)]:
                del hooks[key]
    if not any(LONG_CONTEXT in module.__dict__ for module in twin.modules()):  # which has checkpointing of its own
        _set_checkpointing(twin, checkpointing)
    config: Any = getattr(twin, "config", None)
    # Another kernel needs its device.
    if getattr(config, "_attn_implementation", None) not in (None, "eager", "sdpa", LONG_ATTENTION):
        config._attn_implementation = "sdpa"
    for module in twin.modules():
        if match_experts(module) is not None:  # 'eager' looks which experts have tokens
            module.config._experts_implementation = "grouped_mm"  # type: ignore[union-attr]  # of a class that has one
    return twin.train()


def _meta(t: Tensor, dtype: torch.dtype | None) -> Tensor:
    if not isinstance(t, nn.Parameter):
        return torch.empty_like(t, device="meta", requires_grad=False)
    if type(t) is not nn.Parameter:
        raise UnsupportedModuleError(
            f"a parameter of shape {list(t.shape)} is a {type(t).__name__}; expected plain parameters. Plan before "
            "the model is quantised or sharded"
        )
    kept = dtype if dtype is not None and t.is_floating_point() else t.dtype
    twin = nn.Parameter(torch.empty_like(t, device="meta", dtype=kept), requires_grad=t.requires_grad)
    if kept == t.dtype and getattr(t, "grad_dtype", None) not in (None, kept):
        twin.grad_dtype = t.grad_dtype
    return twin


def _is_own(hook: Callable[..., Any]) -> bool:
    return f"{getattr(hook, '__module__', None)}.".startswith(_OWN_HOOKS)


def _set_checkpointing(model: nn.Module, on: bool | None) -> None:
    if on is None:
        return
    change = getattr(model, f"gradient_checkpointing_{'enable' if on else 'disable'}", None)
    if change is None:
        raise UnsupportedModuleError(
            f"checkpointing={on} was requested and {type(model).__name__} has no gradient_checkpointing_enable. Leave "
            "it None and plan the model as it is"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers renames it
        change(**({"gradient_checkpointing_kwargs": {"use_reentrant": False}} if on else {}))


def _fused_attention(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``F.scaled_dot_product_attention`` that uses a fused kernel's meta function for meta tensors.

    torch itself takes the unfused path there, which materialises ``[T, T]`` matrices that no device materialises.
    """

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if query.device.type != "meta" or (dropout_p > 0 and not impl.simulated_gpu):  # a CPU has no fused dropout
            return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        aten = torch.ops.aten
        if attn_mask is None:
            out = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)
        else:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask, 0)
            bias = attn_mask.expand(*query.shape[:3], key.shape[2])
            out = aten._scaled_dot_product_efficient_attention(
                query, key, value, bias, True, dropout_p, is_causal, scale=scale
            )
        result: Tensor = out[0]
        return result

    return attention


def _even_experts(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """transformers' product of tokens with their experts' matrices, for meta tensors with tokens spread evenly."""

    def product(input: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
        if input.device.type != "meta":
            return plain(input, weight, offs)
        tokens = torch.tensor_split(input.to(weight.dtype), len(weight))
        return torch.cat([mine @ w for mine, w in zip(tokens, weight.unbind(0), strict=True)])

    return product


def _no_histogram(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``torch.histc``, which has no function for meta tensors."""

    def histc(input: Tensor, bins: int, *args: Any, **kwargs: Any) -> Tensor:
        return input.new_empty(bins) if input.device.type == "meta" else plain(input, bins, *args, **kwargs)

    return histc


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """A context in which models on meta can run training steps. Calls on other tensors are unchanged.

    It patches fused attention; autocast, which does not support the device (it is off); transformers' detection of
    packed sequences, which reads the data (there are none); and the product of experts, which get equally many tokens.
    torch's random state is restored.
    """
    enabled, autocast, autocast_dtype = torch.is_autocast_enabled, torch.autocast, torch.get_autocast_dtype

    def is_autocast_enabled(*device: str) -> bool:
        return device != ("meta",) and enabled(*device)

    def get_autocast_dtype(device_type: str) -> torch.dtype:
        return torch.bfloat16 if device_type == "meta" else autocast_dtype(device_type)

    def autocast_or_nothing(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return contextlib.nullcontext() if device_type == "meta" else autocast(device_type, *args, **kwargs)

    masking = sys.modules.get("transformers.masking_utils")
    with _PATCHING, contextlib.ExitStack() as patches:
        patches.enter_context(torch.random.fork_rng(devices=[]))
        for owner, name, value in (
            (F, "scaled_dot_product_attention", _fused_attention(F.scaled_dot_product_attention)),
            (torch, "is_autocast_enabled", is_autocast_enabled),
            (torch, "get_autocast_dtype", get_autocast_dtype),
            (torch, "autocast", autocast_or_nothing),
        ):
            patches.enter_context(mock.patch.object(owner, name, value))
        packed = getattr(masking, "find_packed_sequence_indices", None)
        if packed is not None:

            def find_packed_sequence_indices(position_ids: Tensor) -> Any:
                return None if position_ids.device.type == "meta" else packed(position_ids)

            patches.enter_context(mock.patch.object(masking, packed.__name__, find_packed_sequence_indices))
        experts = sys.modules.get("transformers.integrations.moe")
        if experts is not None and hasattr(experts, "_grouped_mm"):
            patches.enter_context(mock.patch.object(experts, "_grouped_mm", _even_experts(experts._grouped_mm)))
            patches.enter_context(mock.patch.object(torch, "histc", _no_histogram(torch.histc)))
        yield
