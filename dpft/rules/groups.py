"""Several rows of a batch that belong to one example: a pair of answers, the texts of a user, pieces of a document.

A site reports tensors of rows. Behind it the rows of an example are laid one after the other, as if they were more of
its tokens: the gradient of a weight is a sum over both, so norms and sums need not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpft.errors import ClippingError


@dataclass(frozen=True)
class Groups:
    """Which rows belong to which example.

    Attributes:
        rows: R, the rows of the batch.
        examples: U, the examples.
        index: ``[U, k]`` int64, the rows of each example; anything where it has fewer than k.
        present: ``[U, k]`` bool, where ``index`` is a row; None if everywhere.
        in_order: the rows of an example are next to each other, k of each, in the examples' order.
        mean: the loss of an example is the mean of its rows' losses, not their sum.
    """

    rows: int
    examples: int
    index: Tensor
    present: Tensor | None
    in_order: bool
    mean: bool = False

    @property
    def most(self) -> int:
        """k: the most rows of an example."""
        return int(self.index.shape[1])

    def join(self, t: Tensor) -> Tensor:
        """``[R, T, ...]`` as ``[U, k * T, ...]``: zeros in the place of rows that an example does not have."""
        if self.in_order:
            return t.reshape(self.examples, self.most * t.shape[1], *t.shape[2:])
        found = t[self.index.to(t.device)]
        if self.present is not None:
            absent = ~self.present.to(t.device)
            found = found.masked_fill(absent.view(*absent.shape, *[1] * (found.dim() - 2)), 0)
        return found.reshape(self.examples, self.most * t.shape[1], *t.shape[2:])

    def owners(self) -> Tensor:
        """``[R]`` int64, the example of each row."""
        examples = torch.arange(self.examples).unsqueeze(1).expand(-1, self.most)
        index, present = self.index.cpu(), None if self.present is None else self.present.cpu()
        kept = (index.flatten(), examples.flatten()) if present is None else (index[present], examples[present])
        return torch.empty(self.rows, dtype=torch.long).scatter_(0, *kept)

    def total(self, losses: Tensor) -> Tensor:
        """``[R]`` losses of rows -> ``[U]``, of examples: their sums, or means."""
        sums = self.join(losses.unsqueeze(1)).sum(1)
        return sums / self.counts.to(sums.device) if self.mean else sums

    @property
    def counts(self) -> Tensor:
        """``[U]`` int64: how many rows an example has."""
        return torch.full((self.examples,), self.most) if self.present is None else self.present.sum(1)

    def loss_of(self, example: int, losses: Sequence[Tensor]) -> Tensor:
        """``[]``: the loss of one example, from the R losses of rows with a graph each."""
        own = torch.stack([losses[row] for row in self.of_example(example)])
        return own.mean() if self.mean else own.sum()

    def of_example(self, i: int) -> list[int]:
        """The rows of example ``i``."""
        kept = self.index[i] if self.present is None else self.index[i][self.present[i]]
        return [int(row) for row in kept]


def even_groups(examples: int, each: int) -> Groups:
    """``each`` rows of every example, next to each other."""
    index = torch.arange(examples * each).view(examples, each)
    return Groups(examples * each, examples, index, None, in_order=True)


def groups_of(example_ids: Tensor, rows: int) -> Groups:
    """From the number of the example of each row.

    Args:
        example_ids: ``[R]`` whole numbers 0 to U - 1, each at least once, in any order; read once, so best on the CPU.
        rows: R of the batch.

    Raises:
        ClippingError: another shape, dtype or range.
    """
    ids = example_ids.detach().cpu()
    whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if ids.shape != (rows,) or not whole or rows == 0:
        raise ClippingError(
            f"example_ids is {ids.dtype} of shape {list(ids.shape)}; expected whole numbers of shape [{rows}], the "
            "number of the example of each row"
        )
    counts = torch.bincount(ids.clamp(min=0))
    if int(ids.min()) < 0 or bool((counts == 0).any()):
        raise ClippingError(
            f"example_ids has the values {sorted(set(ids.tolist()))[:8]}; expected each of 0 to U - 1, where U is the "
            "number of examples: every example has at least one row"
        )
    order = torch.argsort(ids, stable=True)
    most = int(counts.max())
    starts = counts.cumsum(0) - counts
    place = starts.unsqueeze(1) + torch.arange(most)
    present = torch.arange(most) < counts.unsqueeze(1)
    index = order[torch.where(present, place, 0)]
    even = bool(present.all())
    in_order = even and bool((index.flatten() == torch.arange(rows)).all())
    return Groups(rows, len(counts), index, None if even else present, in_order)
