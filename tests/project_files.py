"""The files of the project, for the tests that read them all."""

from __future__ import annotations

import ast
import functools
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

_NOT_OURS = {".git", ".venv", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis", "__pycache__"}
_NOT_OURS |= {"build", "dist", "outputs"}
_TEXT = {"", ".cfg", ".ini", ".md", ".py", ".sh", ".toml", ".txt", ".yaml", ".yml"}


def module_name(path: Path) -> str:
    """Dotted name of a file below the project's root: ``dpft/rules/linear.py`` is ``dpft.rules.linear``."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def project_files() -> list[Path]:
    """Every file of the project that people write."""
    found: list[Path] = []
    for directory, folders, files in os.walk(ROOT):
        inner = [f for f in folders if f not in _NOT_OURS and not f.endswith(".egg-info")]
        folders[:] = [f for f in inner if directory != str(ROOT) or not f.startswith(".") or f in {".ci", ".github"}]
        found += [Path(directory, f) for f in files if Path(f).suffix in _TEXT and f not in _NOT_OURS]
    return sorted(found)


def python_files(*folders: str) -> list[Path]:
    return [p for p in project_files() if p.suffix == ".py" and p.relative_to(ROOT).parts[0] in folders]


@functools.lru_cache(maxsize=1)  # several rules read one file after another
def parsed(source: str) -> ast.Module:
    return ast.parse(source)


def report(complaints: list[str]) -> None:
    assert not complaints, "\n" + "\n".join(complaints)
