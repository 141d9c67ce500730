"""The backward passes that sites report to: norms only, norms and kept tensors, weighted sum.

A pass object is used for one traversal of one graph; nothing here outlives a step.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from dpft.clipping.probe import Watched
from dpft.errors import ClippingError
from dpft.kernels.checksums import checksum
from dpft.kernels.embedding import tied_cross_term
from dpft.kernels.gram import InputCache
from dpft.kernels.linear import Method, sq_norm
from dpft.kernels.weighted import RowWeights, all_finite, scale_, weighted_sum_, weighted_vector
from dpft.rules.base import EmbeddingUse, MatrixUse, full_shape
from dpft.rules.groups import Groups
from dpft.rules.head import ProductUse


def grad_dtype(weight: Tensor) -> torch.dtype:
    """The required dtype of ``weight.grad``: float32 for a bf16 weight under :class:`dpft.DPOptimizer`."""
    return getattr(weight, "grad_dtype", None) or weight.dtype


def sum_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of a clipped sum that an engine's ranks add up: at least float32."""
    return torch.promote_types(weight.dtype, torch.float32)


def _add_vector(vectors: dict[str, Tensor], key: str, grad: Tensor) -> None:
    """Add ``[B, ...]`` in at least float32: a copy, as at T = 1 it may be autograd's own, which others overwrite."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    vectors[key] = vectors[key] + grad.to(wide) if key in vectors else grad.to(wide, copy=True)


def _watch(watched: Watched | None, key: str, g: Tensor) -> None:
    """Record a site's gradient where the isolation check will compare it."""
    if watched is not None:
        watched.look(key, g)


def seen_of_vector(grad: Tensor) -> Tensor:
    """As :meth:`~dpft.rules.base.MatrixUse.seen`, ``[4, B]`` float64, for a site that keeps no input."""
    found = checksum(grad)
    return torch.cat([found, torch.zeros_like(found)])


@dataclass(frozen=True)
class BookKeeping:
    """The tensors that a private backward currently holds beyond those of a plain one.

    Attributes:
        norms: squared norms, norms and factors, ``[B]`` and smaller.
        kept: per-example gradients, or the tensors to compute them from: an input and an output gradient of a layer
            may be among them, which autograd holds as well until that layer's backward has ended.
    """

    norms: list[Tensor] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)


@dataclass
class Trace:
    """The matrices used by one forward: filled by the sites, read by the clip boundary of the forward's losses.

    Attributes:
        uses: how often each matrix was used. Only a hint: uses inside a reentrant checkpoint are not recorded.
        ids: token ids ``[B, T]`` of an embedding that was used once.
    """

    uses: Counter[str] = field(default_factory=Counter)
    ids: dict[str, Tensor] = field(default_factory=dict)


