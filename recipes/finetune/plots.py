"""The picture of a run: loss and epsilon over the logical steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def plot_run(
    rows: Sequence[dict[str, Any]],
    path: str | Path,
    *,
    target_epsilon: float | None,
    delta: float,
    private: bool = True,
    caption: str = "",
    loss_unit: str = "nats a token",
) -> None:
    """Draw training loss, validation loss and epsilon over the steps.

    Args:
        rows: one mapping for each measurement with ``step`` and any of ``loss``, ``validation_loss``,
            ``nonprivate_validation_loss`` and ``epsilon``. Rows without a value are left out of that
            line.
        path: PNG to write.
        target_epsilon: drawn as a line if given.
        delta: shown in the label of the axis.
        private: if False, the picture says that the run gives no privacy.
        caption: small print under the picture: model, data, hardware.
        loss_unit: of the losses.
    """
    # The Agg canvas needs no display, and a figure made without pyplot leaves nothing open.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    loss_axis, epsilon_axis = figure.subplots(1, 2)
    lines = (
        ("loss", "training, mean of a logical batch", "-", "tab:blue", "", 1),
        ("validation_loss", "validation", "--", "tab:orange", "o", 1),
        ("nonprivate_validation_loss", "validation, trained without privacy", ":", "tab:gray", "s", -1),
    )
    for key, label, style, colour, marker, side in lines:
        # Sorted, since a row of the last step is written before and after; the later value of a step stands.
        points = sorted({row["step"]: row[key] for row in rows if row.get(key) is not None}.items())
        if not points:
            continue
        loss_axis.plot(*zip(*points, strict=True), style, color=colour, marker=marker, markersize=4, label=label)
        if key == "loss":
            continue
        ends = [points[0], points[-1]] if side > 0 else points[-1:]
        for step, value in dict(ends).items():
            loss_axis.annotate(
                f"{value:.2f}",
                (step, value),
                textcoords="offset points",
                xytext=(0, 8 * side),
                ha="center",
                va="bottom" if side > 0 else "top",
                color=colour,
                fontweight="bold",
                bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
            )
    loss_axis.set(xlabel="logical steps", ylabel=f"loss [{loss_unit}]", title="Loss")
    loss_axis.margins(x=0.08, y=0.14)
    points = sorted({row["step"]: row["epsilon"] for row in rows if row.get("epsilon") is not None}.items())
    if points:
        label = "spent, rounded up between steps" if private else "spent"
        epsilon_axis.plot(*zip(*points, strict=True), color="tab:red", label=label)
    if target_epsilon is not None:
        epsilon_axis.axhline(target_epsilon, color="black", linestyle="--", linewidth=1, label="target")
    exponent = math.log10(delta)
    shown = f"10^{{{exponent:.0f}}}" if abs(exponent - round(exponent)) < 1e-9 else f"{delta:g}"
    epsilon_axis.set(
        xlabel="logical steps",
        ylabel=rf"$\varepsilon$ at $\delta = {shown}$",
        title="Privacy spent" if private else "NOT PRIVATE",
    )
    epsilon_axis.margins(x=0.08)
    if private:
        top = max([value for _, value in points] + [target_epsilon or 0, 1e-6])
        epsilon_axis.set_ylim(0, 1.12 * top)
    else:
        epsilon_axis.title.set_color("tab:red")
        epsilon_axis.text(
            0.5,
            0.5,
            "no finite epsilon:\nNOT PRIVATE",
            transform=epsilon_axis.transAxes,
            ha="center",
            va="center",
            fontsize=16,
            color="tab:red",
        )
        epsilon_axis.set_yticks([])
    for axis in (loss_axis, epsilon_axis):
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if caption:
        figure.supxlabel(caption, fontsize=6.5, color="0.3")
    figure.savefig(path, dpi=150)
