"""Mixture of experts: a linear map per expert, and the per-example gradients of the experts' weights.

A router sends each token to k of E experts: ``N = B * T * k`` (token, slot) pairs. Sorted by expert, and within one by
example, the pairs of one expert and one example are next to each other: a *segment*. An example's gradient of an
expert's weight is a sum over the tokens of one segment, as that of a linear layer is over the tokens of a row. So its
squared norm is the sum of those of its segments, by :mod:`dpft.kernels.linear`, with segments of similar lengths as
the rows of a batch, padded with zeros.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dpft.kernels.impl import Impl, on_gpu
from dpft.kernels.linear import (
    Method,
    edge_and_elements,
    linear_grad,
    linear_grad_sq_norm,
    rounds_inputs,
    upper_sq_norm,
)
from dpft.kernels.weighted import RowWeights, weighted_rows

# Lengths of segments are padded to 8 steps per power of two: by 6 % on average, and the Gram norms by 12 %.
_STEPS = 3


@dataclass(frozen=True, eq=False)
class Routing:
    """Where the pairs of one forward went, sorted by expert, and within one by example.

    Attributes:
        experts: E.
        examples: B.
        rows: R of the batch; several may be one example.
        order: ``[N]`` int64, the number of each sorted pair in the batch's order (row, token, slot).
        chosen: ``[N]`` int64, the expert of each sorted pair; E for pairs of none, which come last.
        bounds: ``[E * B + 1]`` int64, the first pair of each segment; that of expert e and example i is ``e * B + i``.
        owner: ``[R]`` int64, the example of each row; None: row i is example i.
    """

    experts: int
    examples: int
    rows: int
    order: Tensor
    chosen: Tensor
    bounds: Tensor
    owner: Tensor | None = None

    @property
    def pairs(self) -> int:
        """N."""
        return len(self.order)

    @functools.cached_property
    def ends(self) -> Tensor:
        """``[E]`` int32, behind the last pair of each expert."""
        return self.bounds[self.examples :: self.examples].int()

    @functools.cached_property
    def on_host(self) -> np.ndarray:
        """:attr:`bounds`, read from the device once: how many tokens an expert gets is known nowhere else.

        On a device without data, for plans: the tokens of each example spread evenly over the experts.
        """
        if self.bounds.device.type == "meta":
            return np.arange(len(self.bounds)) * self.pairs // (len(self.bounds) - 1)
        return self.bounds.cpu().numpy()

    @property
    def of_experts(self) -> list[slice]:
        """The pairs of each expert."""
        ends = self.on_host[:: max(1, self.examples)].tolist()
        return [slice(a, b) for a, b in itertools.pairwise(ends)]

    @property
    def inverse(self) -> Tensor:
        """``[N]`` int64: where each pair of the batch's order was sorted to."""
        places = torch.arange(self.pairs, device=self.order.device)
        return torch.empty_like(self.order).scatter_(0, self.order, places)

    @property
    def example_of(self) -> Tensor:
        """``[N]`` int64, the example of each sorted pair."""
        return _example_of(self.order, self.pairs, self.rows, self.owner)

    def by_row(self, t: Tensor) -> Tensor:
        """``t [N, ...]`` of sorted pairs as ``[R, pairs of a row, ...]``, in the batch's order."""
        return t[self.inverse].unflatten(0, (self.rows, self.pairs // max(1, self.rows)))

    def clear_(self, t: Tensor) -> Tensor:
        """Set the rows of ``t [N, ...]`` that are pairs of no expert to zero, whatever is in them."""
        if on_gpu(t):
            nowhere = self.chosen == self.experts
            return t.masked_fill_(nowhere.view(-1, *[1] * (t.dim() - 1)), 0)
        t[self.on_host[-1] :] = 0
        return t


def _example_of(order: Tensor, pairs: int, rows: int, owner: Tensor | None) -> Tensor:
    row = order // max(1, pairs // max(1, rows))
    return row if owner is None else owner[row]


def _bounds(chosen: Tensor, example: Tensor, experts: int, examples: int) -> Tensor:
    firsts = torch.arange(experts * examples + 1, device=chosen.device)
    return torch.searchsorted(chosen * examples + example, firsts)


def route(index: Tensor, experts: int, rows: int) -> Routing:
    """Sort the pairs of a forward.

    Args:
        index: ``[tokens, k]`` whole numbers: the experts of each token, whose rows are the batch's in order. What is
            no expert's number contributes nothing.
        experts: E.
        rows: R of the batch, which divides the tokens.
    """
    flat = index.reshape(-1).long()
    flat = torch.where((flat < 0) | (flat >= experts), experts, flat)
    chosen, order = torch.sort(flat, stable=True)  # tokens are in the order of the rows, and stay so
    example = _example_of(order, len(flat), rows, owner=None)
    return Routing(experts, rows, rows, order, chosen, _bounds(chosen, example, experts, rows))


def regroup(routing: Routing, owner: Tensor, examples: int) -> tuple[Routing, Tensor]:
    """The routing of ``examples`` that have several rows, and ``[N]``: which of the sorted pairs comes where.

    Args:
        routing: whose rows are its examples.
        owner: ``[R]`` int64, the example of each row.
        examples: their number.
    """
    example = _example_of(routing.order, routing.pairs, routing.rows, owner)
    moved = torch.argsort(routing.chosen * examples + example, stable=True)
    order, chosen, example = routing.order[moved], routing.chosen[moved], example[moved]
    bounds = _bounds(chosen, example, routing.experts, examples)
    return Routing(routing.experts, examples, routing.rows, order, chosen, bounds, owner), moved


def _is_native(x: Tensor, w: Tensor) -> bool:
    """Whether torch has one kernel for the product of all experts: on a GPU, in bf16, with aligned rows."""
    if not (x.is_cuda and x.dtype == torch.bfloat16 and hasattr(F, "grouped_mm")):
        return False
    aligned = all(t.data_ptr() % 16 == 0 for t in (x, w)) and all(n % 8 == 0 for n in w.shape[1:])
    dense = 1 in w.stride()[1:]
    return aligned and dense and torch.cuda.get_device_capability(x.device) >= (8, 0)


def grouped_product(x: Tensor, w: Tensor, routing: Routing) -> Tensor:
    """``x_n w_e [N, d]`` of ``x [N, p]`` and, of each pair's expert, ``w [E, p, d]``; zeros for pairs of none."""
    if _is_native(x, w):
        return routing.clear_(F.grouped_mm(x.contiguous(), w.to(x.dtype), offs=routing.ends))
    y = x.new_empty((len(x), w.shape[2]))
    for e, pairs in enumerate(routing.of_experts):
        torch.mm(x[pairs], w[e].to(x.dtype), out=y[pairs])
    return routing.clear_(y)


def add_bias_(y: Tensor, bias: Tensor, routing: Routing) -> Tensor:
    """Add to ``y [N, d]`` in place, of each pair's expert, ``bias [E, d]``; zeros for pairs of none."""
    y.add_(bias.to(y.dtype)[routing.chosen.clamp(max=routing.experts - 1)])
    return routing.clear_(y)


def bias_grads(g: Tensor, routing: Routing) -> Tensor:
    """Per-example gradients ``[B, E, d]`` of a bias ``[E, d]``, at least float32, of ``g [N, d]``."""
    dtype = torch.promote_types(g.dtype, torch.float32)
    rows = routing.example_of * (routing.experts + 1) + routing.chosen
    sums = torch.zeros((routing.examples * (routing.experts + 1), g.shape[1]), dtype=dtype, device=g.device)
    sums.index_add_(0, rows, g.to(dtype))
    return sums.view(routing.examples, routing.experts + 1, -1)[:, :-1]


def _padded(counts: np.ndarray) -> np.ndarray:
    """The lengths to which segments of these lengths are padded: multiples of an eighth of a power of two."""
    step = 1 << np.maximum(np.frexp(np.maximum(counts - 1, 1))[1] - 1 - _STEPS, 0)
    return -(-counts // step) * step


def segments(
    routing: Routing, x: Tensor, g: Tensor, product: bool, exact: bool = False
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Segments of similar lengths as batches: their numbers ``[S]``, ``x [S, n, p]`` and ``g [S, n, d]``.

    Each segment that is not empty comes once. Rows behind a segment's own are zeros. What is copied at a time is a
    constant number of elements; a segment of about so many comes alone, not padded and not copied.

    Args:
        routing: of the pairs.
        x: ``[N, p]``; g: ``[N, d]``.
        product: whether ``[S, d, p]`` will be made of them, which then counts too.
        exact: every segment alone.
    """
    width, elements = x.shape[1] + g.shape[1], edge_and_elements(x)[1]
    counts = np.diff(routing.on_host)
    padded = _padded(counts)
    alone = exact | (2 * counts * width > elements)
    for s in np.flatnonzero(alone & (counts > 0)).tolist():
        pairs = slice(int(routing.on_host[s]), int(routing.on_host[s + 1]))
        yield torch.full((1,), s, device=x.device), x[pairs].unsqueeze(0), g[pairs].unsqueeze(0)
    batches = []
    for n in np.unique(padded[~alone & (counts > 0)]).tolist():
        numbers = np.flatnonzero(~alone & (padded == n))
        each = max(n * width, x.shape[1] * g.shape[1] if product else 0)
        step = max(1, elements // each)
        batches += [(n, numbers[i : i + step]) for i in range(0, len(numbers), step)]
    if not batches:
        return
    on_device = torch.from_numpy(np.concatenate([numbers for _, numbers in batches])).to(x.device)
    done = 0
    for n, numbers in batches:
        which = on_device[done : done + len(numbers)]
        done += len(numbers)
        first = routing.bounds[which].unsqueeze(1)
        index = first + torch.arange(n, device=x.device)
        if (counts[numbers] == n).all():
            yield which, x[index], g[index]
            continue
        behind = index >= routing.bounds[which + 1].unsqueeze(1)
        index = torch.where(behind, first, index)
        behind = behind.unsqueeze(2)
        yield which, x[index].masked_fill_(behind, 0), g[index].masked_fill_(behind, 0)


def experts_upper_sq_norm(routing: Routing, x: Tensor, g: Tensor, method: Method | None, impl: Impl) -> Tensor:
    """``[B]`` float64, not below the squared norms of what :func:`weighted_experts_grad` sums of each example.

    The released gradient of an example is, expert by expert, a product over the tokens of a segment, as that of a
    linear layer. So the bound is the sum of those of :func:`dpft.kernels.linear.upper_sq_norm`, segment by segment.
    inf and NaN of an example affect only its own entry.
    """
    sq = torch.zeros(routing.experts * routing.examples, dtype=torch.float64, device=x.device)
    for which, xs, gs in segments(routing, x, g, product=method == "materialise"):
        sq[which] = upper_sq_norm(xs, gs, method, impl)
    return sq.view(routing.experts, routing.examples).sum(0)


def experts_grad_sq_norm(routing: Routing, x: Tensor, g: Tensor, impl: Impl) -> tuple[Tensor, Tensor]:
    """Per-example gradients ``[B, E, d, p]`` in the inputs' dtype, and ``[B]`` float64 norms of exactly these."""
    B, E = routing.examples, routing.experts
    out = x.new_zeros((B * E, g.shape[1], x.shape[1]))
    sq = torch.zeros(B * E, dtype=torch.float64, device=x.device)
    for which, xs, gs in segments(routing, x, g, product=True, exact=B == 1):
        place = which % B * E + which // B
        grad, sq[place] = linear_grad_sq_norm(xs, gs, impl=impl)
        out.index_copy_(0, place, grad)
    return out.view(B, E, *out.shape[1:]), sq.view(B, E).sum(1)


def add_experts_grad(routing: Routing, x: Tensor, g: Tensor, out: Tensor | None) -> Tensor:
    """Per-example gradients ``[B, E, d, p]``, added to ``out`` in place if given."""
    B, E = routing.examples, routing.experts
    if out is None:
        out = x.new_zeros((B, E, g.shape[1], x.shape[1]))
    flat = out.view(B * E, *out.shape[2:])
    for which, xs, gs in segments(routing, x, g, product=True, exact=B == 1):
        # Each segment comes once: nothing is added to one place by two threads.
        flat.index_add_(0, which % B * E + which // B, linear_grad(xs, gs).to(flat.dtype))
    return out


def weighted_experts_grad(routing: Routing, x: Tensor, g: Tensor, weights: RowWeights, dtype: torch.dtype) -> Tensor:
    """``sum_i c_i * grad_i``, ``[E, d, p]`` in ``dtype``, of ``x [N, p]`` and ``g [N, d]``.

    One product per expert, over the tokens of all examples, of operands one of which is scaled by its example's
    factor, with the bound on rounding of :func:`dpft.kernels.weighted.weighted_linear_grad`. A factor of zero gives
    exactly zero, even for NaN.
    """
    B = routing.examples
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    factors = weights.factors.to(wide)
    total = torch.zeros((routing.experts, g.shape[1], x.shape[1]), dtype=dtype, device=x.device)
    if rounds_inputs(x):
        # TF32 would round scaled operands otherwise than those whose norm was taken: scale the products.
        for which, xs, gs in segments(routing, x, g, product=True):
            scales = factors[which % B].view(-1, 1, 1)
            grad = linear_grad(xs, gs).mul_(scales).masked_fill_(scales == 0, 0)
            total.index_add_(0, which // B, grad.to(dtype))
        return total
    scales = factors[routing.example_of].unsqueeze(1)
    dropped = None if weights.finite else scales == 0
    for e, pairs in enumerate(routing.of_experts):
        if pairs.start < pairs.stop:
            drop = None if dropped is None else dropped[pairs]
            total[e] = weighted_rows(x[pairs], g[pairs], scales[pairs], drop)
    return total
