"""The isolation check by gradients: whether the loss of one example has a gradient in another example's rows.

A backward is linear in the seeds of the losses. So with other seeds ``s_i``, each a power of two, which scales without
rounding, the gradient in example i's rows is ``s_i`` times what it is with unit seeds, if no other loss has a part in
it; a loss j that has one adds it ``s_j`` times. One traversal beside that of the step itself tells every ordered pair
of examples with different seeds apart.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dpft.kernels.checksums import checksum
from dpft.rules.base import MatrixUse
from dpft.rules.groups import Groups

# Range of the seeds' exponents, and of what a gradient may be beside them in float32 and bf16 (2^126).
_EXPONENTS = 60
# Kernels that add up in another order every time (attention on a GPU) differ by much less.
_TOLERANCE = 1e-3


@dataclass
class Watched:
    """Of one traversal, by parameter: :func:`checksum` of the gradients that reached its sites, summed over them."""

    sums: dict[str, Tensor] = field(default_factory=dict)

    def look(self, key: str, g: Tensor) -> None:
        """Add the gradient ``[B, ...]`` of a site."""
        found = checksum(g)
        self.sums[key] = self.sums[key] + found if key in self.sums else found


class ProbePass:
    """The traversal with other seeds: nothing is computed but :class:`Watched`.

    Args:
        seeds: ``[B]`` of the losses, see :func:`draw_seeds`.
        zeros_only: whether only the rows of zero seeds can be compared, as each traversal draws other random numbers.
    """

    weighted, probing = False, True
    groups: Groups | None = None
    row_tokens = 1

    def __init__(self, seeds: Tensor, zeros_only: bool = False) -> None:
        self.batch_size, self.seeds, self.zeros_only = len(seeds), seeds, zeros_only
        self.watched = Watched()

    def matrix(self, use: MatrixUse, x: Tensor, g: Tensor, weight: Tensor) -> None:
        self.watched.look(use.key, use.watched(g))

    def vector(self, key: str, grad: Tensor, weight: Tensor) -> None:
        self.watched.look(key, grad)


def draw_seeds(losses: Tensor, narrow: bool) -> Tensor:
    """Seeds ``[B]`` for losses ``[B]``: powers of two in random order, as far apart as they may be.

    ``narrow``: something is in float16, where powers of two overflow; then a random half of them are 0, the others 1.
    """
    order = np.random.default_rng().permutation(len(losses))
    if narrow:
        seeds = (order < len(losses) // 2).astype(np.float64)
    else:
        seeds = 2.0 ** np.floor(order % (_EXPONENTS + 1) * (_EXPONENTS / max(1, min(len(losses) - 1, _EXPONENTS))))
    return torch.from_numpy(seeds).to(losses.device, losses.dtype)


def random_states(device: torch.device) -> list[Tensor]:
    """Of torch's generators, on the host and on ``device``."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def drew_since(before: list[Tensor], device: torch.device) -> bool:
    """Whether random numbers were drawn since :func:`random_states` returned ``before``."""
    return not all(torch.equal(a, b) for a, b in zip(before, random_states(device), strict=True))


def mixed_examples(probe: ProbePass, watched: Watched) -> tuple[dict[str, Tensor], Tensor]:
    """Compares the two traversals.

    Args:
        probe: after its traversal.
        watched: by the traversal with unit seeds.

    Returns:
        For each parameter whether some example's gradient is not its own alone, and whether there was any gradient,
        each ``[]`` bool on the device. Infinity and NaN tell nothing.
    """
    mixed, reached = {}, torch.zeros((), dtype=torch.bool, device=probe.seeds.device)
    for key, found in probe.watched.sums.items():
        seeds = probe.seeds.to(found)
        alone = watched.sums[key].to(found.device) * seeds if key in watched.sums else torch.zeros_like(found)
        apart = (found - alone).abs().amax(0) > _TOLERANCE * alone[1] + seeds * 1e-30
        apart = apart & (seeds == 0) if probe.zeros_only else apart
        mixed[key] = (apart & torch.isfinite(found).all(0) & torch.isfinite(alone).all(0)).any()
        reached |= (found[1] > 0).any().to(reached.device)
    return mixed, reached
