"""Reports as JSON files: written whole, with numbers that a person can read."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any


def rounded(value: Any) -> Any:
    """Fractions to five significant places, so that the file can be read; infinite and NaN as text."""
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if abs(value) < float("inf") else str(value)
    return value


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write the whole file under another name, then give it its own: a reader never meets half of it."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        part.write_text(json.dumps(rounded(report), indent=1, allow_nan=False) + "\n")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def json_path(text: str) -> Path:
    """A command line's path for the result: found out before anything is measured that it cannot be written.

    Raises:
        argparse.ArgumentTypeError: another suffix than ``.json``, or a place where nothing can be written.
    """
    path = Path(text)
    if path.suffix != ".json" or path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not a file whose name ends in .json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: {error}") from error
    return path
