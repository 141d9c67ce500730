"""The two halves of the suite: a test that starts processes is marked `slow`, as far as its source tells."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
# Calls that start a process: those of the standard library's modules, and helpers by whatever name of a module.
STARTERS = {"Popen", "run", "call", "check_call", "check_output", "Process", "ProcessPoolExecutor", "Pool"}
OF_MODULES = {"subprocess", "multiprocessing", "futures"}
HELPERS = {"Popen", "ProcessPoolExecutor", "launch", "Campaign"}

Definition = ast.FunctionDef | ast.ClassDef


def starts(node: ast.AST) -> bool:
    """Whether a call in it starts a process."""
    for call in (n.func for n in ast.walk(node) if isinstance(n, ast.Call)):
        if isinstance(call, ast.Attribute):
            module = call.value.id if isinstance(call.value, ast.Name) else ""
            if (call.attr in STARTERS and module in OF_MODULES) or call.attr in HELPERS:
                return True
        elif isinstance(call, ast.Name) and call.id in HELPERS:
            return True
    return False


def names_in(node: ast.AST) -> set[str]:
    """Names that it uses or takes: of helpers that it calls, and of fixtures."""
    named = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    named |= {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
    return named | {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}


def starting(definitions: list[Definition], known: set[str]) -> set[str]:
    """Names of what starts processes by itself, through another of them, or through what is ``known`` to."""
    found = known | {d.name for d in definitions if starts(d)}
    while more := {d.name for d in definitions if names_in(d) & found} - found:
        found |= more
    return found


def is_slow(nodes: list[ast.expr]) -> bool:
    return any("pytest.mark.slow" in ast.unparse(node) for node in nodes)


def unmarked(source: str, known: Iterable[str] = ()) -> list[str]:
    """Tests of a module that start processes without the mark; ``known`` are fixtures of its conftest that do."""
    tree = ast.parse(source)
    marks = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "pytestmark"]
    if is_slow(marks):
        return []
    definitions = [n for n in tree.body if isinstance(n, Definition)]
    found = starting(definitions, set(known))
    wrong = []
    for definition in definitions:
        if is_slow(definition.decorator_list):
            continue
        methods = definition.body if isinstance(definition, ast.ClassDef) else [definition]
        tests = [m for m in methods if isinstance(m, ast.FunctionDef) and m.name.startswith("test_")]
        wrong += [t.name for t in tests if not is_slow(t.decorator_list) and (starts(t) or names_in(t) & found)]
    return wrong


def test_what_starts_processes_is_slow() -> None:
    files = sorted(TESTS.rglob("test_*.py"))
    assert len(files) > 30, "found no tests: this one looks in the wrong place"
    wrong = []
    for file in files:
        known: set[str] = set()
        for folder in (file.parent, *file.parent.parents):
            conftest = folder / "conftest.py"
            if folder.is_relative_to(TESTS) and conftest.exists():
                body = ast.parse(conftest.read_text()).body
                known |= starting([n for n in body if isinstance(n, Definition)], set())
        wrong += [f"{file.relative_to(TESTS)}::{name}" for name in unmarked(file.read_text(), known)]
    assert not wrong, f"mark them `@pytest.mark.slow`: {wrong}"


DIRECT = "import subprocess\ndef test_a():\n    subprocess.run(['true'])"
FIXTURE = "@pytest.fixture\ndef pool():\n    yield ProcessPoolExecutor(1)\n"
THROUGH = FIXTURE + "def helper(pool):\n    pass\ndef test_a():\n    helper(1)"


@pytest.mark.parametrize(
    "source",
    [
        DIRECT,
        THROUGH,
        FIXTURE + "def test_a(pool):\n    pass",
        FIXTURE + "@pytest.mark.usefixtures('pool')\ndef test_a():\n    pass",
        "class TestX:\n    def test_a(self):\n        launching.launch('ddp')",
        "def test_a(launched):\n    pass",
    ],
)
def test_checker_complains(source: str) -> None:
    assert unmarked(source, {"launched"}) == ["test_a"]


@pytest.mark.parametrize(
    "source",
    [
        f"pytestmark = pytest.mark.slow\n{DIRECT}",
        DIRECT.replace("def test_a", "@pytest.mark.slow  # a start of Python\ndef test_a"),
        "def test_a():\n    runner.run()\n    subprocess.CompletedProcess([], 0)",
        FIXTURE + "def test_a(tmp_path):\n    pass",
    ],
)
def test_checker_is_content(source: str) -> None:
    assert not unmarked(source)
