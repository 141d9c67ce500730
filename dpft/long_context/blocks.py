"""Finds the blocks of a model that treat tokens apart, by their values.

No list of classes: a module inside a checkpointed layer that takes one tensor ``[B, T, d]`` is run on random tokens,
as a whole, in parts, and with all tokens but one changed. One whose output at a token depends on that token alone is
a block; what fails, or takes other arguments, is left as it is, and what is inside of it is looked at.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dpft.models.sites import sites_in

# Relative to the largest entry. Products of another number of rows are added up in another order.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2.0**-6, torch.bfloat16: 2.0**-4}
# Enough of them for a capacity of experts to be felt.
_TOKENS = 48
# A block whose backward needs less than this beside its input, relative to that, is no better in tiles.
_LEAST_COST = 0.5
FEED_FORWARD = "feed_forward_chunk"
"""The method by which encoders of transformers compute their MLP, with the residual and the norm behind it."""


@dataclass(frozen=True)
class Block:
    """A block that can be computed in tiles.

    Attributes:
        owner: the module whose method it is.
        method: ``"forward"``, or :data:`FEED_FORWARD`.
        members: the modules that it consists of.
        cost: bytes that a token's backward needs, relative to those of the block's input.
    """

    owner: nn.Module
    method: str
    members: list[nn.Module]
    cost: float


def checkpointed_layers(model: nn.Module) -> list[nn.Module]:
    """The layers whose forward transformers runs in a checkpoint, in order."""
    return [m for m in model.modules() if _is_layer(m)]


def _is_layer(module: nn.Module) -> bool:
    return any(cls.__name__ == "GradientCheckpointingLayer" for cls in type(module).__mro__)


def find_blocks(model: nn.Module, leave: Callable[[nn.Module], bool]) -> list[Block]:
    """The blocks inside checkpointed layers, and the norms beside them, each the outermost that is one.

    Args:
        model: in any mode; neither it nor a random generator is changed.
        leave: of a module: whether it, and all inside, is left alone.
    """
    known: dict[Any, float | None] = {}
    found: list[Block] = []
    width = _width(model)
    beside: list[nn.Module] = []
    layers = checkpointed_layers(model)
    holders = [m for m in model.modules() if any(_is_layer(c) for c in m.children())]
    for parent in model.modules():
        if any(holder in list(parent.children()) for holder in holders):
            beside += [c for c in parent.children() if not any(m in holders for m in c.modules())]
    with _quiet(model):
        for layer in layers:
            _walk(layer, width, leave, known, found, inside=True)
        for module in beside:
            if not any(_is_layer(m) for m in module.modules()):
                _walk(module, width, leave, known, found, inside=False)
    unique = {(id(block.owner), block.method): block for block in found}
    return list(unique.values())


def _walk(
    module: nn.Module,
    width: int,
    leave: Callable[[nn.Module], bool],
    known: dict[Any, float | None],
    found: list[Block],
    inside: bool,
) -> None:
    """Look at a module, and, unless it is a block, at those inside of it."""
    if leave(module):
        return
    skipped: list[nn.Module] = []
    if _is_layer(module) and hasattr(module, FEED_FORWARD):
        members = [m for name, m in module.named_children() if name in ("intermediate", "output")]
        cost = _cost(module, FEED_FORWARD, members, width, known)
        if cost is not None and members:
            found.append(Block(module, FEED_FORWARD, members, cost))
            skipped = members
    elif not _is_layer(module) and _may_be_block(module, inside):
        cost = _cost(module, "forward", [module], width, known)
        if cost is not None:
            found.append(Block(module, "forward", [module], cost))
            return
    for child in module.children():
        if child not in skipped:
            _walk(child, width, leave, known, found, inside)


def _may_be_block(module: nn.Module, inside: bool) -> bool:
    """Whether there is anything to gain: not for a bare linear map, which keeps only its input."""
    if next(module.parameters(), None) is None or isinstance(module, nn.Linear | nn.Embedding | nn.ModuleList):
        return False
    own = [p for p in module._parameters.values() if p is not None]
    if any(_is_elsewhere(p) for p in module.parameters()):
        return False
    linear = len(own) > 0 and any(p.dim() > 1 for p in own)  # Conv1D of GPT-2, a quantised layer
    return not linear and (inside or _is_norm(module))


def _is_elsewhere(parameter: Tensor) -> bool:
    """Whether an engine has the parameter's values."""
    return parameter.numel() == 0 or parameter.device.type == "meta"


def _is_norm(module: nn.Module) -> bool:
    own = [p for p in module._parameters.values() if p is not None]
    return bool(own) and all(p.dim() == 1 for p in own) and next(module.children(), None) is None