class NormPass:
    """Two-pass strategy, first traversal: per-example squared norms and nothing kept.

    A matrix used once contributes its squared norm. A tied embedding and head contribute theirs and the cross term. A
    matrix used more than once otherwise has its per-example gradients summed over the uses before squaring. Each is
    exact; a matrix found to be shared only afterwards is reported, and the traversal repeated with it in ``shared``.
    """

    weighted = probing = False
    groups: Groups | None = None
    row_tokens = 1

    def __init__(
        self, batch_size: int, device: torch.device, method: Method | None, trace: Trace, shared: set[str]
    ) -> None:
        self.batch_size, self.method = batch_size, method
        self.trace, self.shared = trace, shared
        self.sq = torch.zeros(batch_size, dtype=torch.float64, device=device)
        self.seen = torch.zeros((4, batch_size), dtype=torch.float64, device=device)
        self.order: list[str] = []  # of the parameters, as their sites reported
        self.watched: Watched | None = None
        self._vectors: dict[str, Tensor] = {}
        self._summed: dict[str, Tensor] = {}
        self._heads: dict[str, Callable[[slice], Tensor]] = {}
        self._rows: dict[str, Tensor] = {}
        self._kinds: dict[str, list[type]] = {}

    def holds(self) -> BookKeeping:
        """The tensors kept until the norms are complete."""
        kept = [*self._vectors.values(), *self._summed.values(), *self._rows.values()]
        return BookKeeping([self.sq, self.seen], kept)

    def vector(self, key: str, grad: Tensor, weight: Tensor) -> None:
        _watch(self.watched, key, grad)
        self.order.append(key)
        self.seen += seen_of_vector(grad)
        _add_vector(self._vectors, key, grad)

    def matrix(self, use: MatrixUse, x: Tensor, g: Tensor, weight: Tensor) -> None:
        _watch(self.watched, use.key, use.watched(g))
        self.order.append(use.key)
        self.seen += use.seen(x, g)
        self._kinds.setdefault(use.key, []).append(type(use))
        if use.key in self.shared:
            # Converted to float32 before adding: the sum may be smaller than the rounding errors of its terms.
            dtype = torch.promote_types(g.dtype, torch.float32)
            grad = use.add_grad(x.to(dtype) if x.is_floating_point() else x, g.to(dtype), None)
            self._summed[use.key] = self._summed[use.key].add_(grad) if use.key in self._summed else grad
            return
        self.sq += use.upper_sq_norm(x, g, self.method)
        ids = self.trace.ids.get(use.key)
        if self.groups is not None:
            return  # the ids are of rows, not of examples
        if ids is None or self.trace.uses[use.key] != 2:
            return
        # In a language model the head's backward comes first; the embedding will need rows of it, [B, T, D].
        if isinstance(use, ProductUse):
            # Those of gradients that the graph keeps in any case: a few at a time, later.
            self._heads[use.key] = functools.partial(_rows_at, use, ids, x, g)
        elif (rows := use.rows_at(ids, x, g, None)) is not None:
            self._rows[use.key] = rows
            self._heads[use.key] = functools.partial(_tokens_of, rows)
        elif (
            isinstance(use, EmbeddingUse)
            and len(self._kinds[use.key]) == 2  # the trace is only a hint: a third use would add cross terms
            and use.key in self._heads
            and x.data_ptr() == ids.data_ptr()
            and x.shape == ids.shape  # a slice of ids may have the same data_ptr
        ):
            self.sq += tied_cross_term(self._heads.pop(use.key), x, g, use.padding_idx)
            self._rows.pop(use.key, None)
            self._kinds[use.key] = [type(use)]  # both uses and their cross term are included

    def finish(self) -> set[str]:
        """Complete :attr:`sq`; returns the keys whose uses could not be combined in this traversal."""
        both = self._vectors.keys() & self._kinds.keys()  # used as a matrix, and entry by entry
        for key in both & self._summed.keys():
            self._summed[key].add_(self._vectors.pop(key))
        for grad in (*self._vectors.values(), *self._summed.values()):
            self.sq += sq_norm(grad)
        self._vectors, self._summed, self._heads, self._rows = {}, {}, {}, {}
        more = {key for key, kinds in self._kinds.items() if len(kinds) > 1} | both
        return more - self.shared


@dataclass
class _Kept:
    """One matrix in the one-pass strategy: its per-example gradients, or the pairs to compute them from."""

    sq: Tensor
    grad: Tensor | None = None
    # the use, x, g, and the version counters of x and g when their norm was computed
    pairs: list[tuple[MatrixUse, Tensor, Tensor, tuple[int, int]]] = field(default_factory=list)

    def keep(self, use: MatrixUse, x: Tensor, g: Tensor) -> None:
        self.pairs.append((use, x, g, (x._version, g._version)))

    def materialise(self) -> None:
        """Compute the per-example gradients from the pairs, which are freed."""
        self.check()
        for use, x, g, _ in self.pairs:
            self.grad = use.add_grad(x, g, self.grad)
        self.pairs = []

    def add(self, grad: Tensor) -> None:
        """Add per-example gradients ``[B, *shape]``, float32 or wider, of another kind of use."""
        self.check()
        grad = grad.contiguous()  # that of a transposed weight is transposed: the sum views it flat
        if self.grad is not None:
            grad.add_(self.grad)
        for use, x, g, _ in self.pairs:
            grad.add_(use.add_grad(x.to(grad.dtype) if x.is_floating_point() else x, g.to(grad.dtype), None))
        self.grad, self.pairs, self.sq = grad, [], sq_norm(grad)

    def check(self) -> None:
        """Raise if a kept tensor was changed in place by another operation's backward after its norm was computed."""
        for use, x, g, versions in self.pairs:
            if (x._version, g._version) != versions:
                raise ClippingError(
                    f"the input or the output gradient of the layer of {use.key!r} was changed in place by another "
                    "operation's backward after its norm was computed, so the released gradient would differ from the "
                    "one that the norm bounds. Use operations that do not change their output gradient in place, or "
                    "strategy='two_pass', which keeps neither."
                )


