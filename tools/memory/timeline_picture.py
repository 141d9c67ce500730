"""The memory profiler's picture of memory over a step: a panel for each experiment."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from tools.memory.components import TITLES
from tools.memory.derived import Results, why_not
from tools.memory.picture_style import COLOURS, SMALL, VISIBLE, caption, legend, method_colours
from tools.memory.units import Unit, grouped, unit_for

POINTS = 2000
# The line of host memory, which is in no total.
HOST = "#8a2be2"


def _thinned(points: list[list[float]]) -> Any:
    """At most about 2000 instants: of each stretch of time the highest, so that no peak is lost."""
    table = np.asarray(points, dtype=np.float64)
    if len(table) <= POINTS:
        return table
    stretch = (POINTS * (table[:, 0] - table[0, 0]) / (table[-1, 0] - table[0, 0] or 1.0)).astype(int)
    order = np.lexsort((-table[:, 1:].sum(axis=1), stretch))
    first = np.unique(stretch[order], return_index=True)[1]
    return table[np.unique([0, *order[first], len(table) - 1])]


def _draw_timeline(axis: Any, result: dict[str, Any], unit: Unit, colour: str) -> list[Any]:
    """One panel. Returns the phases' words, which :func:`_lay_out_words` moves apart."""
    timeline = result["timeline"]
    table = _thinned(timeline["points"])
    times, columns = table[:, 0], [name.removesuffix("_mb") for name in timeline["columns"]]
    floor = np.zeros(len(table))
    for key in (key for key in TITLES if key in columns):
        ceiling = floor + unit.of(1.0) * table[:, 1 + columns.index(key)]
        axis.fill_between(times, floor, ceiling, step="post", color=COLOURS[key], linewidth=0)
        floor = ceiling
    axis.step(times, floor, where="post", color="black", linewidth=0.5)
    if host := (result.get("host") or {}).get("points"):
        ends_at = [*([time for time, _ in host]), max(times[-1], host[-1][0])]
        axis.step(ends_at, unit.of(1.0) * np.array([*(mb for _, mb in host), host[-1][1]]), where="post", color=HOST)
    peak = result["breakdown"]["peak_allocated_mb"] if result["breakdown"] else result["peak_memory_mb"]
    ends = [times[0], times[-1], *(mark[0] for mark in timeline["marks"])]
    axis.set_xlim(min(ends), max(ends) if max(ends) > min(ends) else min(ends) + 1)
    if peak is not None:
        axis.axhline(unit.of(peak), color="black", linewidth=0.9, linestyle="--")
        text = f"peak {unit.text(peak)} {unit.name}"
        place = {"xycoords": axis.get_yaxis_transform(), "textcoords": "offset points", "va": "bottom", "ha": "right"}
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
        axis.annotate(text, (1, unit.of(peak)), (-3, 2), fontsize=SMALL, bbox=box, **place)
    words = []
    for (start, name), (end, _) in pairwise([*sorted(timeline["marks"]), (max(ends), "")]):
        axis.axvline(start, color="0.25", linewidth=0.9, linestyle=":")
        if name != "end":
            place = {"xycoords": axis.get_xaxis_transform(), "textcoords": "offset points", "va": "bottom"}
            middle = ((start + end) / 2, 1.0)
            words.append(axis.annotate(name, middle, (0, 2), fontsize=SMALL, color="0.25", ha="center", **place))
    axis.set_title(result["experiment"], loc="left", fontsize=10, color=colour)
    axis.set_xlabel("time in the profiled step, ms", fontsize=SMALL)
    axis.tick_params(labelsize=SMALL)
    axis.spines[["top", "right"]].set_visible(False)
    return words


def _lay_out_words(figure: Figure, panels: list[tuple[Any, list[Any]]]) -> None:
    """Move phases' words into the panel's width, and up where one would lie on another; the title above them."""
    figure.draw_without_rendering()
    points = 72 / figure.dpi
    for axis, words in panels:
        box, ends = axis.get_window_extent(), [-np.inf]
        for word in words:
            extent = word.get_window_extent()
            shift = max(box.x0 - extent.x0, 0) - max(extent.x1 - box.x1, 0)
            row = next((i for i, end in enumerate(ends) if extent.x0 + shift > end + 3), len(ends))
            ends[row:] = [extent.x1 + shift, *ends[row + 1 :]]
            word.set_position((shift * points, 2 + 11 * row))
        axis.set_title(axis.get_title(loc="left"), loc="left", fontsize=10, pad=4 + 11 * len(ends))


def timeline_figure(results: Results) -> Figure:
    """Memory by component over the last measured step, a panel for each experiment, all of the same height."""
    colours = method_colours(results)
    drawn = [result for result in results if result["timeline"] and result["timeline"]["points"]]
    columns = 1 if len(drawn) <= 3 else 2
    rows = -(-len(drawn) // columns)
    figure = Figure(figsize=(3.2 + (6.5 if columns == 1 else 4.6 * columns), 1.2 + max(0.4, 2.7 * rows)))
    figure.set_layout_engine("constrained")
    absent = {r["experiment"]: why_not(r) or "none was recorded" for r in results if r not in drawn}
    notes = [f"No timeline of {grouped(absent)}."] if absent else []
    if drawn:
        _draw_panels(figure, drawn, (rows, columns), colours)
        slower = [r["profiling"]["time_ratio"] for r in drawn if (r["profiling"] or {}).get("time_ratio")]
        if slower:
            ratios = dict.fromkeys(f"{ratio:.1f}" for ratio in (min(slower), max(slower)))
            notes.append(f"Profiling made the step {' to '.join(ratios)} times as long.")
    if any(result.get("host") for result in drawn):
        notes.append("The violet line is host memory: checkpoint inputs, not part of the total.")
    caption(figure, results, notes)
    return figure


def _draw_panels(figure: Figure, drawn: Results, shape: tuple[int, int], colours: dict[str, str]) -> None:
    totals = [max(sum(point[1:]) for point in result["timeline"]["points"]) for result in drawn]
    totals += [result["breakdown"]["peak_allocated_mb"] for result in drawn if result["breakdown"]]
    totals += [result["host"]["peak_mb"] for result in drawn if result.get("host")]
    unit = unit_for(totals)
    axes = figure.subplots(*shape, squeeze=False, sharey=True)
    panels = []
    for axis, result in zip(axes.flat, drawn, strict=False):
        panels.append((axis, _draw_timeline(axis, result, unit, colours[result["experiment"]])))
        axis.set_ylim(0, 1.16 * unit.of(max(totals)) or 1.0)
    for axis in axes.flat[len(drawn) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel(f"memory, {unit.name}", fontsize=9)
    most = dict.fromkeys(TITLES, 0.0)
    for result in drawn:
        highest = np.asarray(result["timeline"]["points"], dtype=np.float64)[:, 1:].max(axis=0)
        for name, value in zip(result["timeline"]["columns"], highest, strict=True):
            most[name.removesuffix("_mb")] = max(most[name.removesuffix("_mb")], float(value))
    legend(figure, [key for key in TITLES if most[key] > VISIBLE * max(totals)])
    _lay_out_words(figure, panels)
