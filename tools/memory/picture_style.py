"""Colours, names and captions that the memory profiler's pictures share."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from tools.memory.components import TITLES, UNATTRIBUTED
from tools.memory.derived import Results, conditions

# Okabe and Ito's palette, which the colour-blind can tell apart, with Tol's indigo, wine and two greys.
COLOURS = {
    "model_parameters": "#0072B2",
    "buffers": "#882255",
    "gradients": "#E69F00",
    "optimizer_states": "#009E73",
    "activation_hooks": "#56B4E9",
    "checkpoint_inputs": "#332288",
    "book_keeping": "#D55E00",
    "norm_samples": "#F0E442",
    "temp_matrices": "#CC79A7",
    "other": "#888888",
    UNATTRIBUTED: "#D9D9D9",
}
METHODS = {
    "vanilla": "#000000",
    "ghost": "#0072B2",
    "flash_clip": "#C04F00",
    "fast": "#00795A",
    "per_sample": "#A8457E",
    "opacus_ghost": "#332288",
}
MORE = ("#882255", "#117733", "#666633", "#AA4499", "#44779A", "#661100")
SMALL = 8
VISIBLE = 3e-3  # of the highest peak: a component below it is a line nobody sees, and is named under the picture


def method_colours(results: Results) -> dict[str, str]:
    """A colour for each experiment, the same on every picture."""
    more = [r["experiment"] for r in results if r["experiment"] not in METHODS]
    return {**METHODS, **{name: MORE[number % len(MORE)] for number, name in enumerate(more)}}


def caption(figure: Figure, results: Results, notes: Iterable[str]) -> None:
    """The notes and the conditions, under the picture."""
    width = int(figure.get_figwidth() * 13.5)
    lines = [line for text in [*notes, conditions(results)] for line in textwrap.wrap(text, width)]
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=SMALL, linespacing=1.4)


def legend(figure: Figure, keys: Sequence[str]) -> None:
    """The components from the top of a stack to its bottom, right of the axes."""
    handles = [Patch(facecolor=COLOURS[key], edgecolor="0.4", linewidth=0.4, label=TITLES[key]) for key in keys]
    if handles:
        figure.legend(handles=handles[::-1], loc="outside right upper", fontsize=SMALL, frameon=False)


def ink(colour: str) -> str:
    """Black or white, whichever is read better on a colour."""
    red, green, blue = to_rgb(colour)
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