class KeepPass:
    """One-pass strategy: norms, and of each matrix the smaller of ``[B, d, p]`` and the pair ``(x, g)``.

    Args:
        batch_size: B.
        device: of the norms.
        keep: ``"smaller"``; ``"gradients"`` always materialises, which is classic DP-SGD.
    """

    weighted = probing = False
    groups: Groups | None = None
    row_tokens = 1

    def __init__(self, batch_size: int, device: torch.device, keep: Literal["smaller", "gradients"]) -> None:
        self.batch_size, self.keep = batch_size, keep
        self.sq = torch.zeros(batch_size, dtype=torch.float64, device=device)
        self._scaled: set[int] = set()  # tensors that are weighted already, by id; they are kept alive
        self._inputs = InputCache()
        self._weights: RowWeights | None = None
        self.watched: Watched | None = None
        self._kept: dict[str, _Kept] = {}
        self._vectors: dict[str, Tensor] = {}

    def vector(self, key: str, grad: Tensor, weight: Tensor) -> None:
        _watch(self.watched, key, grad)
        _add_vector(self._vectors, key, grad)

    def holds(self) -> BookKeeping:
        """The tensors kept until their weighted gradients are released."""
        pairs = [t for kept in self._kept.values() for _, x, g, _ in kept.pairs for t in (x, g)]
        grads = [kept.grad for kept in self._kept.values() if kept.grad is not None]
        norms = [kept.sq for kept in self._kept.values()]
        return BookKeeping([self.sq, *norms], [*self._vectors.values(), *grads, *pairs])

    def _materialise(self, use: MatrixUse, x: Tensor, g: Tensor) -> bool:
        # At B = 1 the product is the gradient itself, which will be needed anyway.
        return self.keep == "gradients" or keeps_gradient(use, self.batch_size, x, g)

    def matrix(self, use: MatrixUse, x: Tensor, g: Tensor, weight: Tensor) -> None:
        _watch(self.watched, use.key, use.watched(g))
        kept = self._kept.get(use.key)
        if kept is None and self._materialise(use, x, g):
            grad, sq = use.grad_sq_norm(x, g)
            self._kept[use.key] = _Kept(sq, grad)
        elif kept is None:
            kept = self._kept[use.key] = _Kept(use.upper_sq_norm(x, g, None, self._inputs))
            kept.keep(use, x, g)
        elif kept.grad is None and (cross := _tied_cross(kept, use, x, g)) is not None:
            kept.sq = kept.sq + use.upper_sq_norm(x, g, None) + cross
            kept.keep(use, x, g)
        else:
            # Used again: sum the gradients before squaring.
            kept.materialise()
            kept.grad = use.add_grad(x, g, kept.grad)
            kept.sq = sq_norm(kept.grad)

    def finish(self) -> set[str]:
        """Complete :attr:`sq`; returns the empty set, since all uses of a matrix were combined."""
        for key in self._vectors.keys() & self._kept.keys():
            self._kept[key].add(self._vectors.pop(key))
        for kept in self._kept.values():
            kept.check()
            self.sq += kept.sq
        for grad in self._vectors.values():
            self.sq += sq_norm(grad)
        return set()

    def scale(self, factors: Tensor) -> None:
        """Take the factors ``[B]`` float64; for a batch of one multiply the kept gradients of matrices by it in place.

        They were computed here, and nothing else refers to them. Vectors may be autograd's own gradients, and pairs
        have not been multiplied yet: both wait for :meth:`release`.
        """
        # What an example with a finite norm was multiplied from is finite: 0 * inf would have made its norm NaN.
        self._inputs.clear()
        self._weigh(RowWeights(factors, all_finite(self.sq), self._inputs), list(self._kept))

    def _weigh(self, weights: RowWeights, keys: list[str]) -> None:
        """Take the factors of some matrices."""
        self._weights = weights
        if self.batch_size != 1:
            return
        grads = [kept.grad for kept in map(self._kept.__getitem__, keys) if kept.grad is not None]
        whole = [grad for grad in grads if grad.dtype in (torch.float32, torch.float64)]
        scale_(whole, weights.factors[0], weights.finite)
        self._scaled = {id(grad) for grad in whole}

    def release(self, key: str, weight: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The weighted gradient of one parameter; frees what was kept for it. None if the parameter was not used.

        Args:
            key: full canonical name.
            weight: the parameter; the result has its shape.
            dtype: of the result.
        """
        weights = self._weights
        assert weights is not None
        vector = self._vectors.pop(key, None)
        if vector is not None:
            return weighted_vector(vector, weights.factors, weights.finite).to(dtype).view(full_shape(weight))
        kept = self._kept.pop(key, None)
        if kept is None:
            return None
        out: Tensor | None = None
        if kept.grad is not None:
            scaled = id(kept.grad) in self._scaled
            if scaled:
                return kept.grad[0].to(dtype)
            return weighted_sum_(kept.grad, weights.factors, dtype, finite=weights.finite)
        while kept.pairs:
            use, x, g, _ = kept.pairs.pop(0)  # the head first: its sum reuses the memory of its gradient
            out = use.weighted_grad(x, g, weights, out, dtype if out is None else out.dtype)
        return out


def keeps_gradient(use: MatrixUse, batch_size: int, x: Tensor, g: Tensor) -> bool:
    """Whether one-pass keeps ``[B, *weight.shape]`` rather than the pair ``(x, g)``: the smaller."""
    if isinstance(use, ProductUse):
        return False  # x is the per-example gradients already
    if batch_size == 1 and not isinstance(use, EmbeddingUse):
        return True  # an embedding's, unlike these, is mostly zeros
    pair = x.numel() * x.element_size() + g.numel() * g.element_size()
    return batch_size * use.grad_numel() * g.element_size() <= pair


def _tied_cross(kept: _Kept, use: MatrixUse, x: Tensor, g: Tensor) -> Tensor | None:
    """``[B]``, twice the inner product of a kept head's gradient and this embedding's; None if not such a pair."""
    if not (len(kept.pairs) == 1 and isinstance(use, EmbeddingUse)):
        return None
    head, h, g_head, _ = kept.pairs[0]
    if head.rows_at(x[:, :1], h, g_head, use.padding_idx) is None:
        return None
    return tied_cross_term(functools.partial(_rows_at, head, x, h, g_head), x, g, use.padding_idx)


def _rows_at(head: MatrixUse, ids: Tensor, h: Tensor, g_head: Tensor, tokens: slice) -> Tensor:
    rows = head.rows_at(ids[:, tokens], h, g_head, None)
    assert rows is not None
    return rows


def _tokens_of(rows: Tensor, tokens: slice) -> Tensor:
    return rows[:, tokens]


class WeightedPass:
    """Two-pass strategy, second traversal: every site returns its weighted gradient."""

    weighted, probing = True, False
    groups: Groups | None = None
    row_tokens = 1

    def __init__(
        self,
        weights: RowWeights,
        deliver: Callable[[str, Tensor], None] | None = None,
        parameters: Mapping[str, Tensor] | None = None,
    ) -> None:
        """``deliver``: called with the name and each weighted gradient instead of autograd; None: autograd gets them.

        ``parameters``: by name. A parameter that a site has saved may come back as another tensor without
        ``grad_dtype``: through a checkpoint or other hooks on saved tensors.
        """
        self.batch_size, self._weights, self._deliver = len(weights.factors), weights, deliver
        self._parameters = {} if parameters is None else parameters
        self.seen = torch.zeros((4, self.batch_size), dtype=torch.float64, device=weights.factors.device)

    def _hand_over(self, key: str, grad: Tensor) -> Tensor | None:
        if self._deliver is None:
            return grad
        self._deliver(key, grad)
        return None

    def _dtype(self, weight: Tensor) -> torch.dtype:
        return grad_dtype(weight) if self._deliver is None else sum_dtype(weight)

    def matrix(self, use: MatrixUse, x: Tensor, g: Tensor, weight: Tensor) -> Tensor | None:
        self.seen += use.seen(x, g)
        dtype = self._dtype(self._parameters.get(use.key, weight))
        return self._hand_over(use.key, use.weighted_grad(x, g, self._weights, None, dtype))

    def vector(self, key: str, grad: Tensor, weight: Tensor) -> Tensor | None:
        self.seen += seen_of_vector(grad)
        weight = self._parameters.get(key, weight)
        weighted = weighted_vector(grad, self._weights.factors, self._weights.finite).to(self._dtype(weight))
        return self._hand_over(key, weighted.view(full_shape(weight)))
