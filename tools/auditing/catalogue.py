"""What is audited, as it is and with each of the defects that are planted in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import dpft
from dpft.audit import TwoWorldsAudit, WhiteBoxAudit
from tools.auditing import queries, subject, whole_runs
from tools.auditing.plants import PLANTS, Plant
from tools.auditing.plants_of_mechanisms import MECHANISM_PLANTS

Audit = TwoWorldsAudit | WhiteBoxAudit


@dataclass(frozen=True)
class Subject:
    """Something that is audited.

    Attributes:
        name: on the command line.
        what: it is, in one line.
        audited: seed, steps and canaries (of white-box audits) -> what was found.
    """

    name: str
    what: str
    audited: Callable[[int, int, int], Audit]


def _steps(name: str, what: str, **changes: Any) -> Subject:
    """A white-box audit of a configuration, in a third of the steps."""

    def audited(seed: int, steps: int, canaries: int) -> WhiteBoxAudit:
        privacy = dataclasses.replace(subject.configuration(), num_steps=steps, **changes)
        return subject.audited(max(24, steps // 3), canaries, seed, privacy)

    return Subject(name, what, audited)


def _trials(audit: Callable[[int], TwoWorldsAudit]) -> Subject:
    what = (audit.__doc__ or "").partition("\n")[0].rstrip(".")
    return Subject(audit.__name__, what[0].lower() + what[1:], lambda seed, steps, canaries: audit(seed))


SUBJECTS = (
    Subject("white_box", "dpft as it is", lambda seed, steps, canaries: subject.audited(steps, canaries, seed)),
    _steps("adaptive_clip", "adaptive clip norm, step by step", adaptive_clip=dpft.AdaptiveClip()),
    _steps("layer_groups", "each layer clipped by itself, step by step", clip_groups="layer"),
    _steps(
        "bandmf_steps", "BandMF step by step", mechanism="bandmf", bands=4, sampler="cyclic_poisson", sample_rate=None
    ),
    _steps("blt_steps", "BLT step by step", mechanism="blt", buffers=3, sampler="fixed_order", sample_rate=None),
    *map(
        _trials,
        (
            whole_runs.poisson,
            whole_runs.secure,
            whole_runs.groups,
            whole_runs.by_user,
            whole_runs.user_rows,
            whole_runs.balls_and_bins,
            whole_runs.bandmf,
            whole_runs.blt,
            whole_runs.account,
            queries.private_mean,
            queries.early_stop,
            queries.tune,
        ),
    ),
)
ALL_PLANTS = (*PLANTS, *MECHANISM_PLANTS)


def find_subject(name: str) -> Subject:
    """The subject of that name.

    Raises:
        ValueError: there is none.
    """
    for found in SUBJECTS:
        if found.name == name:
            return found
    raise ValueError(f"no subject {name!r}; expected one of {', '.join(s.name for s in SUBJECTS)}")


def nothing_in(name: str) -> Plant:
    """No defect, in the subject of that name."""
    return Plant("none", find_subject(name).what, nullcontext, name)


def find_plant(name: str) -> Plant:
    """The plant of that name.

    Raises:
        ValueError: there is none.
    """
    for plant in ALL_PLANTS:
        if plant.name == name:
            return plant
    raise ValueError(f"no plant {name!r}; expected none, all, or one of {', '.join(p.name for p in ALL_PLANTS)}")


def audited(plant: Plant, seed: int, steps: int, canaries: int) -> Audit:
    """What is found in its subject while a plant is entered."""
    with plant.entered():
        return find_subject(plant.subject).audited(seed, steps, canaries)
