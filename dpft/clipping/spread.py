"""One example whose tokens are spread over ranks: the parts of its gradient are summed before the norm is taken.

A rank's backward gives, for every parameter, the part of the example's gradient that comes from its own tokens (those
of other ranks' losses reach it through attention). Norms of parts say nothing about the norm of their sum, so each
gradient is reduced over the ranks of the example as soon as it is complete, of which every rank keeps 1 / S; the
squares are added up, and what was kept is clipped and goes on to its owners. It is the one-pass strategy, of one
example at a time, and sends no more than plain training does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from dpft.clipping.passes import BookKeeping, Trace, sum_dtype
from dpft.errors import ClippingError
from dpft.kernels.linear import sq_norm
from dpft.kernels.weighted import weighted_vector
from dpft.rules.base import MatrixUse, full_shape
from dpft.rules.groups import Groups

IN_FLIGHT = 2


class Spread(Protocol):
    """What the pass needs from the engine."""

    def share(self, name: str, grad: Tensor) -> Callable[[], Tensor]:
        """Sum the parts ``grad``, of the whole shape, over the ranks of the example; a function that waits for this
        rank's share ``[n]``. A collective."""
        ...

    def add_share(self, name: str, share: Tensor | None) -> None:
        """Add a clipped share to the clipped sums; None: there is none. A collective."""
        ...

    def total(self, values: Tensor) -> Tensor:
        """The sum over the ranks of the example. A collective."""
        ...

    def same_everywhere(self, words: str) -> bool:
        """Whether all ranks pass the same ``words``. A collective."""
        ...


class SpreadPass:
    """Sums the parts of one example's gradients over its ranks, and keeps this rank's shares of the sums.

    Args:
        spread: the engine's.
        trace: of the forward: a matrix that it used more than once is sent once.
        losses: ``[1]``, the rank's part of the example's loss.
        strategy: of the job.
        groups: of the job.

    Raises:
        ClippingError: several examples, or several rows of one.
    """

    weighted = probing = False
    groups: Groups | None = None
    row_tokens = 1

    def __init__(self, spread: Spread, trace: Trace, losses: Tensor, strategy: str, groups: Groups | None) -> None:
        if strategy != "one_pass" or len(losses) != 1 or groups is not None:
            raise ClippingError(
                f"under sequence parallelism a backward is one_pass, of one example of one row; got {strategy} and "
                f"{len(losses)} examples. Set max_physical_batch_size=1, and leave strategy at 'auto'."
            )
        self.batch_size = 1
        self.sq = torch.zeros(1, dtype=torch.float64, device=losses.device)
        self._spread, self._trace = spread, trace
        self._parts: dict[str, Tensor] = {}  # not complete yet
        self._sent: list[tuple[str, Callable[[], Tensor]]] = []
        self._shares: dict[str, Tensor] = {}
        self._order: list[str] = []

    def holds(self) -> BookKeeping:
        """The tensors kept until their clipped shares are released."""
        return BookKeeping([self.sq], [*self._parts.values(), *self._shares.values()])

    def vector(self, key: str, grad: Tensor, weight: Tensor) -> None:
        # A copy: at T = 1 it may be autograd's own, which others overwrite.
        self._add(key, grad[0].to(torch.promote_types(grad.dtype, torch.float32), copy=True))

    def matrix(self, use: MatrixUse, x: Tensor, g: Tensor, weight: Tensor) -> None:
        grad = use.add_grad(x, g, None)
        part = grad[0].to(sum_dtype(weight)).view(full_shape(weight))
        if self._trace.uses[use.key] == 1 and use.key not in self._parts:
            self._send(use.key, part)
        else:
            self._add(use.key, part)

    def _add(self, key: str, part: Tensor) -> None:
        held = self._parts.get(key)
        self._parts[key] = part if held is None else held + part.view(held.shape)

    def _send(self, key: str, part: Tensor) -> None:
        self._order.append(key)
        self._sent.append((key, self._spread.share(key, part)))
        while len(self._sent) > IN_FLIGHT:
            self._arrive()

    def _arrive(self) -> None:
        key, wait = self._sent.pop(0)
        share = wait()
        # Sums are linear: a second one of a matrix that the trace did not announce is added to the first.
        self._shares[key] = self._shares[key].add_(share) if key in self._shares else share

    def finish(self, parameters: Mapping[str, Tensor]) -> None:
        """Send what is left, and complete :attr:`sq`, on all ranks of the example.

        Args:
            parameters: by name.

        Raises:
            ClippingError: on all ranks: they sent other gradients, or in another order.
        """
        for key in list(self._parts):
            self._send(key, self._parts.pop(key).view(full_shape(parameters[key])))
        while self._sent:
            self._arrive()
        if not self._spread.same_everywhere("\n".join(self._order)):
            raise ClippingError(
                "the ranks used different parameters, or in a different order (layers dropped at random, a tower that "
                "only some tokens use), and the parts of an example's gradient are summed in that order. Train this "
                "model without sp_size."
            )
        for share in self._shares.values():
            self.sq += sq_norm(share.unsqueeze(0))
        self.sq = self._spread.total(self.sq)

    def release(self, factors: Tensor, names: Iterable[str]) -> None:
        """Clip the shares and add them to the clipped sums, in the order of ``names``; none is kept.

        Args:
            factors: ``[1]`` float64; of a factor 0 nothing is added, whatever is in the share.
            names: all trainable parameters.
        """
        for name in names:
            share = self._shares.pop(name, None)
            if share is not None:
                share = weighted_vector(share.unsqueeze(0), factors, False).to(share.dtype)
            self._spread.add_share(name, share)