def _width(model: nn.Module) -> int:
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    for name in ("hidden_size", "n_embd", "d_model", "dim"):
        if isinstance(getattr(text, name, None), int):
            return int(getattr(text, name))
    return 0


def _kind(module: nn.Module, method: str) -> Any:
    """What two modules have in common of which one check is enough."""
    parts = [(name, type(m).__qualname__) for name, m in module.named_modules()]
    shapes = [(name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in module.named_parameters()]
    return type(module), method, tuple(parts), tuple(shapes)


def _cost(
    module: nn.Module, method: str, members: list[nn.Module], width: int, known: dict[Any, float | None]
) -> float | None:
    """The cost of a block; None of what is none, or has nothing to gain."""
    kind = _kind(module, method)
    if kind not in known:
        costs = (_checked(module, method, members, shape) for shape in _shapes(module, width))
        known[kind] = next((cost for cost in costs if cost is not None), None)
        cost = known[kind]
        if cost is not None and cost < _LEAST_COST and not _is_norm(module):
            known[kind] = None
    return known[kind]


def _shapes(module: nn.Module, width: int) -> Iterator[tuple[int, ...]]:
    """Shapes behind ``[B, T]`` that an input may have."""
    features = getattr(module, "in_features", None)
    own = {p.shape[0] for p in module._parameters.values() if p is not None and p.dim() == 1}
    if isinstance(features, int):
        yield (features,)
        return
    if width and (not own or width in own):
        yield (width,)
    for size in sorted(own - {width}):
        yield (2, size)  # of several heads
        yield (size,)


def _checked(module: nn.Module, method: str, members: list[nn.Module], features: tuple[int, ...]) -> float | None:
    """What the block's backward needs, if its values say that it treats tokens apart; else None."""
    dtypes = [p.dtype for p in module.parameters() if p.dtype in _TOLERANCE] or [torch.float32]
    # Activations have the dtype of norms and biases; adapters may have another one, as quantised matrices do.
    for dtype in sorted(set(dtypes), key=lambda d: (-dtypes.count(d), d.itemsize)):
        # A module that takes other arguments may raise anything.
        with contextlib.suppress(Exception):
            return _cost_if_apart(getattr(module, method), members, features, dtype)
    return None


def _cost_if_apart(
    run: Callable[[Tensor], Tensor], members: list[nn.Module], features: tuple[int, ...], dtype: torch.dtype
) -> float | None:
    device = next(p for m in members for p in m.parameters()).device
    generator = torch.Generator().manual_seed(0)
    x, other = (torch.randn((2, _TOKENS, *features), generator=generator).to(device, dtype) for _ in range(2))
    at = _TOKENS // 3
    changed = torch.cat([other[:, :at], x[:, at : at + 1], other[:, at + 1 :]], 1)
    with torch.no_grad():
        whole, one, replaced = run(x), run(x[:, :1].contiguous()), run(changed)
        if not (_is_output(whole, x) and _is_output(one, x[:, :1]) and _is_output(replaced, x)):
            return None
        if x.dim() == 4 and not _close(whole, run(x.transpose(1, 2)).transpose(1, 2), dtype):
            return None  # heads may come before tokens: a norm of heads treats both apart
        parts = torch.cat([run(x[:, :at].contiguous()), run(x[:, at:].contiguous())], 1)
    alike = (
        _close(whole, parts, dtype)
        and _close(whole[:, :1], one, dtype)
        and _close(whole[:, at], replaced[:, at], dtype)
    )
    return _saved_bytes(run, x, members) / (x.numel() * x.element_size()) if alike else None


def _is_output(y: Any, x: Tensor) -> bool:
    return type(y) is Tensor and y.shape[:2] == x.shape[:2] and y.dim() >= 3 and y.is_floating_point()


def _close(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    size = float(a.abs().max())
    return a.shape == b.shape and float((a.double() - b.double()).abs().max()) <= _TOLERANCE[dtype] * size


def _saved_bytes(run: Callable[[Tensor], Tensor], x: Tensor, members: list[nn.Module]) -> int:
    """Bytes of the tensors that autograd saves of one call besides its input, output and parameters."""
    sizes: dict[int, int] = {}
    held: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        held.append(t)
        sizes[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    part = x.detach().requires_grad_()
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = run(part)
    known = [part, y, *(t for m in members for t in (*m.parameters(), *m.buffers()))]
    own = {t.untyped_storage()._cdata for t in known}
    return sum(size for key, size in sizes.items() if key not in own)


@contextlib.contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """In eval mode, and without a trace in the random generators."""
    training = [m for m in model.modules() if m.training]
    for module in training:
        module.training = False
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=devices))
            for state in {id(state): state for _, state, _ in sites_in([model])}.values():
                stack.enter_context(state.unrecorded())
            yield
    finally:
        for module in training:
            module.training = True
