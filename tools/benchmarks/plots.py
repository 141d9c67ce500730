"""The benchmarks' plots."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def plot_steps(path: Path, report: dict[str, Any]) -> None:
    """Time and memory ratios to plain training over T, a row of axes per model and batch; what ran out as a cross."""
    import matplotlib.pyplot as plt

    groups: dict[str, list[dict[str, Any]]] = {}
    for result in report["results"]:
        if any("memory_ratio" in row for row in result["rows"]):
            groups.setdefault(group_of(result["shape"]), []).append(result)
    if not groups:
        return
    names = dict.fromkeys(row["method"] for result in report["results"] for row in result["rows"])
    colours = {name: f"C{number % 10}" for number, name in enumerate(names)}
    figure, axes = plt.subplots(len(groups), 2, figsize=(11, 3.2 * len(groups) + 0.6), squeeze=False)
    for row, (group, results) in zip(axes, groups.items(), strict=True):
        for axis, key, title in zip(row, ("time_ratio", "memory_ratio"), ("time", "memory"), strict=True):
            _draw(axis, results, key, colours)
            axis.set(xlabel="T", ylabel="x plain", xscale="log")
            axis.set_title(f"{group}: {title}", fontsize=9)
            tokens = sorted({r["shape"]["tokens"] for r in results})
            axis.set_xticks(tokens, [str(t) for t in tokens])
            axis.minorticks_off()
            axis.axhline(1.0, color="0.8", zorder=0)
    save_plot(path, figure, axes, report["conditions"])


def save_plot(path: Path, figure: Any, axes: Any, found: dict[str, Any]) -> None:
    """Give a figure one legend and its conditions, and write it whole."""
    import matplotlib.pyplot as plt

    handles = {label: h for axis in axes.flat for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
    device = found.get("gpu") or f"{found['cpu']}, {found['threads']} threads"
    commit = (found["commit"] or "unknown")[:8] + " with changes" * found["dirty"]
    figure.suptitle(f"{device}, torch {found['versions']['torch']}, commit {commit}", fontsize=9)
    figure.set_layout_engine("constrained")
    part = path.with_name(f".{os.getpid()}.{path.name}")
    figure.savefig(part, dpi=130)
    plt.close(figure)
    part.replace(path)


def group_of(shape: dict[str, Any]) -> str:
    """What stays the same on one plot over T."""
    ends = ", checkpointed" * shape["checkpointing"] + ", with the optimiser" * shape["update"]
    size = f"{shape['architecture']} {shape['width']} x {shape['layers']}, V={shape['vocab']}"
    return f"{size}, B={shape['rows']}, {shape['dtype']}{ends}"


def _draw(axis: Any, results: list[dict[str, Any]], key: str, colours: dict[str, str]) -> None:
    for method, colour in colours.items():
        points, lost = [], []
        for result in results:
            tokens = result["shape"]["tokens"]
            for row in result["rows"]:
                if row["method"] != method:
                    continue
                value = row.get(key)
                if value is not None:
                    points.append((tokens, value["median"] if isinstance(value, dict) else value))
                elif "out of memory" in row.get("reason", ""):
                    lost.append(tokens)
        if points:
            axis.plot(*zip(*sorted(points), strict=True), "o-", color=colour, label=method, markersize=4)
        for tokens in lost:
            axis.plot([tokens], [0.97], "x", color=colour, transform=axis.get_xaxis_transform(), label=method)
