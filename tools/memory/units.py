"""How the reports write amounts and lists: units of memory, spreads, counted nouns, wrapped names."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Unit:
    """A unit of memory: its name, and how many MiB it is."""

    name: str
    mb: float

    def of(self, mb: float) -> float:
        """That many MiB in this unit."""
        return mb / self.mb

    def text(self, mb: float) -> str:
        """The number without the unit, to about three places."""
        value = self.of(mb)
        digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 9.95 else 2
        return f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0: no minus before a number that is shown as 0


def unit_for(amounts_mb: Iterable[float]) -> Unit:
    """The unit in which the largest of these amounts, in MiB, reads best: GiB, MiB or KiB."""
    most = max((abs(mb) for mb in amounts_mb), default=0.0)
    if most >= 1024:
        return Unit("GiB", 1024.0)
    return Unit("MiB", 1.0) if most >= 1 or most == 0 else Unit("KiB", 1 / 1024)


def spread_text(values: Mapping[str, Any] | None, digits: int = 1) -> str:
    """A median with its range, or a dash."""
    if values is None:
        return "-"
    text = f"{values['median']:.{digits}f}"
    least, most = (f"{values[key]:.{digits}f}" for key in ("min", "max"))
    return text if least == most else f"{text} ({least} to {most})"


def grouped(reasons: Mapping[str, str]) -> str:
    """Names with the reason of each, those of the same reason together."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(those)} ({reason})" for reason, those in names.items())


def wrapped_name(name: str, width: int = 13) -> str:
    """A name in lines of at most ``width`` characters, cut after an underscore where there is one."""
    lines = textwrap.wrap(name.replace("_", "_ "), width + 1)
    return "\n".join(line.replace("_ ", "_") for line in lines)


def counted(number: int, word: str) -> str:
    """``1 thread``, ``2 threads``."""
    return f"{number} {word}{'s' * (number != 1)}"
