"""Groups of parameters that are clipped apart from each other, and the shares of the clip norm C that they get.

An example's gradient is cut into one part for each group; the part of group g is clipped to ``C_g = C w_g``, where the
squares of the shares w add up to 1. Together its clipped parts have a norm of at most ``sqrt(sum_g C_g^2) = C``: the
sensitivity of the whole sum, and so noise and accounting, are those of a clip norm C over everything (McMahan, Ramage,
Talwar, Zhang 2018, arXiv 1710.06963, "per-layer clipping"; He et al. 2023, arXiv 2212.01539, whose
"global" allocation is this one: the same noise on every coordinate).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

ClipGroupsSpec = Literal["layer"] | Mapping[str, float] | Sequence[tuple[str, float]]


@dataclass(frozen=True)
class ClipGroups:
    """The groups of one model's trainable parameters.

    Attributes:
        names: of the groups.
        shares: w, whose squares add up to 1.
        of: the number of each parameter's group, by its full canonical name. A tied weight has one name, and so one
            group with all of its uses.
    """

    names: tuple[str, ...]
    shares: tuple[float, ...]
    of: dict[str, int]

    def __len__(self) -> int:
        return len(self.names)

    def members(self) -> list[list[str]]:
        """The parameters of each group."""
        found: list[list[str]] = [[] for _ in self.names]
        for name, group in self.of.items():
            found[group].append(name)
        return found


def make_groups(spec: ClipGroupsSpec | str, parameters: Iterable[str]) -> ClipGroups:
    """The groups of a model.

    Args:
        spec: ``"layer"``: one for each module that has trainable parameters of its own, all with the same share; or
            a weight > 0 for each beginning of parameters' names, to which the share is proportional. A parameter
            belongs to the longest beginning that is its own.
        parameters: full canonical names.

    Raises:
        ValueError: another spec, a parameter without a group, or a group without a parameter.
    """
    names = list(parameters)
    weights: list[Any]  # whatever the annotation says
    if spec == "layer":
        found = [name.rpartition(".")[0] for name in names]
        labels, weights = list(dict.fromkeys(found)), [1.0] * len(set(found))
    else:
        pairs = {} if isinstance(spec, str) else dict(spec)
        labels, weights = list(pairs), list(pairs.values())
        if not pairs or not all(isinstance(w, int | float) and 0 < w < math.inf for w in weights):
            raise ValueError(
                f"clip_groups is {spec!r}; expected 'layer', or a finite weight > 0 for each beginning of "
                "parameters' names, such as {'model.embed': 1, '': 2}."
            )
        found = []
        for name in names:
            fitting = [label for label in labels if name.startswith(label)]
            if not fitting:
                raise ValueError(
                    f"clip_groups: no group has the parameter {name!r}; add its beginning, or '' for all the others."
                )
            found.append(max(fitting, key=len))
        if unused := [label for label in labels if label not in found]:
            raise ValueError(
                f"clip_groups: no trainable parameter begins with {unused[0]!r} and no longer entry, as {names[0]!r} "
                "would; its share of the clip norm would be lost. Leave it out, or correct it."
            )
    total = math.sqrt(sum(weight * weight for weight in weights))
    number = {label: i for i, label in enumerate(labels)}
    return ClipGroups(
        tuple(labels),
        tuple(weight / total for weight in weights),
        {name: number[label] for name, label in zip(names, found, strict=True)},
    )
