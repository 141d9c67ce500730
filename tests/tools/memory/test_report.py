"""What is made from memory profiles: pictures, text, LaTeX and a page."""

from __future__ import annotations

import base64
import copy
import itertools
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from tests.tools.memory.examples import EVERY, SETS, Results, example, failed, out_of_memory, renamed, simulated
from tools.memory.html import html_page
from tools.memory.panels import timeline_figure
from tools.memory.pictures import PICTURES, breakdown_figure, tradeoff_figure
from tools.memory.report import escaped, latex_table, summary, write_report
from tools.memory.style import COLOURS
from tools.memory.words import conditions, unit_for

FILES = ["index.html", "memory_breakdown_comparison.png", "memory_table.tex", "memory_timeline.png"]
FILES += ["performance_tradeoff.png", "summary.txt"]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


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


def test_timeline_has_the_peak_of_many_points() -> None:
    result = example(steps=6000)
    spike = result["timeline"]["points"][3001]
    spike[1:] = [2 * value for value in spike[1:]]
    top = sum(spike[1:])
    line = timeline_figure([result]).axes[0].lines[0]
    assert max(line.get_ydata()) == pytest.approx(top)
    assert len(line.get_xdata()) <= 2003 and line.get_xdata()[0] == 0.0 and line.get_xdata()[-1] == 150.0


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the report on two results is, in which every component is large enough to be seen."""
    more = {"checkpoint_inputs": 40.0, "buffers": 30.0, "other": 25.0, "norm_samples": 30.0, "unattributed": 30.0}
    folder = tmp_path_factory.mktemp("report") / "new"
    paths = write_report([example(name, **more) for name in ("vanilla", "ghost")], folder)
    assert sorted(path.name for path in paths) == FILES == sorted(path.name for path in folder.iterdir())
    return folder


def test_pictures_have_the_components_colours(report: Path) -> None:
    seen = {}
    for name in PICTURES:
        image = Image.open(report / name)
        assert image.format == "PNG" and image.width > 700 and image.height > 400
        found = image.convert("RGB").getcolors(1 << 24) or []
        seen[name] = {f"#{r:02X}{g:02X}{b:02X}": n for n, (r, g, b) in found}
        assert sum(seen[name].values()) - seen[name]["#FFFFFF"] > 5000
    for key, colour in COLOURS.items():
        assert seen["memory_breakdown_comparison.png"].get(colour, 0) > 500, key
        if key != "unattributed":
            assert seen["memory_timeline.png"].get(colour, 0) > 500, key
    assert len(set(COLOURS.values())) == len(COLOURS)


# ---------------------------------------------------------------------------------------------------------------------
# Text, LaTeX, page


@pytest.mark.parametrize("name", ["three", "lost", "all lost", "simulated", "nothing"])
def test_every_text_names_every_experiment(name: str, tmp_path: Path) -> None:
    pixel = tmp_path / "pixel.png"
    Image.new("RGB", (1, 1)).save(pixel)
    results = SETS[name]()
    kept = copy.deepcopy(results)
    text, tex, page = summary(results), latex_table(results), html_page(results, [pixel])
    assert results == kept
    for result in results:
        assert result["experiment"] in text and result["experiment"] in page and escaped(result["experiment"]) in tex
    for written in (text, tex, page):
        assert "None" not in written and "nan" not in written and "commit 01234567" in written


def test_summary_has_the_numbers() -> None:
    results = [example(name) for name in EVERY[:3]] + [out_of_memory()]
    results[1]["repetitions"] = {
        "count": 3,
        "peak_memory_mb": {"median": 511.82, "min": 511.5, "max": 512.0, "values": [511.82, 511.5, 512.0]},
    }
    results[2]["notes"] = ["it took two passes"]
    results[2]["snapshots"][0]["reserved_mb"] = 480.25
    text = summary(results)
    for pattern in (
        r"Experiments\n  vanilla: vanilla, as its authors wrote it\n  ghost: ",
        r"\n  flash_clip: it took two passes\n",
        r"When it failed, MiB\n +per_sample\n  parameters +35\.00\n",
        r"ghost +ok +511\.82 +511\.82 \(511\.50 to 512\.00\) +3 +\+90\.02 +1\.213 +151\.0 \(146\.5 to 158\.6\)",
        r"per_sample +out of memory +- +- +- +- +- +-\n",
        r"book-keeping of the private step +0\.00 +70\.00 +70\.00 +-\n",
        r"unattributed +0\.30 +0\.30 +-0\.10 +-\n",
        r"total +421\.80 +511\.82 +465\.42 +-\n",
        r"temporary matrices +\+20\.00 +-26\.00\n",
        r"total, x vanilla +1\.213 +1\.103\n",
        r"vanilla +iter0_backward +lm_head \(addmm\) +421\.80\n",
        r"vanilla +saved activations +2 +2 x 512 x 4000 +float32 +lm_head \(mm\) +15\.62\n",
        r"vanilla +torch\.profiler's allocator events +0\.071 % +421\.80 +-0\.010 % +- +2\.30 x\n",
        r"flash_clip +torch.* -0\.021 % +465\.42 +-0\.010 % +480\.25 +2\.30 x\n",
        r"per_sample: out of memory in warmup at model\.layers\.3\.mlp\.down_proj, 584 MiB allocated: \[enforce fail",
        r"The highest peak is 512 MiB, of ghost\.",
    ):
        assert re.search(pattern, text), pattern
    assert "Added over vanilla" not in summary(results[1:])


def test_conditions_name_what_differs() -> None:
    first, second = example(), example("ghost")
    second["config"] |= {"seq_len": 1024, "gradient_checkpointing": True, "lora": 8, "device": "cuda"}
    second["environment"] |= {"gpu": "Example GPU", "dirty": True, "commit": None}
    assert conditions([first, second]) == (
        "Example CPU 2.0, 2 threads / Example GPU, torch 2.13.0, hidden 256, layers 4, heads 4, V=4000, 13,107,200 "
        "parameters, T=512 / 1024, B=2, float32, not checkpointed / checkpointed, lora 8, "
        "commit 01234567 / commit unknown with changes"
    )
    assert conditions([simulated()]).startswith("simulated with fake tensors, torch")


@pytest.mark.parametrize(
    ("mb", "text"),
    [
        (0.0, "0.00 MiB"),
        (0.5, "512 KiB"),
        (1.0, "1.00 MiB"),
        (99.96, "100.0 MiB"),
        (1023.4, "1023 MiB"),
        (1536, "1.50 GiB"),
    ],
)
def test_units(mb: float, text: str) -> None:
    unit = unit_for([mb, -mb / 2])
    assert f"{unit.text(mb)} {unit.name}" == text


def test_latex_is_escaped() -> None:
    assert escaped(r"a_b & 50% {x} $1 #2 ~ ^ \ <y>") == (
        r"a\_b \& 50\% \{x\} \$1 \#2 \textasciitilde{} \textasciicircum{} \textbackslash{} \textless{}y\textgreater{}"
    )
    results = [example(), example("flash_clip"), failed()]
    results[2]["reason"] += " \\input{x} 5$ #1\nnext"
    tex = latex_table(results)
    lines = tex.splitlines()
    for name in ("table", "tabular"):
        assert tex.count(rf"\begin{{{name}}}") == tex.count(rf"\end{{{name}}}") == 1
    body = lines[lines.index(r"\toprule") + 1 : lines.index(r"\bottomrule")]
    rows = [line for line in body if line != r"\midrule"]
    assert all(line.endswith(r" \\") and len(re.findall(r"(?<!\\)&", line)) == 3 for line in rows)
    assert rows[0] == r" & vanilla & flash\_clip & opacus\_ghost \\"
    assert r"unattributed & 0.30 & $-0.10$ & -- \\" in rows and r"peak, times vanilla & 1.00 & 1.10 & -- \\" in rows
    (caption,) = [line for line in lines if line.startswith(r"\caption")]
    bare = re.sub(r"\\[a-z]+\{\}|\\[&%$#_{}]", "", caption.removeprefix(r"\caption{")[:-1])
    assert not set(bare) & set("\\{}&%$#_~^<>") and "RMSNorm" in bare
    assert sum(line.startswith("%") for line in lines) == 1


class Page(HTMLParser):
    """Counts what is opened and closed, and collects what is referred to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.words: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "action", "srcset")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_page_stands_alone(tmp_path: Path) -> None:
    picture = tmp_path / "memory_timeline.png"
    Image.new("RGB", (3, 2)).save(picture)
    results = [example(), renamed(example("ghost"), "<script>alert('x')</script>"), failed()]
    page = html_page(results, [picture])
    parsed = Page()
    parsed.feed(page)
    parsed.close()
    assert not parsed.open and not {"script", "link", "iframe"} & set(parsed.tags)
    assert len(parsed.references) == 1 and parsed.references[0].startswith("data:image/png;base64,")
    assert not re.search(r"https?:|url\(|@import|//", page.replace(parsed.references[0], ""))
    text = " ".join(parsed.words)
    assert "<script>alert('x')</script>" in text and "<RMSNorm> & co." in text
    assert "What only the private step keeps" in text and "prefers-color-scheme: dark" in page
    for words in (
        "Peak and time",
        "At the peak, MiB",
        "Added over vanilla, MiB",
        "Snapshots, MiB",
        "0_model_loaded",
        "as its authors",
        "700.00",
    ):
        assert words in text
    assert all(colour in page for colour in COLOURS.values())


def test_report_has_the_pictures_in_the_page(report: Path) -> None:
    parsed = Page()
    parsed.feed((report / "index.html").read_text())
    pictures = [base64.b64decode(reference.removeprefix("data:image/png;base64,")) for reference in parsed.references]
    assert pictures == [(report / name).read_bytes() for name in PICTURES]
    assert "Peak and time" in (report / "summary.txt").read_text()
    assert r"\toprule" in (report / "memory_table.tex").read_text()
