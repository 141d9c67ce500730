"""A block of a model that treats tokens apart, computed in tiles of tokens.

Its intermediates, ``[T, d_ff]`` of an MLP or the float32 copies ``[T, d]`` of a norm, exist for one tile at a time:
the forward keeps the block's input alone, and the backward recomputes one tile after the other. The idea is that of
tiled MLPs in ALST (Bekman et al. 2025, arXiv 2506.13996).

One node stands for all tiles. It saves its input before anything is computed, so a checkpoint around it, which stops
its recomputation when the last tensor has been saved, does not compute a block at its end a third time. Each
parameter gets one gradient, the sum over tiles, as from one use: hooks on it fire once. In a private backward
the sites inside report to a :class:`~dpft.rules.tiles.TilePass`, which gives the running pass those sums.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dpft.clipping.coverage import check_coverage
from dpft.clipping.probe import drew_since, random_states
from dpft.clipping.state import ClipState
from dpft.errors import ClippingError
from dpft.models.sites import sites_in
from dpft.rules.base import SiteFunction, running_pass
from dpft.rules.tiles import TilePass

TileSize = int | Literal["auto"]
# Below so many tokens there is nothing to gain: products of fewer rows are slower, and what is saved is little.
LEAST_TOKENS = 256


@dataclass
class Tiles:
    """How one block is tiled; lives on its module.

    Attributes:
        size: tokens of a tile; ``"auto"`` lets a tile's intermediates be about as large as the block's input.
        cost: bytes of a token's intermediates relative to those of its input.
        members: the modules that the block consists of.
        made: shape behind ``[B, T]`` and dtype of the output, by those of the input and the dtype of autocast.
    """

    size: TileSize
    cost: float
    members: list[nn.Module]
    made: dict[Any, tuple[torch.Size, torch.dtype]] = field(default_factory=dict)

    def tokens(self, length: int) -> int:
        """Tokens of a tile of a text of ``length``."""
        if self.size != "auto":
            return self.size
        # Twice what is saved: its gradients are as large; and two more of the input's size, for what is not saved.
        return max(LEAST_TOKENS, -(-length // round(2 + 2 * self.cost)))


def run_in_tiles(tiles: Tiles, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The block's output; in tiles if it is called with one tensor ``[B, T, ...]`` that has more than one."""
    x = args[0] if len(args) == 1 and not kwargs else None
    if type(x) is not Tensor or x.dim() < 3 or not x.is_floating_point() or len(x) == 0:
        return plain(*args, **kwargs)
    if x.dim() == 4 and x.shape[1] < x.shape[2]:  # [B, H, T, D] of a norm of heads
        return run_in_tiles(tiles, lambda t: plain(t.transpose(1, 2)).transpose(1, 2), x.transpose(1, 2)).transpose(
            1, 2
        )
    step = tiles.tokens(x.shape[1])
    if x.shape[1] <= step:
        return plain(x)
    call = _Call(plain, [slice(t, min(t + step, x.shape[1])) for t in range(0, x.shape[1], step)], tiles)
    if not torch.is_grad_enabled():
        return _without_graph(call, x)
    features, dtype = call.output(x)
    y: Tensor = TiledBlock.apply(x, call.tap(), call, (*x.shape[:2], *features), dtype, *call.parameters)
    call.fill(x.detach(), y.detach())
    return y


def _without_graph(call: _Call, x: Tensor) -> Tensor:
    first = call.plain(_tile_of(x, call.spans[0]))
    y = first.new_empty((*x.shape[:2], *first.shape[2:]))
    y[:, call.spans[0]] = first
    for span in call.spans[1:]:
        y[:, span] = call.plain(_tile_of(x, span))
    return y


