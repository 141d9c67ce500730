"""What the documents say can be found and run: paths, links, names. test_pages.py runs the code."""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    ROOT / "recipes" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
)
_PATH = re.compile(r"(?<![\w/.:-])((?:\.\./)*(?:[\w.-]+/)*[\w-]+\.(?:py|ya?ml|md|json|png|cfg|toml|txt))(?![\w/*-])")
# A folder at the top of the project, as in `tests/clipping` or `recipes/accelerate/`.
_FOLDER = re.compile(r"(?<![\w/.:-])((?:tests|docs|tools|recipes|dpft)(?:/[\w-]+)+)(?![\w*-]|\.\w)")
_LINK = re.compile(r"\[[^]]*\]\(([^)\s#]+)[^)]*\)")
# A path that is written by a run, or that stands for the reader's own file, is none of the project's.
_OUTPUTS = ("outputs/", "runs/", "example_run/", "memory_profiling_results/", "my_records", "docs/benchmarks/gpu/CARD")


@cache
def basenames() -> frozenset[str]:
    """Names of the project's files."""
    skipped = {".git", ".venv", "node_modules", "outputs", "build"}
    found = set()
    for _, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in skipped]
        found.update(files)
    return frozenset(found)


def missing_paths(text: str, document: Path) -> list[str]:
    """Paths in ``text`` that lead to nothing, from the project's root, from dpft/, or from the document's folder.

    A name without a folder is looked for anywhere in the project, and only that of a Python file: other ones are what
    a command writes.
    """
    missing = set()
    for match in [*_PATH.finditer(text), *_FOLDER.finditer(text)]:
        path = match[1]
        if path.startswith(_OUTPUTS):
            continue
        if "/" not in path:
            if path.endswith(".py") and path not in basenames():
                missing.add(path)
        elif not any((start / path).exists() for start in (ROOT, ROOT / "dpft", document.parent)):
            missing.add(path)
    return sorted(missing)


def broken_links(text: str, document: Path) -> list[str]:
    """Targets of relative links that do not exist."""
    targets = (m[1] for m in _LINK.finditer(text) if not re.match(r"[a-z]+:", m[1]))
    return sorted({t for t in targets if not (document.parent / t).exists()})


def unknown_names(text: str, words: frozenset[str]) -> list[str]:
    """Names of code in ``text``, between backticks, that occur in no source file: classes, functions, constants."""
    quoted = re.findall(r"`([A-Za-z_][\w.]*)(?:\(\))?`", text)
    names = {part for name in quoted if not name.endswith((".py", ".md")) for part in name.split(".")}
    return sorted(names - words)


@cache
def words_of_the_code() -> frozenset[str]:
    """Every word of dpft and its tests, this file apart."""
    files = [*(ROOT / "dpft").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    sources = [f.read_text(encoding="utf-8") for f in files if f != Path(__file__).resolve()]
    return frozenset(re.findall(r"\w+", "\n".join(sources)))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: str(d.relative_to(ROOT)))
def test_paths_and_links_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert not missing_paths(text, document)
    assert not broken_links(text, document)


def test_architecture_names_what_there_is() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert not unknown_names(text, words_of_the_code())
    diagram = text.split("```text\n")[1].split("```")[0]
    called = re.findall(r"\b([A-Z][a-z]+[A-Z]\w+|\w+_\w+(?=[,( ]))", diagram)
    assert len(called) > 15
    assert not set(called) - words_of_the_code()


# ---------------------------------------------------------------------------------------------------------------------
# The checkers themselves


def test_path_checker() -> None:
    document = ROOT / "docs" / "x.md"
    good = (
        "`dpft/run.py`, privacy/mechanism.py: text, `tests/clipping/test_gradients.py`, (benchmarks/steps_cpu.json), "
        "../recipes/README.md, `run.py`, `tests/kernels`, recipes/accelerate/, python tools/profile_memory.py run, "
        "after.json, outputs/demo/none.json, my_records.json, https://example.org/a/none.py, tests/clipping."
    )
    assert not missing_paths(good, document)
    for bad in (
        *("`dpft/clipping/no_such.py`", "see privacy/no_such.py: x", "`tests/test_no_such.py`", "`no_such_file.py`"),
        *("(benchmarks/no_such.json)", "`recipes/no_such/`", "tests/no_such.", "`tools/no_such`"),
    ):
        assert len(missing_paths(f"text {bad} text", document)) == 1, bad


def test_link_checker() -> None:
    document = ROOT / "docs" / "x.md"
    assert not broken_links("[a](design.md), [b](../README.md#use-it), [c](https://example.org), [d](#here)", document)
    assert broken_links("[a](no_such.md) ![b](benchmarks/no_such.png)", document) == [
        "benchmarks/no_such.png",
        "no_such.md",
    ]


def test_name_checker() -> None:
    words = frozenset({"Job", "run_plain", "_SITES"})
    assert not unknown_names("`Job`, `Job.run_plain()`, `_SITES`, `run.py`, plain words", words)
    assert unknown_names("`Jobs`, `Job.walk`", words) == ["Jobs", "walk"]
