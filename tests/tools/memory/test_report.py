"""What is made from memory profiles: text, LaTeX and a page."""

from __future__ import annotations

import base64
import copy
import html
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from tests.tools.memory.examples import EVERY, SETS, example, failed, out_of_memory, renamed, simulated
from tools.memory.derived import conditions
from tools.memory.html_page import html_page
from tools.memory.picture_style import COLOURS
from tools.memory.pictures import PICTURES
from tools.memory.report import escaped, latex_table, summary, write_report
from tools.memory.units import unit_for

FILES = ["index.html", "memory_breakdown_comparison.png", "memory_table.tex", "memory_timeline.png"]
FILES += ["performance_tradeoff.png", "summary.txt"]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the report on a result is."""
    folder = tmp_path_factory.mktemp("report") / "new"
    paths = write_report([example()], folder)
    assert sorted(path.name for path in paths) == FILES == sorted(path.name for path in folder.iterdir())
    return folder


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
        r"ghost +ok +511\.82 +511\.82 \(511\.50 to 512\.00\) +3 +\+90\.02 +1\.213 +151\.0 "
        r"\(146\.5 to 158\.6\) +1\.51 \(1\.49 to 1\.54\)\n",
        r"per_sample +out of memory +- +- +- +- +- +- +-\n",
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


def test_what_was_timed_alone_says_so() -> None:
    results = SETS["alone"]()
    words = "timed alone, with no ratio to vanilla's time: vanilla, ghost, flash_clip (3 processes at once may need"
    for text in (summary(results), html_page(results, [])):
        assert words in html.unescape(text)
    assert re.search(r"ghost +ok .* 151\.0 \(146\.5 to 158\.6\) +-\n", summary(results))
    assert "timed alone" not in summary(SETS["three"]())
    row = r"time, times vanilla & 1.00 & 1.51 & 1.49 \\"
    assert row in latex_table(SETS["three"]()) and "time, times" not in latex_table(results)


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
