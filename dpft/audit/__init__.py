"""An attack on what dpft claims: releases and models are compared with the privacy that was stated for them."""

from __future__ import annotations

from dpft.audit.black_box import BlackBoxAudit, Canaries, black_box, draw_canaries
from dpft.audit.figures import plot
from dpft.audit.result import WhiteBoxAudit
from dpft.audit.statistics import Check, one_run_epsilon
from dpft.audit.two_worlds import TwoWorldsAudit, two_worlds
from dpft.audit.white_box import white_box

__all__ = [
    "BlackBoxAudit",
    "Canaries",
    "Check",
    "TwoWorldsAudit",
    "WhiteBoxAudit",
    "black_box",
    "draw_canaries",
    "one_run_epsilon",
    "plot",
    "two_worlds",
    "white_box",
]