class TiledBlock(SiteFunction):
    """``y`` of a block for ``x [B, T, ...]``; uninitialised: :meth:`_Call.fill` fills it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, tap: Tensor | None, call: _Call, shape: Any, dtype: torch.dtype, *parameters: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.call = call
        return x.new_empty(shape, dtype=dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        dx, grads = ctx.call.backward(x, g, ctx.needs_input_grad[0])
        return dx, None, None, None, None, *grads


class _Call:
    """One call of a tiled block: what its backward needs besides the input."""

    def __init__(self, plain: Callable[[Tensor], Tensor], spans: list[slice], tiles: Tiles) -> None:
        self.plain, self.spans, self._tiles = plain, spans, tiles
        sites = sites_in(tiles.members)
        states = [state for _, state, _ in sites if state.strategy != "per_example"]
        self.host: ClipState | None = states[0] if states else None
        _refuse_gathering(self.host)
        self.names: list[str] = []
        if self.host is None:
            found = {id(p): p for m in tiles.members for p in m.parameters() if p.requires_grad}
            self.parameters: list[Tensor] = list(found.values())
        else:
            trained = {key: module.get_parameter(name) for module, _, keys in sites for name, key in keys.items()}
            self.names, self.parameters = list(trained), list(trained.values())
        self._random: list[Tensor] | None = None
        self._autocast: tuple[str, bool, torch.dtype] | None = None

    def tap(self) -> Tensor | None:
        """See :mod:`dpft.rules.base`."""
        return None if self.host is None else self.host.tap

    def output(self, x: Tensor) -> tuple[torch.Size, torch.dtype]:
        """Shape behind ``[B, T]`` and dtype of the output: from an earlier call, or from one token, computed now."""
        device = x.device.type
        enabled = torch.is_autocast_enabled(device)
        self._autocast = (device, enabled, torch.get_autocast_dtype(device))
        key = (x.shape[2:], x.dtype, self._autocast[1:])
        if key not in self._tiles.made:
            with torch.random.fork_rng(devices=[x.device] if device == "cuda" else []), torch.no_grad():
                y = self.plain(x[:, :1].detach().contiguous())
            self._tiles.made[key] = y.shape[2:], y.dtype
        return self._tiles.made[key]

    def fill(self, x: Tensor, y: Tensor) -> None:
        """Compute the output, tile by tile, in the memory of ``y``.

        In a private forward through the sites, whose graph is dropped at once: what they refuse is refused here, and
        the values have the same bits as when they are recomputed.
        """
        before = random_states(x.device)
        for span in self.spans:
            running = None if self.host is None else self.host.active
            # All tiles are one use of a weight.
            again = contextlib.nullcontext() if self.host is None or span.start == 0 else self.host.unrecorded()
            with again, self._tile(span, running), _saved_as_they_are(), torch.set_grad_enabled(self.host is not None):
                part = self.plain(_tile_of(x, span)).detach()
            y[:, span].copy_(part)
        self._random = before if drew_since(before, x.device) else None

    def backward(self, x: Tensor, g: Tensor, needs_dx: bool) -> tuple[Tensor | None, Sequence[Tensor | None]]:
        """Gradients of the input and of each parameter; in a private backward those that the running pass returns."""
        x = x.detach()
        dx = torch.empty_like(x) if needs_dx else None
        summed: list[Tensor | None] = [None] * len(self.parameters)
        tile_pass = None if self.host is None else TilePass(running_pass(self.host, self.names[0]))
        with self._as_in_forward(x.device):
            for span in self.spans:
                if tile_pass is not None:
                    tile_pass.begin(span.stop - span.start)
                with self._tile(span, tile_pass):
                    self._tile_backward(_tile_of(x, span), g[:, span], None if dx is None else dx[:, span], summed)
        if tile_pass is not None:
            given = tile_pass.finish(x.shape[1])
            return dx, [given.get(name) for name in self.names]
        return dx, [None if s is None else s.to(p.dtype) for s, p in zip(summed, self.parameters, strict=True)]

    def _tile_backward(self, x: Tensor, g: Tensor, dx: Tensor | None, summed: list[Tensor | None]) -> None:
        """Recompute one tile and its backward; ``dx`` and ``summed`` are changed in place."""
        with torch.enable_grad(), _saved_as_they_are():
            part = x.detach().requires_grad_(dx is not None)
            y = self.plain(part)
        if self.host is not None:
            sharded = self.host.engine is not None and self.host.engine.sharded
            names = None if sharded else {id(p): name for name, p in self.host.parameters.items()}
            check_coverage(y, names)
            inputs: list[Tensor] = [self.host.tap]
        else:
            inputs = self.parameters
        inputs = inputs if dx is None else [part, *inputs]
        if not inputs or not y.requires_grad:
            return
        grads: list[Tensor | None] = list(torch.autograd.grad(y, inputs, g, allow_unused=True))
        if dx is not None:
            found = grads.pop(0)
            dx.zero_() if found is None else dx.copy_(found)
        if self.host is not None:
            return
        for k, grad in enumerate(grads):
            total = summed[k]
            if grad is not None and total is None:
                summed[k] = grad.to(torch.promote_types(grad.dtype, torch.float32))
            elif grad is not None and total is not None:
                total.add_(grad)

    @contextlib.contextmanager
    def _tile(self, span: slice, running: Any) -> Iterator[None]:
        """A context in which the sites take the tile's tokens for those of their rows, and report to ``running``."""
        host = self.host
        if host is None:
            yield
            return
        before = host.active, host.row_tokens
        if running is not None and not isinstance(running, TilePass):
            running = TilePass(running, span.stop - span.start)  # a forward that is recomputed, in which none reports
        host.active = running
        host.row_tokens = span.stop - span.start if host.row_tokens else 0
        try:
            yield
        finally:
            host.active, host.row_tokens = before

    @contextlib.contextmanager
    def _as_in_forward(self, device: torch.device) -> Iterator[None]:
        """With the random numbers and the autocast of the forward. Tiles are recomputed in its order."""
        with contextlib.ExitStack() as stack:
            if self._autocast is not None:
                kind, enabled, dtype = self._autocast
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            if self._random is not None:
                stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
                torch.set_rng_state(self._random[0])
                if device.type == "cuda":
                    torch.cuda.set_rng_state(self._random[1], device)
            yield


def _refuse_gathering(host: ClipState | None) -> None:
    """Refuse tiles where every call of a layer is a collective: ranks with longer texts would make more of them.

    Raises:
        ClippingError: says what to do.
    """
    if host is not None and host.engine is not None and host.engine.gathers_by_call:
        raise ClippingError(
            "a block runs in tiles under ZeRO-3, which gathers its weights for each call of a layer, and texts of "
            "different lengths have different numbers of tiles: the ranks would wait for each other. Use FSDP2, which "
            "gathers whole layers, or dpft.long_context(model, tile_mlp=None)."
        )


def _tile_of(x: Tensor, span: slice) -> Tensor:
    """A view at B = 1; of several rows a copy, as some layers view their input as one row."""
    return x[:, span].contiguous()


def _saved_as_they_are() -> contextlib.AbstractContextManager[None]:
    """What is saved inside belongs to one tile: it is no business of a checkpoint around the block."""
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
