"""What ranks tell each other, whatever the engine: an error of one is that of all."""

from __future__ import annotations

from typing import Any

import torch

import dpft
from dpft.engines.ranks import Ranks


def check_together(bench: Any) -> None:
    """An error on one rank is that error on all, and nobody waits."""
    ranks = Ranks(torch.device("cpu"))

    def act() -> None:
        if ranks.rank == ranks.world - 1:
            raise dpft.LedgerError("the disk is full")

    try:
        ranks.together(act)
    except dpft.LedgerError as error:
        bench.note("together", raised=str(error))
    try:
        ranks.agree({"C": 1.0 + ranks.rank, "sigma": 2.0}, "the setting")
    except dpft.EngineError as error:
        bench.note("agree", raised=str(error))
