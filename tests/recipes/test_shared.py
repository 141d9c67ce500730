"""What two recipes need is in recipes/finetune, once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
ALIKE = 6  # lines in a row, blank ones not counted, that may not stand in two files


def repeated(texts: Mapping[str, str]) -> list[tuple[str, set[str]]]:
    """The first of so many lines, and the files that have them."""
    places: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for name, text in texts.items():
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        for at in range(len(lines) - ALIKE + 1):
            places[tuple(lines[at : at + ALIKE])].add(name)
    return [(lines[0], files) for lines, files in places.items() if len(files) > 1]


def test_no_six_lines_stand_in_two_files_of_the_recipes() -> None:
    texts = {path.relative_to(RECIPES).as_posix(): path.read_text() for path in RECIPES.rglob("*.py")}
    assert len(texts) > 20
    assert not repeated(texts)


def test_what_is_repeated_is_found() -> None:
    lines = [f"line {n}" for n in range(ALIKE)]
    one, other = "\n".join(["first", *lines]), "\n\n".join(["other", *lines, "last"])
    assert repeated({"a.py": one, "b.py": other}) == [("line 0", {"a.py", "b.py"})]
    assert not repeated({"a.py": one, "b.py": "\n".join(lines[1:])})
