"""Every message that dpft raises or warns with has an entry in docs/troubleshooting.md, and every entry a message.

A message is read from the source, with ``…`` in place of what is filled in. An entry names messages by parts of them,
each alone on a list line in code font. A message has an entry if one of these parts occurs in it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"
HOLE = "…"
# Where the message of another call, or of another rank, is passed on; it is read there.
PASSED_ON = {"dpft/clipping/deferred_checks.py", "dpft/engines/ranks.py"}
# A part with fewer letters says too little: it must be the whole message.
LETTERS = 12
# A part that occurs in more messages than this explains none of them.
MOST = 5


def readable(node: ast.expr | None, module: ast.Module) -> list[str]:
    """What a message can be, with ``…`` where a value is filled in; empty if all of it is filled in."""
    if isinstance(node, ast.Name):  # a constant of the module
        found = [n.value for n in module.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == node.id]
        return [text for value in found for text in readable(value, module)]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):  # made by a function of the module
        made = [n for n in module.body if isinstance(n, ast.FunctionDef) and n.name == node.func.id]
        returned = [n.value for function in made for n in ast.walk(function) if isinstance(n, ast.Return)]
        return [text for value in returned for text in readable(value, module)]
    if isinstance(node, ast.IfExp):
        return [*readable(node.body, module), *readable(node.orelse, module)]
    text = " ".join(re.sub(rf"{HOLE}(\s*{HOLE})+", HOLE, rendered(node)).split())
    return [text] if re.search(r"[a-z]", text) else []


def rendered(node: ast.expr | None) -> str:
    """A string expression as text, with ``…`` for whatever is not constant."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[sdrg]", HOLE, node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(rendered(value) for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return rendered(node.left) + rendered(node.right)
    return HOLE


def message_of(call: ast.Call) -> ast.expr | None:
    """The argument that is a message, or None."""
    name = ast.unparse(call.func).rpartition(".")[2]
    if name == "refuse_if":  # of DeferredChecks
        return call.args[1]
    if (name.endswith("Error") or name in ("warn", "warning", "warning_once")) and call.args:
        return call.args[0]
    return None


def messages(source: str) -> Iterator[tuple[int, list[str]]]:
    """Line and text of every message in a source."""
    module = ast.parse(source)
    for node in ast.walk(module):
        if isinstance(node, ast.Call) and (message := message_of(node)) is not None:
            yield node.lineno, readable(message, module)


@cache
def all_messages() -> dict[str, str]:
    """Every message of dpft, and where it is."""
    found = {}
    for path in sorted((ROOT / "dpft").rglob("*.py")):
        where = path.relative_to(ROOT).as_posix()
        for line, texts in messages(path.read_text(encoding="utf-8")):
            assert texts or where in PASSED_ON, f"{where}:{line}: the message cannot be read from the source"
            found.update(dict.fromkeys(texts, f"{where}:{line}"))
    return found


def parts(page: str) -> list[str]:
    """The parts of messages that a page names."""
    return re.findall(r"^- `([^`]+)`$", page, re.MULTILINE)


def names(part: str, message: str) -> bool:
    """Whether a part of a message on the page stands for a message."""
    return part == message if len(re.sub(r"[^A-Za-z]", "", part)) < LETTERS else part in message


def without_entry(found: dict[str, str], page: str) -> list[str]:
    """Messages that no part on the page stands for."""
    listed = parts(page)
    return [f"{where}: {text}" for text, where in found.items() if not any(names(part, text) for part in listed)]


@cache
def page() -> str:
    """The page."""
    return PAGE.read_text(encoding="utf-8")


def test_every_message_has_an_entry() -> None:
    assert len(all_messages()) > 300  # a collection that finds nothing finds nothing missing
    missing = without_entry(all_messages(), page())
    assert not missing, "add to docs/troubleshooting.md:\n" + "\n".join(missing)


def test_every_part_is_of_some_message_and_not_of_too_many() -> None:
    listed = parts(page())
    assert len(set(listed)) == len(listed)
    counts = {part: sum(names(part, text) for text in all_messages()) for part in listed}
    assert not {part: count for part, count in counts.items() if not 1 <= count <= MOST}


def test_every_entry_names_a_message_and_explains_it() -> None:
    groups = page().split("\n## ")[1:]
    entries = [entry for group in groups if not group.startswith("Questions") for entry in group.split("\n### ")[1:]]
    assert len(entries) >= 60
    for entry in entries:
        title, _, body = entry.partition("\n")
        explained = [line for line in body.splitlines() if line and not line.startswith(("- `", "#"))]
        assert parts(body) and explained, title


@pytest.mark.parametrize(
    "source",
    [
        'raise ValueError("a message that nobody has explained")',
        'raise PrivacyConfigError(f"{name} is a message that nobody {has()} explained") from error',
        'def f(name):\n    return EngineError(f"{name}: a message " + "that nobody explained")',
        'logger.warning("a message of %s that nobody explained", name)',
        'checks.refuse_if(wrong, "a message that nobody has explained")',
        'TEXT = "a message that nobody has explained"\nraise ClippingError(TEXT)',
        'def f(x):\n    return f"a message {x} that nobody explained"\n\nraise LedgerError(f(1))',
        'raise ValueError(f"{value}; expected another")',
    ],
)
def test_a_message_without_an_entry_is_found(source: str) -> None:
    ((_, texts),) = [found for found in messages(source) if found[1]] or pytest.fail("not collected")
    assert texts and len(without_entry(dict.fromkeys(texts, "planted.py:1"), page())) == len(texts)
