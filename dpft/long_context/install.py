"""``long_context``: installs tiles, offload and attention on a model, and takes them away again."""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dpft.errors import WrapError
from dpft.long_context.attention import replace_attention, restore_attention
from dpft.long_context.blocks import Block, checkpointed_layers, find_blocks
from dpft.long_context.offload import OffloadedCheckpoint, Offloader
from dpft.long_context.tiles import Tiles, TileSize, run_in_tiles
from dpft.wrap import LONG_CONTEXT

_TILES, _BEFORE = "_dpft_tiles", "_dpft_untiled"
# With which transformers lets the embeddings' output need a gradient when checkpointing is turned on.
_INPUT_HOOKS = ("_require_grads_hook", "_require_grads_hooks")


@dataclass
class LongContext:
    """What was installed on a model; lives on it, so that :func:`dpft.wrap` finds it.

    Attributes:
        blocks: those that run in tiles.
        layers: checkpointed layers.
        checkpointing: what each module had of transformers' attributes for it, as far as they were its own.
        inputs: the model whose checkpointing was turned on, and the hooks that its embeddings had then.
        attention: each configuration with the name of its attention.
        suspended: whether the tiles are off for the moment.
    """

    blocks: list[Block] = field(default_factory=list)
    layers: list[nn.Module] = field(default_factory=list)
    checkpointing: list[tuple[nn.Module, dict[str, Any]]] = field(default_factory=list)
    inputs: tuple[nn.Module, dict[str, Any]] | None = None
    attention: list[tuple[Any, str]] = field(default_factory=list)
    suspended: bool = True

    def suspend(self) -> None:
        """Take the tiles off: the sites of ``dpft.wrap`` go inside of them."""
        if self.suspended:
            return
        for block in reversed(self.blocks):
            _uncover(block)
        self.suspended = True

    def resume(self) -> None:
        """Put the tiles on, around whatever forward a block has by now."""
        for block in self.blocks if self.suspended else []:
            _cover(block)
        self.suspended = False


def long_context(
    model: nn.Module, tile_mlp: TileSize | None = "auto", offload_checkpoints: bool = True, off: bool = False
) -> nn.Module:
    """Let a model of transformers train on long texts, in place: plain or private, before or after ``dpft.wrap``.

    - Gradient checkpointing is turned on, non-reentrant, if it is not on.
    - MLPs, experts, norms and whatever else inside a checkpointed layer treats tokens apart run in tiles of tokens,
      recomputed one by one in the backward. That a block treats tokens apart is verified by its values, now.
    - The inputs of checkpoints wait in host memory for their backward.
    - Attention never gets a mask ``[T, T]``: padding on the right of a causal model is dropped, packed documents and
      windows are computed piece by piece. flash-attention and flex-attention are left as they are.

    Loss and gradients are those of the model without it, up to rounding. Dropout inside of tiles draws other numbers
    than without them, of the same law. Under ``dpft.wrap`` the guarantee does not change: an example's gradient is
    summed over tiles before its norm is taken, and that sum is what is clipped.

    Args:
        model: of transformers, or one of PEFT around it.
        tile_mlp: tokens of a tile; ``"auto"`` lets a tile's intermediates be about as large as one activation
            ``[B, T, d]``; None: no tiles.
        offload_checkpoints: whether checkpoints' inputs are moved to host memory; nothing to do on a CPU.
        off: undo it: everything is as it was before, and the other arguments do not matter.

    Returns:
        The same object.

    Raises:
        ValueError: a value out of range; or a model without checkpointed layers; or an attention that would need a
            mask ``[T, T]`` in any case.
        WrapError: it is on already, or, with ``off``, it is not.
    """
    found = [m for m in model.modules() if LONG_CONTEXT in m.__dict__]
    if off:
        if not found:
            raise WrapError("dpft.long_context is not on for this model: there is nothing to take off")
        for owner in found:
            _remove(owner)
        return model
    if found:
        raise WrapError("dpft.long_context is on already; call dpft.long_context(model, off=True) first")
    if not (tile_mlp in ("auto", None) or (type(tile_mlp) is int and tile_mlp > 0)):
        raise ValueError(f"tile_mlp is {tile_mlp!r}; expected a number of tokens >= 1, 'auto', or None")
    return install(model, tile_mlp, Offloader() if offload_checkpoints else None)


