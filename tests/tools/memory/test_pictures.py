"""The pictures of memory profiles: what is drawn, and that it can be read."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from tests.tools.memory.examples import EVERY, SETS, Results, alone, example, failed, out_of_memory
from tools.memory.picture_style import COLOURS
from tools.memory.pictures import PICTURES, breakdown_figure, draw_all, tradeoff_figure
from tools.memory.timeline_picture import timeline_figure


def texts_of(figure: Figure) -> list[tuple[str, Any]]:
    """Every text that is drawn, with the box that it takes."""
    figure.draw_without_rendering()
    found: list[Text] = list(figure.texts)
    for legend in figure.legends:
        found += legend.get_texts()
    for axes in (axes for axes in figure.axes if axes.get_visible()):
        found += [child for child in axes.get_children() if isinstance(child, Text)]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            found += [axis.label, *(tick.label1 for tick in ticks)]
    shown = [text for text in found if text.get_visible() and text.get_text().strip()]
    # Text's own box: an annotation's would include its arrow.
    return [(text.get_text(), Text.get_window_extent(text)) for text in shown]


BARS = ("one", "six", "lost", "all lost", "long names", "nothing", "less than vanilla")
POINTS = ("one", "six", "long names", "equal", "nothing")
CROWDED = [(breakdown_figure, BARS), (timeline_figure, ("six", "nothing")), (tradeoff_figure, POINTS)]


@pytest.mark.parametrize(("draw", "name"), [(draw, name) for draw, names in CROWDED for name in names])
def test_no_text_lies_on_another(draw: Callable[[Results], Figure], name: str) -> None:
    figure = draw(SETS[name]())
    texts = texts_of(figure)
    assert any("commit 01234567" in " ".join(text.split()) for text, _ in texts)
    width, height = figure.bbox.width, figure.bbox.height
    for text, box in texts:
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, text
    for (one, box), (other, second) in itertools.combinations(texts, 2):
        across = min(box.x1, second.x1) - max(box.x0, second.x0)
        along = min(box.y1, second.y1) - max(box.y0, second.y0)
        assert across <= 0.5 or along <= 0.5, (one, other)


def test_short_phases_keep_their_words_apart() -> None:
    result = example()
    result["timeline"]["marks"] = [[0.0, "forward"], [146.0, "backward"], [147.0, "clipping"], [148.0, "step"]]
    figure = timeline_figure([result])
    texts = texts_of(figure)
    boxes = {text: box for text, box in texts if text in ("forward", "backward", "clipping", "step", "vanilla")}
    assert len(boxes) == 5
    panel = figure.axes[0].get_window_extent()
    assert all(panel.x0 - 1 <= box.x0 and box.x1 <= panel.x1 + 1 for box in boxes.values())
    for one, other in itertools.combinations(boxes.values(), 2):
        assert not one.overlaps(other)


def heights(figure: Figure, number: int) -> dict[int, float]:
    """Of each bar of the axes, the sum of its parts."""
    found: dict[int, float] = {}
    for patch in figure.axes[number].patches:
        place = round(patch.get_x() + patch.get_width() / 2)
        found[place] = found.get(place, 0.0) + patch.get_height()
    return found


def test_bars_end_at_the_measured_peak() -> None:
    results = [example(name) for name in EVERY]
    figure = breakdown_figure(results)
    totals = [result["breakdown"]["total_allocated_mb"] for result in results]
    assert heights(figure, 0) == pytest.approx(dict(enumerate(totals)))
    assert heights(figure, 1) == pytest.approx({i: total - totals[0] for i, total in enumerate(totals[1:])})
    labels = [text.get_text() for text in figure.axes[0].texts]
    assert {"422", "512", "465", "418", "834"} <= set(labels)
    words = [text.get_text() for text in figure.axes[1].texts]
    assert "+90.0\n1.21 x" in words and "\N{MINUS SIGN}3.98\n0.99 x" in words


def test_what_is_missing_is_said() -> None:
    lost = [example("ghost"), out_of_memory(), failed()]
    texts = " ".join(" ".join(text.split()) for text, _ in texts_of(breakdown_figure(lost)))
    assert "What is added over vanilla is not drawn: vanilla has no peak." in texts
    assert "out of memory in warmup at model.layers.3.mlp.down_proj, 584 MiB allocated" in texts
    assert "NotImplementedError: <RMSNorm> & co." in texts
    for draw, words in (
        (timeline_figure, "No timeline of per_sample (out of"),
        (tradeoff_figure, "No point for per_s"),
    ):
        assert words in " ".join(text for text, _ in texts_of(draw(lost)))
    texts = " ".join(text for text, _ in texts_of(tradeoff_figure(SETS["simulated"]())))
    assert "No point for vanilla, ghost, flash_clip (no time was measured)." in " ".join(texts.split())


def test_an_axis_that_is_cut_says_so() -> None:
    words = "Axes that do not start at 0: memory"
    for results, cut in (([example()], True), ([example(), example("ghost", scale=9.0)], False)):
        figure = tradeoff_figure(results)
        assert (figure.axes[0].get_ylim()[0] > 0) == cut == any(words in text for text, _ in texts_of(figure))


def test_times_are_drawn_over_vanillas_of_the_same_round_where_they_are_known() -> None:
    """For all or for none: milliseconds of one process and ratios of another cannot be compared."""

    def drawn(results: Results) -> tuple[str, list[float]]:
        axis = tradeoff_figure(results).axes[0]
        return axis.get_xlabel(), [float(container.lines[0].get_xdata()[0]) for container in axis.containers]

    three = [example(name) for name in EVERY[:3]]
    words, places = drawn(three)
    assert "over vanilla's of the same round" in words and places == pytest.approx([1.0, 1.51, 1.49])
    words, places = drawn([*three[:2], alone("flash_clip")])
    assert "ms" in words and places == pytest.approx([100.0, 151.0, 149.0])


def test_timeline_has_the_peak_of_many_points() -> None:
    result = example(steps=6000)
    spike = result["timeline"]["points"][3001]
    spike[1:] = [2 * value for value in spike[1:]]
    top = sum(spike[1:])
    line = timeline_figure([result]).axes[0].lines[0]
    assert max(line.get_ydata()) == pytest.approx(top)
    assert len(line.get_xdata()) <= 2003 and line.get_xdata()[0] == 0.0 and line.get_xdata()[-1] == 150.0


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the pictures of two results are, in which every component is large enough to be seen."""
    more = {"checkpoint_inputs": 40.0, "buffers": 30.0, "other": 25.0, "norm_samples": 30.0, "unattributed": 30.0}
    folder = tmp_path_factory.mktemp("report") / "new"
    paths = draw_all([example(name, **more) for name in ("vanilla", "ghost")], folder)
    assert sorted(paths) == sorted(folder.iterdir()) == sorted(folder / name for name in PICTURES)
    return folder


def test_pictures_have_the_components_colours(pictures: Path) -> None:
    seen = {}
    for name in PICTURES:
        image = Image.open(pictures / name)
        assert image.format == "PNG" and image.width > 700 and image.height > 400
        found = image.convert("RGB").getcolors(1 << 24) or []
        seen[name] = {f"#{r:02X}{g:02X}{b:02X}": n for n, (r, g, b) in found}
        assert sum(seen[name].values()) - seen[name]["#FFFFFF"] > 5000
    for key, colour in COLOURS.items():
        assert seen["memory_breakdown_comparison.png"].get(colour, 0) > 500, key
        if key != "unattributed":
            assert seen["memory_timeline.png"].get(colour, 0) > 500, key
    assert len(set(COLOURS.values())) == len(COLOURS)
