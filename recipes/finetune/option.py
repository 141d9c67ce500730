"""One option of a recipe: a field of a dataclass, with what ``parsing.py`` needs to read it."""

from __future__ import annotations

from dataclasses import field, fields
from typing import Any


def option(default: Any, group: str, help: str, *, also: tuple[str, ...] = (), **kwargs: Any) -> Any:
    """A dataclass field that is an option: its default, its group in ``--help``, other names, argparse's keywords."""
    return field(default=default, metadata={"group": group, "help": help, "also": also, "argparse": kwargs})


def again(options: type[Any], name: str, default: Any) -> Any:
    """The option of another recipe with another default, for a dataclass that inherits its options."""
    return field(default=default, metadata=next(f.metadata for f in fields(options) if f.name == name))
