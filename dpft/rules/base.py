"""The interfaces of rules, passes and the wrapped model, and the helpers that all rules share.

A *site* is one use of one module's parameters. Its autograd node computes the layer's forward as usual and, in
backward, passes ``(input, output gradient)`` to the running pass, which decides what to do with it: compute a norm,
keep it, or form the weighted sum. The node does not depend on the strategy, nor the pass on the kind of layer.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dpft.errors import ClippingError
from dpft.kernels.checksums import checksum, input_checksum
from dpft.kernels.embedding import add_embedding_grad, embedding_sq_norm, head_rows_at_tokens, weighted_embedding_grad
from dpft.kernels.gram import InputCache
from dpft.kernels.impl import Impl
from dpft.kernels.linear import (
    LOW_PRECISION_SLACK,
    Method,
    linear_grad,
    linear_grad_sq_norm,
    sq_norm,
    upper_sq_norm,
)
from dpft.kernels.weighted import RowWeights, weighted_linear_grad
from dpft.rules.groups import Groups


class MatrixUse(Protocol):
    """How one site uses a weight matrix, as arithmetic on ``x [B, T, ...]`` and ``g [B, T, d]``.

    A use of experts' matrices has ``x [N, p]`` and ``g [N, d]``, and knows of which example each row is.
    """

    @property
    def key(self) -> str:
        """Full canonical name of the weight."""
        ...

    def upper_sq_norm(self, x: Tensor, g: Tensor, method: Method | None, inputs: InputCache | None = None) -> Tensor:
        """``[B]`` float64, not below the squared norms of the gradients that :meth:`weighted_grad` sums.

        ``method`` None picks the cheapest; ``inputs`` remembers what was computed of x.
        """
        ...

    def grad_sq_norm(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Per-example gradients ``[B, *weight.shape]``, and ``[B]`` float64 squared norms of exactly these values."""
        ...

    def add_grad(self, x: Tensor, g: Tensor, out: Tensor | None) -> Tensor:
        """Per-example gradients ``[B, *weight.shape]``, added to ``out`` in place if given."""
        ...

    def weighted_grad(
        self, x: Tensor, g: Tensor, weights: RowWeights, out: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """``sum_i c_i * grad_i`` in ``weight.shape``, added to ``out`` in place if given."""
        ...

    def watched(self, g: Tensor) -> Tensor:
        """``[B, ...]`` what the isolation check compares of ``g``: it is linear in the seeds of the losses."""
        ...

    def seen(self, x: Tensor, g: Tensor) -> Tensor:
        """``[4, B]`` float64: two sums of g, two of x, that two traversals of one graph have in common."""
        ...

    def grad_numel(self) -> int:
        """Number of elements of one example's gradient."""
        ...

    def rows_at(self, ids: Tensor, x: Tensor, g: Tensor, padding_idx: int | None) -> Tensor | None:
        """``[B, T, D]`` rows of a head's per-example gradients ``[B, V, D]`` at ``ids [B, T]``; None if not a head.

        For an embedding tied to the head: the inner product of these rows with the embedding's output gradient is that
        of the two gradients of the weight.
        """
        ...


class Pass(Protocol):
    """The running backward pass; see :mod:`dpft.clipping.passes`."""

    batch_size: int
    groups: Groups | None
    """The rows of each example, where one has several; None: row i is example i."""
    row_tokens: int
    """T of the model's input, in each of its rows."""
    weighted: bool
    probing: bool
    """Whether it only looks at the gradients, for the isolation check."""

    def matrix(self, use: MatrixUse, x: Tensor, g: Tensor, weight: Tensor) -> Tensor | None:
        """Process one use of a weight matrix; returns its weighted gradient in the weighted pass, else None."""
        ...

    def vector(self, key: str, grad: Tensor, weight: Tensor) -> Tensor | None:
        """Process per-example gradients ``[B, *weight.shape]`` of a small parameter; returns as :meth:`matrix`."""
        ...


class Host(Protocol):
    """The part of the wrapped model's state that a site needs."""

    active: Pass | None
    tap: Tensor
    batch_size: int | None
    row_tokens: int
    """T: tokens of a row of the model's input; 0: unknown."""
    input_dim: int
    flattening: set[str]
    """Names of the parameters whose layers were given ``[B * T, ...]``."""
    impl: Impl
    engine: Any
    """What several processes train with; None: one process."""

    def hold(self, weight: Tensor) -> AbstractContextManager[None]:
        """A context in which a weight's values are available; an engine may have sharded them."""
        ...

    def record_use(self, key: str, ids: Tensor | None = None) -> None:
        """Record that the running forward uses a matrix, so that the backward knows tied and shared ones early."""
        ...


def running_pass(host: Host, site: str) -> Pass:
    """The running pass, or an error: a gradient that did not come through the clip boundary is not clipped."""
    if host.active is None:
        raise ClippingError(
            f"a backward pass reached {site!r} without passing through the clip boundary, so its gradient would "
            "not be clipped. Call backward on out.loss (from model(..., labels=...)) or on "
            "dpft.clipped_loss(model, losses), and on nothing else that depends on the model's outputs."
        )
    return host.active


def full_shape(parameter: Tensor) -> torch.Size:
    """The shape of the whole parameter, also where ZeRO-3 has replaced its data by an empty tensor."""
    shape: torch.Size = getattr(parameter, "ds_shape", None) or parameter.shape
    return torch.Size(shape)


def forward_batch_size(host: Host, leading: int) -> int:
    """Number of rows in a forward: of the pass that recomputes it, else of the model's call, else ``leading``."""
    if host.active is not None:
        return rows_of_pass(host.active)
    return leading if host.batch_size is None else host.batch_size


def is_whole_batch(host: Host, tokens: int) -> bool:
    """Whether ``tokens`` rows ``[B * T, ...]`` may be all of the model's input, in order; else they are a selection.

    A number that B divides is not enough: a layer for one modality's tokens may get so many by chance.
    """
    if host.active is None and host.batch_size is None:
        return True  # outside of the model's forward: its backward is refused
    running = host if host.active is None else host.active
    return tokens == forward_batch_size(host, tokens) * running.row_tokens


def rows_of_pass(running: Pass) -> int:
    """Rows of the batch: the examples, unless one has several."""
    return running.batch_size if running.groups is None else running.groups.rows


def check_rows(host: Host, lead: torch.Size, *sites: str) -> None:
    """Refuse, in a forward, a tensor of which it is not known which example each row belongs to.

    Known are ``[B, ...]`` and ``[N]``, N a multiple of B * T: the tokens of a batch laid one after the other, as
    routers, norms of heads and OPT's layers have them. That they are in the batch's order the isolation check proves,
    as any other order mixes examples. A first dimension of another size may be a selection of tokens in any order.

    Args:
        host: the wrapped model's state.
        lead: the leading dimensions of a tensor ``[*lead, features]``.
        *sites: full names of the parameters whose layer sees it.

    Raises:
        ClippingError: at once, not in the backward.
    """
    if not has_rows(host, lead, *sites):
        raise _not_the_batch(lead, known_rows(host) or 0, sites[0])


def known_rows(host: Host) -> int | None:
    """Rows of the running forward, or of the pass that recomputes it; None outside of both."""
    return host.batch_size if host.active is None else rows_of_pass(host.active)


def has_rows(host: Host, lead: torch.Size, *sites: str) -> bool:
    """Whether a tensor is one that :func:`check_rows` accepts; if it is flattened, that is noted for the backward."""
    batch = known_rows(host)
    if batch is None or batch < 2 or (lead and lead[0] == batch):
        return True  # all rows of a batch of one are its example's; an empty batch has none
    if len(lead) != 1 or lead[0] == 0 or lead[0] % batch:
        return False
    row_tokens = host.row_tokens if host.active is None else host.active.row_tokens
    if row_tokens == 0 or lead[0] % (batch * row_tokens):
        return False
    host.flattening.update(sites)
    return True


def _not_the_batch(lead: torch.Size, batch: int, site: str) -> ClippingError:
    return ClippingError(
        f"{site!r} saw a tensor of leading dimensions {list(lead)} in a batch of {batch} rows: its first dimension is "
        "not the batch, so it is not known which example a row belongs to. Keep the batch in front ([B, T, ...], not "
        "[T, B, ...] or a selection of tokens), wrap with strategy='per_example', or freeze it."
    )


def per_example(t: Tensor, host: Host, site: str, feature_dims: int = 1) -> Tensor:
    """``t`` as ``[B, T, *features]``; T counts the tokens of all rows of an example.

    Accepts what :func:`check_rows` has accepted in the forward: ``[B, ..., *features]`` and ``[N, *features]``.
    """
    running = running_pass(host, site)
    batch_size = rows_of_pass(running)
    lead, features = t.shape[: t.dim() - feature_dims], t.shape[t.dim() - feature_dims :]
    rows: Tensor | None = None
    if lead and (lead[0] == batch_size or batch_size == 1):
        tokens = lead[1:].numel() if lead[0] == batch_size else lead.numel()
        rows = t.reshape(batch_size, tokens, *features)
    elif site in host.flattening and is_flattened(lead, batch_size):
        rows = t.reshape(batch_size, lead[0] // batch_size, *features)
    if rows is not None:
        return rows if running.groups is None else running.groups.join(rows)
    raise _not_the_batch(lead, batch_size, site)


def is_flattened(lead: torch.Size, batch_size: int) -> bool:
    """Whether leading dimensions ``[N]`` may be a flattened ``[B, T]``."""
    return len(lead) == 1 and batch_size > 0 and lead[0] != batch_size and lead[0] % batch_size == 0


@dataclass(frozen=True)
class LinearUse:
    """``y = x W^T`` (``weight [d, p]``), or ``y = x W`` where ``transposed`` (``weight [p, d]``: GPT-2's Conv1D).

    ``impl`` is that of :func:`dpft.kernels.linear_sq_norm`.
    """

    key: str
    out_features: int
    in_features: int
    transposed: bool = False
    impl: Impl = "auto"

    def upper_sq_norm(self, x: Tensor, g: Tensor, method: Method | None, inputs: InputCache | None = None) -> Tensor:
        return upper_sq_norm(x, g, method, self.impl, inputs)

    def grad_sq_norm(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return linear_grad_sq_norm(*((g, x) if self.transposed else (x, g)), impl=self.impl)

    def add_grad(self, x: Tensor, g: Tensor, out: Tensor | None) -> Tensor:
        if self.transposed:
            x, g = g, x
        if out is not None and out.dtype == x.dtype == g.dtype:
            return torch.baddbmm(out, g.mT, x, out=out)
        grad = linear_grad(x, g)
        return grad if out is None else out.add_(grad)

    def weighted_grad(
        self, x: Tensor, g: Tensor, weights: RowWeights, out: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        if self.transposed:
            x, g = g, x
        grad = weighted_linear_grad(x, g, weights.factors, dtype, weights.finite, weights.inputs)
        return grad if out is None else out.add_(grad)

    def watched(self, g: Tensor) -> Tensor:
        return g

    def seen(self, x: Tensor, g: Tensor) -> Tensor:
        return torch.cat([checksum(g), input_checksum(x)])

    def grad_numel(self) -> int:
        return self.out_features * self.in_features

    def rows_at(self, ids: Tensor, x: Tensor, g: Tensor, padding_idx: int | None) -> Tensor | None:
        return None if self.transposed else head_rows_at_tokens(ids, x, g, padding_idx)


@dataclass(frozen=True)
class EmbeddingUse:
    """``y = E[ids]``, ``weight [V, D]``; here ``x`` is the ids ``[B, T]``."""

    key: str
    num_embeddings: int
    dim: int
    padding_idx: int | None = None

    def upper_sq_norm(self, x: Tensor, g: Tensor, method: Method | None, inputs: InputCache | None = None) -> Tensor:
        sq = embedding_sq_norm(x, g, self.padding_idx)
        return sq * (1 + LOW_PRECISION_SLACK) ** 2 if g.dtype.itemsize < 4 else sq

    def grad_sq_norm(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        grad = self.add_grad(x, g, None)
        return grad, sq_norm(grad)

    def add_grad(self, x: Tensor, g: Tensor, out: Tensor | None) -> Tensor:
        if out is None:
            # in bf16 every repetition of a token would be rounded
            dtype = torch.float64 if g.dtype == torch.float64 else torch.float32
            out = torch.zeros((len(x), self.num_embeddings, self.dim), dtype=dtype, device=g.device)
        return add_embedding_grad(out, x, g, self.padding_idx)

    def weighted_grad(
        self, x: Tensor, g: Tensor, weights: RowWeights, out: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        if out is None:
            sum_dtype = torch.float64 if dtype == torch.float64 else torch.float32
            out = torch.zeros((self.num_embeddings, self.dim), dtype=sum_dtype, device=g.device)
        return weighted_embedding_grad(x, g, weights.factors, out, self.padding_idx, weights.finite).to(dtype)

    def watched(self, g: Tensor) -> Tensor:
        return g

    def seen(self, x: Tensor, g: Tensor) -> Tensor:
        return torch.cat([checksum(g), input_checksum(x)])

    def grad_numel(self) -> int:
        return self.num_embeddings * self.dim

    def rows_at(self, ids: Tensor, x: Tensor, g: Tensor, padding_idx: int | None) -> Tensor | None:
        return None


def attribute(module: nn.Module, name: str) -> Any:
    """A module's attribute, typed Any: torch types every one as Tensor | Module."""
    return getattr(module, name)


class SiteFunction(torch.autograd.Function):
    """Base class of the autograd nodes between a parameter and the rest of the graph."""


class Rule(Protocol):
    """How one kind of module reports its per-example gradients to the running pass."""

    @property
    def covers_children(self) -> bool:
        """Whether the parameters of the modules inside are this rule's too, so that these get no sites."""
        ...

    def parameters(self, module: nn.Module) -> set[str]:
        """Names within the module of all its parameters, dotted for those of others inside.

        Raises:
            UnsupportedModuleError: an unsupported option.
        """
        ...

    def uses(self, module: nn.Module, keys: dict[str, str]) -> list[MatrixUse]:
        """The uses of its trainable matrices, of which ``keys`` has the names, for the choice of a strategy."""
        ...

    def forward(
        self, module: nn.Module, host: Host, keys: dict[str, str], plain: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Run the module's forward with its trainable parameters behind site nodes.

        Args:
            module: the module.
            host: the wrapped model's state.
            keys: name within the module -> full canonical name, of its trainable parameters.
            plain: the module's forward as it was before wrapping.
            *args: of the call.
            **kwargs: of the call.
        """
        ...
