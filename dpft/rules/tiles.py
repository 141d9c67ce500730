"""One use of a weight that is computed in tiles of tokens: an example's gradient is the sum over all of its tiles.

A tile is no use of its own. The square of a sum is not the sum of squares, so per-example gradients are added up over
the tiles of one call first, in float32 or wider, and the running pass is given the sum, once: its norm is exact, one
gradient per matrix is kept or sent, and what is released is the very sum whose norm was taken.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dpft.errors import ClippingError
from dpft.kernels.checksums import checksum
from dpft.kernels.gram import InputCache
from dpft.kernels.linear import Method, sq_norm
from dpft.kernels.weighted import RowWeights, weighted_sum_
from dpft.rules.base import MatrixUse, Pass


@dataclass(frozen=True)
class GradientUse:
    """A weight whose per-example gradients exist already: ``g [B, *weight.shape]`` float32 or wider; x is empty.

    They belong to the pass from here on, which may overwrite them.
    """

    key: str
    numel: int

    def upper_sq_norm(self, x: Tensor, g: Tensor, method: Method | None, inputs: InputCache | None = None) -> Tensor:
        return sq_norm(g)

    def grad_sq_norm(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return g, sq_norm(g)

    def add_grad(self, x: Tensor, g: Tensor, out: Tensor | None) -> Tensor:
        return g if out is None else out.add_(g)

    def weighted_grad(
        self, x: Tensor, g: Tensor, weights: RowWeights, out: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        grad = weighted_sum_(g, weights.factors, dtype, finite=weights.finite)
        return grad if out is None else out.add_(grad)

    def watched(self, g: Tensor) -> Tensor:
        return g

    def seen(self, x: Tensor, g: Tensor) -> Tensor:
        sums = checksum(g)
        return torch.cat([sums, torch.zeros_like(sums)])  # the inputs are in the gradient

    def grad_numel(self) -> int:
        return self.numel

    def rows_at(self, ids: Tensor, x: Tensor, g: Tensor, padding_idx: int | None) -> Tensor | None:
        return None


@dataclass
class _Sum:
    """Per-example gradients of one parameter, added up over tiles."""

    grad: Tensor
    weight: Tensor
    is_matrix: bool


@dataclass
class TilePass:
    """What the sites of one tiled call report to, in the place of the running pass.

    Attributes:
        running: the pass that is given the sums.
        row_tokens: tokens of a row in the running tile.
        tokens: those of all tiles so far.
    """

    running: Pass
    row_tokens: int = 0
    tokens: int = 0
    _sums: dict[tuple[str, bool], _Sum] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.batch_size, self.groups = self.running.batch_size, self.running.groups
        self.weighted, self.probing = self.running.weighted, self.running.probing

    def begin(self, tokens: int) -> None:
        """A tile of so many tokens of each row begins."""
        self.row_tokens = tokens
        self.tokens += tokens

    def matrix(self, use: MatrixUse, x: Tensor, g: Tensor, weight: Tensor) -> None:
        found = self._sums.get((use.key, True))
        if found is not None:
            found.grad = use.add_grad(x, g, found.grad)
            return
        wide = torch.promote_types(g.dtype, torch.float32)
        grad = use.add_grad(x, g, None)
        self._sums[use.key, True] = _Sum(grad.to(wide), weight, is_matrix=True)

    def vector(self, key: str, grad: Tensor, weight: Tensor) -> None:
        found = self._sums.get((key, False))
        if found is not None:
            found.grad.add_(grad)
            return
        wide = torch.promote_types(grad.dtype, torch.float32)
        self._sums[key, False] = _Sum(grad.to(wide, copy=True), weight, is_matrix=False)

    def finish(self, tokens: int) -> dict[str, Tensor]:
        """Give the running pass the sums.

        Args:
            tokens: of a row of the whole call, each of which must have been in a tile.

        Returns:
            By full name, the weighted gradients that the pass returned for autograd.

        Raises:
            ClippingError: a tile is missing, so that the norms would be too small, or the sums wrong.
        """
        if self.tokens != tokens:
            raise ClippingError(
                f"the tiles of a block had {self.tokens} of {tokens} tokens: its per-example gradients are not "
                "complete. This is an error in dpft, not in the model; use dpft.long_context(model, tile_mlp=None)."
            )
        given: dict[str, Tensor] = {}
        while self._sums:
            key, is_matrix = next(iter(self._sums))
            found = self._sums.pop((key, is_matrix))
            if is_matrix:
                use = GradientUse(key, found.grad[0].numel() if len(found.grad) else 0)
                none = found.grad.new_empty((len(found.grad), 0))
                weighted = self.running.matrix(use, none, found.grad, found.weight)
            else:
                weighted = self.running.vector(key, found.grad, found.weight)
            if weighted is not None:
                given[key] = given[key].add_(weighted) if key in given else weighted
        return given
