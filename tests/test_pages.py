"""The code blocks of the README and the site's pages run as they stand, in order, in one interpreter for each page.

A page says in its source what is not run, and why, or what has to be there before a block:

    <!-- not run: it needs a GPU -->       the next block is not run
    <!-- setup: quickstart.md -->          the first Python block of that page runs here
    <!-- setup                             Python that runs here, and that no reader sees
    ... -->
    <!-- printed -->                       the lines of the next block of text were printed before it
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tools.common.reader import environment_with_commands

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
README = ROOT / "README.md"
RUN = ("python", "bash")
SHOWN = ("text", "diff", "yaml", "json", "jinja")  # not programs
_PIECE = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+?) -->\n|(?P<printed><!-- printed -->)\n)?"
    r"^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```$"
    r"|^<!-- setup: (?P<page>\S+) -->$"
    r"|^<!-- setup\n(?P<hidden>.*?)^-->$",
    re.MULTILINE | re.DOTALL,
)
# Each piece is a language, code, and where it stands. Python shares one namespace; a shell starts anew.
_DRIVER = """
import json, subprocess, sys, warnings
namespace = {"__name__": "__main__"}
for language, code, place in json.load(open(sys.argv[1], encoding="utf-8")):
    print("---", place, flush=True)
    if language == "python":
        exec(compile(code, place, "exec"), namespace)
    else:
        subprocess.run(["bash", "-euo", "pipefail", "-c", code], check=True)
"""


@dataclass(frozen=True)
class Piece:
    """A block, or a hidden set-up."""

    language: str
    code: str
    line: int
    reason: str | None = None
    """Why it is not run."""
    printed: bool = False
    """Whether it is what the blocks before it print; ``...`` stands for further lines."""


def pieces(text: str) -> list[Piece]:
    """The blocks and set-ups of a page, in order."""
    found = []
    for match in _PIECE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        if match["page"]:
            found.append(Piece("page", match["page"], line))
        elif match["hidden"] is not None:
            found.append(Piece("python", match["hidden"], line))
        else:
            found.append(Piece(match["language"], match["code"], line, match["reason"], bool(match["printed"])))
    return found


def program(page: Path) -> list[tuple[str, str, str]]:
    """What runs of a page."""
    steps = []
    for piece in pieces(page.read_text(encoding="utf-8")):
        place = f"{page.relative_to(ROOT)}:{piece.line}"
        if piece.language == "page":
            first = next(p for p in pieces((DOCS / piece.code).read_text(encoding="utf-8")) if p.language == "python")
            steps.append(("python", first.code, place))
        elif piece.language in RUN and piece.reason is None:
            steps.append((piece.language, piece.code, place))
    return steps


def indented(text: str) -> list[int]:
    """Lines where a block of code begins that has no fence, and so no language."""
    found, fenced, item, blank = [], False, False, True
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        if not fenced and line.startswith("    ") and line.strip() and blank and not item:
            found.append(number)
        if line.strip() and not line.startswith(" "):
            item = bool(re.match(r"[-*+] |\d+\. ", line))
        blank = not line.strip()
    return found


def faults(text: str) -> list[str]:
    """Blocks that no test could run, and that nothing says so of."""
    found = []
    for piece in pieces(text):
        if piece.language not in (*RUN, *SHOWN, "page"):
            found.append(f"line {piece.line}: a block of {piece.language or 'no language'}")
        if piece.reason is not None and len(piece.reason.split()) < 3:
            found.append(f"line {piece.line}: not run, for the reason {piece.reason!r}")
    fences = len(re.findall(r"^```", text, re.MULTILINE))
    marks = len(re.findall(r"<!-- (?:setup|not run|printed)", text))
    found += [f"line {line}: an indented block of code; use a fence" for line in indented(text)]
    if fences + 2 * marks != sum(4 if piece.reason or piece.printed else 2 for piece in pieces(text)):
        found.append("a mark that stands before no block, or a block that does not end")
    return found


ELSEWHERE = [ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "recipes/README.md")]  # also pages of the site
PAGES = [README, *ELSEWHERE, *sorted(DOCS.rglob("*.md"))]
RUNNING = [page for page in PAGES if page != README and program(page)]  # README: test_packaging.py, from the wheel


def run_page(page: Path, folder: Path, python: str, environment: dict[str, str], timeout: int = 280) -> None:
    """Run a page's blocks in ``folder``, and compare what they print with what the page says of it."""
    steps = folder.parent / "program.json"
    steps.write_text(json.dumps(program(page)), encoding="utf-8")
    run = subprocess.run(
        [python, "-c", _DRIVER, str(steps)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    for piece in pieces(page.read_text(encoding="utf-8")):
        if piece.printed:
            assert set(piece.code.splitlines()) - {"..."} <= set(run.stdout.splitlines())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_block_runs_or_says_why_not(page: Path) -> None:
    assert not faults(page.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNNING, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_runs(page: Path, tmp_path: Path) -> None:
    """In an empty folder, beside the recipes and tools of the repository."""
    folder = tmp_path / "reader"
    folder.mkdir()
    for name in ("recipes", "tools", "accelerate_config.yaml"):
        (folder / name).symlink_to(ROOT / name)
    run_page(page, folder, sys.executable, environment_with_commands(tmp_path / "commands"))


# ---------------------------------------------------------------------------------------------------------------------
# The reader of pages itself


def test_pieces_of_a_page() -> None:
    text = (
        "# A\n\n```python\nx = 1\n```\n\n<!-- not run: it needs a GPU -->\n```bash\nnvidia-smi\n```\n\n"
        "<!-- setup: quickstart.md -->\n\n<!-- setup\ny = 2\n-->\n<!-- printed -->\n```text\nout\n```\n"
    )
    assert pieces(text) == [
        Piece("python", "x = 1\n", 3),
        Piece("bash", "nvidia-smi\n", 7, "it needs a GPU"),
        Piece("page", "quickstart.md", 12),
        Piece("python", "y = 2\n", 14),
        Piece("text", "out\n", 17, printed=True),
    ]
    assert not faults(text)


def test_faults_are_seen() -> None:
    assert faults("```\nx\n```\n") and faults("```pyton\nx\n```\n")
    assert faults("<!-- not run: no -->\n```bash\nx\n```\n")
    assert faults("<!-- not run: it needs a GPU -->\n\n```bash\nx\n```\n")
    assert faults("<!-- printed -->\n\n```text\nx\n```\n")
    assert faults("```bash\nx\n")
    assert faults("<!-- setup\nx = 1\n") and not faults("<!-- setup\nx = 1\n-->\n")


def test_pages_that_run_are_found() -> None:
    assert {DOCS / "quickstart.md", DOCS / "privacy_officer.md", DOCS / "api" / "privacy.md"} < set(RUNNING)
