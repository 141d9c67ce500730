"""One pass with a clip factor for each group of parameters, which is known when the group's layers had their backward.

One-pass keeps gradients, or what they are computed from, until the norm of the whole gradient is known: to the end of
the backward. Here a group's are weighted and let go as soon as its last gradient has come, while the backward goes on.
How many gradients a group gets is counted in the autograd graph beforehand; one more than that is refused, because
what it would add to is weighted already.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from dpft.clipping.clip_groups import ClipGroups
from dpft.clipping.passes import BookKeeping, KeepPass
from dpft.errors import ClippingError
from dpft.kernels.gram import InputCache
from dpft.kernels.linear import sq_norm
from dpft.kernels.weighted import RowWeights, all_finite
from dpft.rules.base import MatrixUse


class GroupwisePass(KeepPass):
    """Norms of groups, and the weighted gradients of those that are complete.

    Args:
        batch_size: B.
        device: of the norms.
        keep: as :class:`KeepPass`.
        groups: of the parameters.
        expected: how many gradients each parameter will get; empty: unknown, and all are kept to the end.
        factors: a group's squared norms ``[B]`` and its number -> the factors ``[B]`` float64 of its gradients.
        parameters: by name.
        dtype: of a parameter's weighted gradient.
        deliver: takes the weighted gradient of a parameter at once; None: :meth:`release` gives it.
    """

    def __init__(
        self,
        batch_size: int,
        device: torch.device,
        keep: Literal["smaller", "gradients"],
        groups: ClipGroups,
        expected: Counter[str],
        factors: Callable[[Tensor, int], Tensor],
        parameters: Mapping[str, nn.Parameter],
        dtype: Callable[[Tensor], torch.dtype],
        deliver: Callable[[str, Tensor], None] | None,
    ) -> None:
        super().__init__(batch_size, device, keep)
        self._clip_groups, self._members, self._factors = groups, groups.members(), factors
        self._parameters, self._dtype, self._deliver = parameters, dtype, deliver
        self._missing = [Counter({name: expected[name] for name in names}) for names in self._members]
        self._known = bool(expected)
        self._complete = [False] * len(groups)
        self._ready: dict[str, Tensor] = {}

    def holds(self) -> BookKeeping:
        """The tensors of groups that are not complete, and the weighted gradients that were not delivered."""
        held = super().holds()
        return BookKeeping(held.norms, [*held.kept, *self._ready.values()])

    def vector(self, key: str, grad: Tensor, weight: Tensor) -> None:
        self._refuse_late(key)
        super().vector(key, grad, weight)
        self._report(key)

    def matrix(self, use: MatrixUse, x: Tensor, g: Tensor, weight: Tensor) -> None:
        self._refuse_late(use.key)
        super().matrix(use, x, g, weight)
        self._report(use.key)

    def _refuse_late(self, key: str) -> None:
        if self._complete[self._clip_groups.of[key]]:
            raise ClippingError(
                f"{key!r} was given another gradient after its clip group was complete: its layer reports more often "
                "than the graph shows, and the group's norm would not bound it. Use clip_groups=None."
            )

    def _report(self, key: str) -> None:
        group = self._clip_groups.of[key]
        missing = self._missing[group]
        missing[key] -= 1
        if self._known and not any(count > 0 for count in missing.values()):
            self._end(group)

    def finish(self) -> set[str]:
        """Weight the groups that some gradient did not reach; complete :attr:`sq`. Returns the empty set."""
        for group, complete in enumerate(self._complete):
            if not complete:
                self._end(group)
        self._inputs.clear()
        return set()

    def _end(self, group: int) -> None:
        """Norm, factor and weighted gradients of a group, of which nothing else is kept."""
        self._complete[group] = True
        names = self._members[group]
        sq = torch.zeros_like(self.sq)
        for name in names:
            kept, vector = self._kept.get(name), self._vectors.get(name)
            if kept is not None and vector is not None:
                kept.add(self._vectors.pop(name))
            if kept is not None:
                kept.check()
                sq += kept.sq
            elif vector is not None:
                sq += sq_norm(vector)
        self.sq += sq
        # The scaled inputs that it remembers are scaled by this group's factors: layers of another have their own.
        factors = self._factors(sq, group)
        self._weigh(RowWeights(factors, all_finite(sq), InputCache()), [n for n in names if n in self._kept])
        for name in names:
            parameter = self._parameters[name]
            grad = super().release(name, parameter, self._dtype(parameter))
            if grad is not None and self._deliver is not None:
                self._deliver(name, grad)
            elif grad is not None:
                self._ready[name] = grad

    def release(self, key: str, weight: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The weighted gradient of one parameter; None if it was not used, or was delivered."""
        return self._ready.pop(key, None)
