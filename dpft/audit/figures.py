"""Pictures of an audit: how the scores of members and of others are distributed, and the attack's ROC."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from dpft.audit.black_box import BlackBoxAudit
from dpft.audit.result import WhiteBoxAudit
from dpft.audit.two_worlds import TwoWorldsAudit

_MOST_THRESHOLDS = 1000  # of the ROC


def plot(audit: WhiteBoxAudit | BlackBoxAudit | TwoWorldsAudit, path: str | Path) -> None:
    """Histogram of the scores and ROC, as PNG, with what the claim allows.

    For a white-box audit that is the claimed noise around 0 and 1. For the others it is the region of
    (epsilon, delta): a true positive rate above ``exp(epsilon) FPR + delta`` refutes it.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    histogram, roc = figure.subplots(1, 2)
    white = isinstance(audit, WhiteBoxAudit)
    inside, outside = np.array(audit.members), np.array(audit.others)
    everyone = np.concatenate([inside, outside])
    bins = np.linspace(everyone.min(), everyone.max() + 1e-12, 50) if len(everyone) else np.linspace(0, 1, 2)
    for scores, label, colour in ((outside, "not in it", "tab:blue"), (inside, "in it", "tab:orange")):
        histogram.hist(scores, bins=bins, density=True, alpha=0.5, color=colour, label=f"{label} ({len(scores)})")
    histogram.set(xlabel="score of a canary", ylabel="density", title="Scores")
    rate = np.linspace(0.0, 1.0, 401)
    if isinstance(audit, WhiteBoxAudit) and audit.score_deviation > 0:
        sd = audit.score_deviation
        x = np.linspace(bins[0], bins[-1], 400)
        for mean, colour in ((0.0, "tab:blue"), (1.0, "tab:orange")):
            density = np.exp(-0.5 * ((x - mean) / sd) ** 2) / (sd * math.sqrt(2 * math.pi))
            histogram.plot(x, density, color=colour, label="claimed noise" if mean == 0 else None)
        allowed = _gaussian_roc(rate, 1.0 / sd)
    else:
        epsilon = audit.claimed["epsilon"] if isinstance(audit, WhiteBoxAudit) else audit.claimed_epsilon
        delta = audit.claimed["delta"] if isinstance(audit, WhiteBoxAudit) else audit.delta
        factor = math.exp(min(700.0, 700.0 if epsilon is None else epsilon))
        allowed = np.minimum(1.0, np.minimum(factor * rate + delta, 1 - (1 - delta - rate) / factor))
    if len(inside) and len(outside):
        thresholds = np.sort(everyone)[:: -max(1, len(everyone) // _MOST_THRESHOLDS)]
        found = [[(scores >= t).mean() for t in thresholds] for scores in (outside, inside)]
        roc.plot([0, *found[0]], [0, *found[1]], color="tab:orange", label="attack")
    roc.plot(
        rate,
        allowed,
        color="black",
        linestyle="--",
        label="with the claimed noise" if white else "the most that the claim allows",
    )
    roc.plot([0, 1], [0, 1], color="0.7", linewidth=1, label="guessing")
    roc.set(
        xlabel="false positive rate", ylabel="true positive rate", title="Attack on one release" if white else "Attack"
    )
    for axis in (histogram, roc):
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.supxlabel(_caption(audit), fontsize=7, color="0.3")
    figure.savefig(path, dpi=150)


def _gaussian_roc(rate: Any, mu: float) -> Any:
    from scipy.special import ndtr, ndtri

    return ndtr(mu + ndtri(rate))


def _caption(audit: WhiteBoxAudit | BlackBoxAudit | TwoWorldsAudit) -> str:
    if not isinstance(audit, WhiteBoxAudit):
        return audit.statement
    claimed = audit.claimed
    return (
        f"{claimed['steps']:g} releases, noise multiplier {claimed['noise_multiplier']:g}, rate "
        f"{claimed['sample_rate']:g}: claimed epsilon {claimed['epsilon']:.4g} at delta {claimed['delta']:g}; "
        f"audited: at least {audit.epsilon_lower:.4g} (95 % confidence)"
    )
