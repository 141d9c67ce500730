"""The tutorials: each notebook runs as it stands, and what is kept of it is what it prints."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.test_docs import broken_links
from tests.test_pages import DOCS, ROOT

TUTORIALS = DOCS / "tutorials"
NAMES = ("first_private_model", "chat_with_lora", "classification", "synthetic_data", "several_processes")
NOTEBOOKS = sorted(TUTORIALS.glob("*.ipynb"))
DETERMINISTIC = "deterministic"  # the tag of a cell that prints the same in every run
MOST_BYTES = 300_000
# A folder of one machine, the bar of a progress, and a terminal's line ends, which tools/notebooks.py cleans.
_MACHINE = re.compile(r"/(?:tmp|home|root|work|Users|usr|opt|var)/|\d+%\||\\r")
_BY_NAME = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def source(cell: dict[str, Any]) -> str:
    """What stands in a cell."""
    return "".join(cell["source"])


def faults(notebook: dict[str, Any]) -> list[str]:
    """What is wrong with a notebook as it is kept."""
    found, cells = [], notebook["cells"]
    if notebook["metadata"]["kernelspec"]["name"] != "python3":
        found.append("another kernel than python3")
    if cells[0]["cell_type"] != "markdown" or not source(cells[0]).startswith("# "):
        found.append("it does not begin with a title")
    if cells[-1]["cell_type"] != "markdown" or "## Next" not in source(cells[-1]):
        found.append("it does not end with what to read next")
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    if [cell["execution_count"] for cell in code] != list(range(1, len(code) + 1)):
        found.append("cells that were not executed, or not in order")
    for number, cell in enumerate(code, 1):
        outputs, text = cell["outputs"], json.dumps(cell["outputs"])
        if not outputs and re.search(r"^\s*(?:print\(|!|plt\.show)", source(cell), re.MULTILINE):
            found.append(f"cell {number} prints, and no output is kept")
        if DETERMINISTIC in cell["metadata"].get("tags", ()) and not outputs:
            found.append(f"cell {number} is {DETERMINISTIC} and prints nothing")
        if any(output["output_type"] == "error" or output.get("name") == "stderr" for output in outputs):
            found.append(f"cell {number} has an error or a warning")
        if match := _MACHINE.search(text):
            found.append(f"cell {number} shows {match[0]!r}")
        if re.search(r"=\s*!", source(cell)):
            found.append(f"cell {number} takes the output of a command, whose failure nothing would notice")
    return found


def test_all_are_there() -> None:
    assert {path.stem for path in NOTEBOOKS} == set(NAMES)


@_BY_NAME
def test_what_is_kept(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    assert not faults(notebook)
    assert len(text) < MOST_BYTES
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            assert not broken_links(source(cell), path)
    assert any(DETERMINISTIC in cell["metadata"].get("tags", ()) for cell in notebook["cells"])


@pytest.mark.slow
@pytest.mark.timeout(1500)  # against hanging: on a quiet machine none takes three minutes
@_BY_NAME
def test_notebook_runs(path: Path, tmp_path: Path) -> None:
    """In an empty folder; a cell or a command that fails is an error of :func:`tools.notebooks.execute`."""
    from tools import notebooks

    kept = notebooks.read(path)
    for was, now in zip(kept.cells, notebooks.execute(kept, tmp_path).cells, strict=True):
        if DETERMINISTIC in was.metadata.get("tags", ()):
            assert notebooks.printed(now) == notebooks.printed(was), was.source


# ---------------------------------------------------------------------------------------------------------------------
# The checks themselves


def small(*sources: str) -> Any:
    """A notebook of code cells."""
    import nbformat

    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in sources])


@pytest.mark.slow
@pytest.mark.parametrize("bad", ["1 / 0", "!exit 3", "!exit 3 | cat", "!no_such_command", "%%bash\nfalse\ntrue"])
def test_a_failing_cell_is_an_error(bad: str, tmp_path: Path) -> None:
    from nbclient.exceptions import CellExecutionError

    from tools import notebooks

    with pytest.raises(CellExecutionError):
        notebooks.execute(small("print('before')", bad), tmp_path)


@pytest.mark.slow
def test_what_execute_returns(tmp_path: Path) -> None:
    from tools import notebooks

    where = "import sys, os\nprint(sys.executable, os.listdir())"
    done = notebooks.execute(small(where, "!dpft --help", "1 + 1"), tmp_path)
    assert notebooks.printed(done.cells[0]) == f"{sys.executable} []"
    assert "usage: dpft" in notebooks.printed(done.cells[1]) and "\r" not in notebooks.printed(done.cells[1])
    assert notebooks.printed(done.cells[2]) == "2"
    assert [cell.execution_count for cell in done.cells] == [1, 2, 3]


def test_faults_are_seen() -> None:
    def cell(text: str, *outputs: dict[str, Any], tags: tuple[str, ...] = ()) -> dict[str, Any]:
        return {
            "cell_type": "code",
            "source": text,
            "outputs": list(outputs),
            "execution_count": 1,
            "metadata": {"tags": list(tags)},
        }

    def notebook(code: dict[str, Any]) -> dict[str, Any]:
        first, last = ({"cell_type": "markdown", "source": text} for text in ("# A\n", "## Next\n"))
        return {"metadata": {"kernelspec": {"name": "python3"}}, "cells": [first, code, last]}

    def stream(text: str, name: str = "stdout") -> dict[str, Any]:
        return {"output_type": "stream", "name": name, "text": text}

    assert not faults(notebook(cell("print(1)", stream("1\n"))))
    for bad in (
        cell("print(1)"),
        cell("!ls"),
        cell("x = 1", tags=(DETERMINISTIC,)),
        cell("print(1)", stream("1\n"), stream("careful\n", "stderr")),
        cell("print(1)", stream("/tmp/x/1\n")),
        cell("print(1)", stream("10%|##   |\n")),
        cell("print(1)", stream("1\r\n")),
        cell("1 / 0", {"output_type": "error"}),
        cell("x = !ls"),
        cell("print(1)", stream("1\n")) | {"execution_count": None},
    ):
        assert faults(notebook(bad)), bad
    assert faults({**notebook(cell("x = 1")), "cells": [cell("x = 1")]})


def test_all_are_in_the_navigation() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    section = nav.partition("  - Tutorials:\n")[2].partition("\n  - ")[0]
    assert re.findall(r"tutorials/(\w+)\.md$", section, re.MULTILINE) == list(NAMES)


@pytest.mark.slow
def test_page_of_a_notebook() -> None:
    """Slow, as nbconvert is only there to build the site."""
    import nbformat

    from tests.test_site import hook

    pages = hook("notebooks")
    text = nbformat.v4.new_markdown_cell("# A\n\nText, [b](b.ipynb#x), [c](../c.md).")
    done = nbformat.v4.new_code_cell("print('a')", outputs=[nbformat.v4.new_output("stream", text="a\n```\n")])
    drawn = nbformat.v4.new_code_cell(
        "draw()", outputs=[nbformat.v4.new_output("display_data", {"image/png": "eA==", "text/plain": "<Figure>"})]
    )
    script = nbformat.v4.new_code_cell("%%writefile x.py\nimport os")
    page, pictures = pages.page(nbformat.v4.new_notebook(cells=[text, done, drawn, script]), "a")
    assert page.lstrip().startswith("# A\n") and "](a.ipynb)" in page.splitlines()[2]
    assert "[b](b.md#x), [c](../c.md)" in page
    assert "````{.ipython3}\nprint('a')\n````" in page and "````{.text .printed}\na\n```\n````" in page
    assert list(pictures.values()) == [b"x"] and f"]({next(iter(pictures))})" in page and "<Figure>" not in page
    assert '````{.python title="x.py"}\nimport os\n````' in page and "writefile" not in page
