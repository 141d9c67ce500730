"""One mutation: what is changed, and which tests must notice."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One mistake.

    Attributes:
        name: on the command line.
        what: goes wrong.
        file: of the project.
        old: a text that occurs once in it.
        new: what is put in its place.
        tests: of pytest, one of which must fail.
    """

    name: str
    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