def install(model: nn.Module, tile_mlp: TileSize | None, offloader: Offloader | None) -> nn.Module:
    """:func:`long_context` with arguments that were checked, and with an offloader of one's own."""
    installed = LongContext()
    installed.attention = replace_attention(model)
    try:
        _turn_checkpointing_on(model, installed, offloader)
        if tile_mlp is not None:
            installed.blocks = find_blocks(model, leave=_balances_experts(model))
            for block in installed.blocks:
                made = block.owner.__dict__.setdefault(_TILES, {})
                made[block.method] = Tiles(tile_mlp, block.cost, block.members)
    except BaseException:
        _restore(installed)
        raise
    installed.resume()
    model.__dict__[LONG_CONTEXT] = installed
    return model


def _remove(owner: nn.Module) -> None:
    installed: LongContext = owner.__dict__.pop(LONG_CONTEXT)
    installed.suspend()
    _restore(installed)


def _restore(installed: LongContext) -> None:
    for block in installed.blocks:
        block.owner.__dict__.pop(_TILES, None)
    for module, before in installed.checkpointing:
        for name in ("gradient_checkpointing", "_gradient_checkpointing_func"):
            module.__dict__.pop(name, None)
        module.__dict__.update(before)
    if installed.inputs is not None:
        model, hooks = installed.inputs
        if not hooks and any(name in model.__dict__ for name in _INPUT_HOOKS):
            model.disable_input_require_grads()  # type: ignore[operator]  # a method of transformers
            for name in _INPUT_HOOKS:
                model.__dict__.pop(name, None)
        model.__dict__.update(hooks)
    restore_attention(installed.attention)


def _turn_checkpointing_on(model: nn.Module, installed: LongContext, offloader: Offloader | None) -> None:
    """Non-reentrant checkpointing in every layer, with the inputs offloaded.

    Raises:
        ValueError: the model has no layers that transformers can checkpoint, or they are checkpointed reentrantly.
    """
    installed.layers = layers = checkpointed_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no layers that transformers checkpoints (GradientCheckpointingLayer): long "
            "texts would be kept whole in every layer"
        )
    names = ("gradient_checkpointing", "_gradient_checkpointing_func")
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            installed.checkpointing.append((module, {n: module.__dict__[n] for n in names if n in module.__dict__}))
    if not any(getattr(layer, "gradient_checkpointing", False) for layer in layers):
        inner = next(m for m in model.modules() if hasattr(m, "gradient_checkpointing_enable") and not _is_peft(m))
        installed.inputs = inner, {name: inner.__dict__[name] for name in _INPUT_HOOKS if name in inner.__dict__}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # its newer name is not in all versions
            inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]  # a method of transformers
    for number, layer in enumerate(layers):
        function = getattr(layer, "_gradient_checkpointing_func", None)
        keywords = getattr(function, "keywords", None) or {}
        if keywords.get("use_reentrant", False):
            raise ValueError(
                "gradient checkpointing is reentrant: its inputs cannot be offloaded, and one-pass and two-pass would "
                "not see inside. Use gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': "
                "False}), or leave it to dpft.long_context."
            )
        if offloader is not None and function is not None:
            layer.__dict__["_gradient_checkpointing_func"] = OffloadedCheckpoint(function, offloader, number == 0)


def _is_peft(module: nn.Module) -> bool:
    return any(cls.__module__.startswith("peft.") for cls in type(module).__mro__)


def _balances_experts(model: nn.Module) -> Callable[[nn.Module], bool]:
    """Of a module, whether it is a router's that gives its logits to a loss of the model: no tile may hide them."""
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    if not getattr(text, "output_router_logits", False):
        return lambda module: False
    return lambda module: hasattr(module, "experts")


def _cover(block: Block) -> None:
    owner, method = block.owner, block.method
    before = owner.__dict__.get(method)
    if before is not None:
        owner.__dict__.setdefault(_BEFORE, {})[method] = before

    @functools.wraps(getattr(type(owner), method))
    def tiled(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        replaced = self.__dict__.get(_BEFORE, {}).get(method)
        plain = replaced if replaced is not None else types.MethodType(getattr(type(self), method), self)
        return run_in_tiles(self.__dict__[_TILES][method], plain, *args, **kwargs)

    # A bound method on the instance, so that a deep copy binds to the copy; not traced, as sites are not.
    owner.__dict__[method] = types.MethodType(torch.compiler.disable(tiled), owner)


def _uncover(block: Block) -> None:
    owner, method = block.owner, block.method
    replaced = owner.__dict__.get(_BEFORE, {}).pop(method, None)
    del owner.__dict__[method]
    if not owner.__dict__.get(_BEFORE):
        owner.__dict__.pop(_BEFORE, None)
    if replaced is not None:
        owner.__dict__[method] = replaced
