"""The picture of a run: loss and epsilon over the logical steps."""

from __future__ import annotations

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
) -> None:
    """Draw training loss, validation loss and epsilon over the steps.

    Args:
        rows: one mapping for each measurement with ``step`` and any of ``loss``, ``validation_loss``,
            ``nonprivate_validation_loss`` (nats a token) and ``epsilon``. Rows without a value are left out of that
            line.
        path: PNG to write.
        target_epsilon: drawn as a line if given.
        delta: shown in the label of the axis.
        private: if False, the picture says that the run gives no privacy.
        caption: small print under the picture: model, data, hardware.
    """
    # The Agg canvas needs no display, and a figure made without pyplot leaves nothing open.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    loss_axis, epsilon_axis = figure.subplots(1, 2)
    lines = (
        ("loss", "training (mean of a logical batch)", "-", "tab:blue", ""),
        ("validation_loss", "validation", "--", "tab:orange", "o"),
        ("nonprivate_validation_loss", "validation, trained without privacy", ":", "tab:gray", "s"),
    )
    for key, label, style, colour, marker in lines:
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if points:
            loss_axis.plot(*zip(*points, strict=True), style, color=colour, marker=marker, label=label)
            if key != "loss":
                for step, value in (points[0], points[-1]):
                    loss_axis.annotate(
                        f"{value:.2f}", (step, value), textcoords="offset points", xytext=(0, 7), ha="center"
                    )
    loss_axis.set(xlabel="logical steps", ylabel="loss [nats per token]", title="Loss")
    if loss_axis.get_legend_handles_labels()[0]:
        loss_axis.legend(fontsize=8)
    points = [(row["step"], row["epsilon"]) for row in rows if row.get("epsilon") is not None]
    if points:
        epsilon_axis.plot(*zip(*points, strict=True), color="tab:red", label="spent")
    if target_epsilon is not None:
        epsilon_axis.axhline(target_epsilon, color="black", linestyle="--", linewidth=1, label="target")
    epsilon_axis.set(
        xlabel="logical steps",
        ylabel=f"epsilon at delta = {delta:g}",
        title="Privacy spent" if private else "NOT PRIVATE",
    )
    epsilon_axis.set_ylim(bottom=0)
    if epsilon_axis.get_legend_handles_labels()[0]:
        epsilon_axis.legend(fontsize=8)
    for axis in (loss_axis, epsilon_axis):
        axis.grid(alpha=0.3)
        axis.margins(x=0.08)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if caption:
        figure.supxlabel(caption, fontsize=7)
    figure.savefig(path, dpi=150)
