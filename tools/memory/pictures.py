"""Pictures of memory profiles: what the peak consists of, memory over a step, and peak against time.

The functions that make a figure return it unsaved, so that a test can look at the texts in it.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from tools.memory.components import TITLES
from tools.memory.derived import (
    Results,
    added_over,
    amounts,
    failed_amounts,
    milliseconds,
    time_ratio,
    times_of,
    vanilla_of,
    why_not,
)
from tools.memory.picture_style import COLOURS, SMALL, VISIBLE, caption, ink, legend, method_colours
from tools.memory.result import write_bytes
from tools.memory.timeline_picture import timeline_figure
from tools.memory.units import Unit, grouped, unit_for, wrapped_name

DPI = 130
MINUS = "\N{MINUS SIGN}"  # as matplotlib writes it on its axes
MARKERS = "osD^vP*X"
LABELLED = 0.04  # of an axis's height: the least that a number fits into
SLIGHT = 5e-3  # of vanilla's peak: the axis of what is added over it is at least so high
BREAKDOWN, TIMELINE, TRADEOFF = "memory_breakdown_comparison.png", "memory_timeline.png", "performance_tradeoff.png"


def _stack(axis: Any, at: int, parts: dict[str, float], unit: Unit) -> tuple[float, float]:
    """One bar: what is above 0 upwards, what is below it downwards. Returns both ends, in the unit."""
    low = high = 0.0
    for key, mb in parts.items():
        value = unit.of(mb)
        start = high if value >= 0 else low
        axis.bar(at, value, 0.72, bottom=start, color=COLOURS[key], edgecolor="white", linewidth=0.4)
        low, high = min(low, start + value), max(high, start + value)
    return low, high


def _numbers(axis: Any, at: int, parts: dict[str, float], unit: Unit) -> None:
    """The amounts inside the parts of a bar that are high enough for one."""
    bottom, top = axis.get_ylim()
    low = high = 0.0
    for key, mb in parts.items():
        value = unit.of(mb)
        start = high if value >= 0 else low
        if abs(value) > LABELLED * (top - bottom):
            colour = ink(COLOURS[key])
            text = unit.text(mb).replace("-", MINUS)
            axis.text(at, start + value / 2, text, ha="center", va="center", fontsize=7, color=colour)
        low, high = min(low, start + value), max(high, start + value)


def _names(axis: Any, results: Results, colours: dict[str, str]) -> None:
    names = [r["experiment"] for r in results]
    axis.set_xticks(range(len(names)), [wrapped_name(name) for name in names], fontsize=SMALL)
    axis.set_xlim(-0.6, len(names) - 0.4)
    for label, name in zip(axis.get_xticklabels(), names, strict=True):
        label.set_color(colours[name])
    axis.tick_params(axis="y", labelsize=SMALL)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_peaks(axis: Any, results: Results, unit: Unit, colours: dict[str, str]) -> None:
    peaks = [unit.of(sum(amounts(result).values())) for result in results]
    lost = [unit.of((r["failure"] or {}).get("allocated_mb") or 0.0) for r in results]
    top = 1.1 * max([*peaks, *lost]) or 1.0
    axis.set_ylim(0, top)
    for at, (result, peak) in enumerate(zip(results, peaks, strict=True)):
        if result["breakdown"]:
            low, high = _stack(axis, at, amounts(result), unit)
            axis.set_ylim(min(axis.get_ylim()[0], 1.05 * low), top)
            _numbers(axis, at, amounts(result), unit)
            text = unit.text(result["breakdown"]["total_allocated_mb"])
            axis.text(at, max(high, peak), text, ha="center", va="bottom", fontsize=9, fontweight="bold")
        else:
            _stack(axis, at, failed_amounts(result), unit)
            axis.bar(at, lost[at] or top, 0.72, fill=False, hatch="//", edgecolor="0.7", linestyle="--")
            words = textwrap.fill(textwrap.shorten(why_not(result), 150, placeholder=" ..."), 44)
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
            place = {"transform": axis.get_xaxis_transform(), "ha": "center", "va": "center", "rotation": 90}
            axis.text(at, 0.5, words, fontsize=7, bbox=box, **place)
    axis.set_ylabel(f"memory at the peak, {unit.name}", fontsize=9)
    axis.set_title("What the peak consists of", fontsize=10)
    if not any(peaks) and not any(lost):
        axis.set_yticks([])
    _names(axis, results, colours)


def _draw_added(axis: Any, vanilla: dict[str, Any], others: Results, unit: Unit, colours: dict[str, str]) -> None:
    base = amounts(vanilla)
    bars = [{key: mb - base[key] for key, mb in amounts(result).items()} for result in others]
    ends = [_stack(axis, at, parts, unit) for at, parts in enumerate(bars)]
    low, high = min(end[0] for end in ends), max(end[1] for end in ends)
    # A difference that is next to nothing beside the peak has to look like it.
    high = max(high, unit.of(SLIGHT * vanilla["breakdown"]["total_allocated_mb"]))
    span = (high - low) or 1.0
    axis.set_ylim(low - 0.04 * span * (low < 0), high + 0.13 * span)
    axis.axhline(0, color="black", linewidth=0.8)
    for at, (parts, (_, top), result) in enumerate(zip(bars, ends, others, strict=True)):
        _numbers(axis, at, parts, unit)
        added = added_over(result, vanilla)
        times = times_of(result, vanilla)
        text = f"{'+' if added >= 0 else ''}{unit.text(added)}".replace("-", MINUS)
        text += f"\n{times:.2f} x" if times else ""
        axis.text(at, top, text, ha="center", va="bottom", fontsize=8, fontweight="bold")
    axis.set_ylabel(f"above vanilla, {unit.name}", fontsize=9)
    axis.set_title("What is added over vanilla", fontsize=10)
    _names(axis, others, colours)


def _worth_a_legend(results: Results, vanilla: dict[str, Any] | None) -> list[str]:
    """The components that can be seen in one of the bars."""
    failed = [failed_amounts(result) for result in results]
    drawn = [*(amounts(result) for result in results), *failed]
    most = max((mb for parts in drawn for mb in parts.values()), default=0.0)
    base = amounts(vanilla) if vanilla else {}
    slight = SLIGHT * sum(base.values())
    keys = []
    for key in TITLES:
        measured = [amounts(result)[key] for result in results if result["breakdown"]]
        added = [abs(value - base[key]) for value in measured] if base else []
        values = [*measured, *(lost.get(key, 0.0) for lost in failed)]
        spans = [sum(abs(mb - base[k]) for k, mb in amounts(r).items()) for r in results if base and r["breakdown"]]
        seen = any(abs(value) > VISIBLE * most for value in values)
        if seen or any(value > VISIBLE * max(slight, *spans) for value in added):
            keys.append(key)
    return keys


def breakdown_figure(results: Results) -> Figure:
    """Stacked bars whose top is the measured peak; beside them what each experiment adds over vanilla."""
    colours, vanilla = method_colours(results), vanilla_of(results)
    others = [r for r in results if vanilla and r is not vanilla and r["breakdown"]]
    figure = Figure(figsize=(4.6 + 0.95 * len(results) + (1.2 + 0.95 * len(others)) * bool(others), 5.8))
    figure.set_layout_engine("constrained")
    unit = unit_for(mb for r in results for mb in (sum(amounts(r).values()), *failed_amounts(r).values()))
    notes = []
    keys = _worth_a_legend(results, vanilla)
    if vanilla and others:
        left, right = figure.subplots(1, 2, width_ratios=[len(results) + 0.6, len(others) + 0.6])
        differences = [added_over(result, vanilla) for result in others]
        differences.append(SLIGHT * vanilla["breakdown"]["total_allocated_mb"])
        differences += [mb - amounts(vanilla)[key] for result in others for key, mb in amounts(result).items()]
        _draw_added(right, vanilla, others, unit_for(differences), colours)
    else:
        left = figure.subplots()
        why = "nothing else has a peak" if vanilla else "vanilla has no peak"
        notes.append(f"What is added over vanilla is not drawn: {why}.")
    _draw_peaks(left, results, unit, colours)
    hidden = [TITLES[key] for key in TITLES if key not in keys and any(amounts(r).get(key) for r in results)]
    notes += [f"Too small to be seen: {', '.join(hidden)}."] if hidden else []
    legend(figure, keys)
    caption(figure, results, notes)
    return figure


def _roomy(low: float, high: float) -> tuple[float, float]:
    """Limits with room for labels, and wide enough that noise does not look like a difference."""
    span = max(high - low, 0.1 * abs(high), 1e-9)
    middle = (low + high) / 2
    return max(0.0, middle - 0.75 * span), middle + 0.75 * span


def _label_points(figure: Figure, axis: Any, points: Sequence[tuple[str, float, float, str]], bars: list[Any]) -> None:
    """Names beside points, each where it lies on no other name, point or error bar."""
    names = []
    for name, x, y, colour in points:
        arrow = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
        text = wrapped_name(name, 24)
        place = {"textcoords": "offset pixels", "arrowprops": arrow, "ha": "left", "va": "bottom"}
        names.append(axis.annotate(text, (x, y), (0, 0), fontsize=9, color=colour, **place))
    figure.draw_without_rendering()
    frame = axis.get_window_extent()
    at = axis.transData.transform([(x, y) for _, x, y, _ in points])
    taken = [Bbox.from_extents(x - 6, y - 6, x + 6, y + 6) for x, y in at]
    taken += [Bbox(axis.transData.transform(bar)).padded(2) for bar in bars]
    others = len(taken)  # from here on they are names
    for name, (x, y) in zip(names, at, strict=True):
        extent = Text.get_window_extent(name)  # without the arrow
        wide, high = extent.width, extent.height
        places = [
            (dx, dy)
            for gap in (8, 20, 36, 56, 80, 110, 150)
            for dx in (gap, -gap - wide, -wide / 2)
            for dy in (-high / 2, gap, -gap - high)
            if (dx, dy) != (-wide / 2, -high / 2)
        ]

        def badness(place: tuple[float, float], x: float = x, y: float = y, size: Any = (wide, high)) -> float:
            box = Bbox.from_bounds(x + place[0], y + place[1], *size).padded(2)
            common = [Bbox.intersection(box, other) for other in taken]
            inside = Bbox.intersection(box, frame)
            outside = box.width * box.height - (inside.width * inside.height if inside else 0.0)
            arrow = np.linspace((x, y), ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2), 30)
            crossed = sum(label.contains(*point) for label in taken[others:] for point in arrow)
            return crossed + outside + sum(both.width * both.height for both in common if both)

        best = min(places, key=badness)  # the first, and so the nearest, of those that overlap nothing
        name.set_position(best)
        name.arrow_patch.set_visible(best not in places[:8])
        taken.append(Bbox.from_bounds(x + best[0], y + best[1], wide, high))


def tradeoff_figure(results: Results) -> Figure:
    """Peak memory against the median time of a step, with ranges over rounds and repetitions.

    The time is that over vanilla's of the same round where all experiments have shared rounds with vanilla.
    """
    colours = method_colours(results)
    drawn = [r for r in results if r["peak_memory_mb"] is not None and not why_not(r) and milliseconds(r) is not None]
    figure = Figure(figsize=(8, 5.6 if drawn else 1.6), dpi=DPI)
    figure.set_layout_engine("constrained")
    absent = {r["experiment"]: why_not(r) or "no time was measured" for r in results if r not in drawn}
    notes = [f"No point for {grouped(absent)}."] if absent else []
    if not drawn:
        caption(figure, results, notes)
        return figure
    axis = figure.subplots()
    unit = unit_for(result["peak_memory_mb"] for result in drawn)
    relative = all(time_ratio(result) is not None for result in drawn)
    points, bars, corners = [], [], []
    for result in drawn:
        name, y = result["experiment"], unit.of(result["peak_memory_mb"])
        x = (time_ratio(result) if relative else milliseconds(result)) or 0.0
        times = result["time_over_vanilla" if relative else "time_ms"] or {"min": x, "max": x}
        peaks = (result["repetitions"] or {}).get("peak_memory_mb") or dict.fromkeys(("min", "max"), unit.mb * y)
        across = (min(times["min"], x), max(times["max"], x))
        along = (min(unit.of(peaks["min"]), y), max(unit.of(peaks["max"]), y))
        errors: dict[str, Any] = {"xerr": [[x - across[0]], [across[1] - x]], "yerr": [[y - along[0]], [along[1] - y]]}
        marker = MARKERS[list(colours).index(name) % len(MARKERS)]
        axis.errorbar([x], [y], **errors, color=colours[name], marker=marker, capsize=3, linestyle="none")
        points.append((name, x, y, colours[name]))
        bars += [[(across[0], y), (across[1], y)], [(x, along[0]), (x, along[1])]]
        corners += [(across[0], along[0]), (across[1], along[1])]
    axis.set_xlim(*_roomy(min(x for x, _ in corners), max(x for x, _ in corners)))
    axis.set_ylim(*_roomy(min(y for _, y in corners), max(y for _, y in corners)))
    words = "time of a step over vanilla's of the same round, median" if relative else "median time of a step, ms"
    axis.set_xlabel(f"{words} (bars: least to most)", fontsize=9)
    axis.set_ylabel(f"peak memory, {unit.name}", fontsize=9)
    axis.set_title("Peak memory against time: lower left is better", fontsize=10)
    axis.tick_params(labelsize=SMALL)
    axis.grid(color="0.9", linewidth=0.6)
    axis.set_axisbelow(True)
    short = [word for word, low in (("memory", axis.get_ylim()[0]), ("time", axis.get_xlim()[0])) if low > 0]
    notes += [f"Axes that do not start at 0: {' and '.join(short)}."] if short else []
    caption(figure, results, notes)
    _label_points(figure, axis, points, bars)
    return figure


PICTURES: dict[str, Callable[[Results], Figure]] = {
    BREAKDOWN: breakdown_figure,
    TIMELINE: timeline_figure,
    TRADEOFF: tradeoff_figure,
}


def draw_all(results: Results, directory: Path) -> list[Path]:
    """Write the three pictures, each whole or not at all.

    Args:
        results: of :func:`tools.memory.result.load_results`; failed and simulated ones without data are named.
        directory: made if it is not there.

    Raises:
        OSError: nothing can be written there.
    """
    paths = []
    for name, draw in PICTURES.items():
        picture = io.BytesIO()
        draw(results).savefig(picture, format="png", dpi=DPI)
        write_bytes(directory / name, picture.getvalue())
        paths.append(directory / name)
    return paths
