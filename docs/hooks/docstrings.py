"""Docstrings as Markdown: mkdocstrings shows the roles and code blocks of reStructuredText as they are."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|meth|attr|mod|data|exc):`~?([^`]+)`")
_CODE = re.compile(r"(?m)^(?P<indent> *)(?P<text>.*?)(?P<colons>::)\n\n(?P<code>(?:(?P=indent) +\S.*\n?|\s*\n)+)")


def _fenced(match: re.Match[str]) -> str:
    indent, text = match["indent"], match["text"]
    code = textwrap.indent(textwrap.dedent(match["code"]).strip("\n"), indent)
    said = f"{indent}{text}:\n\n" if text else ""
    return f"{said}{indent}```python\n{code}\n{indent}```\n\n"


def markdown(text: str) -> str:
    """A docstring's text with code blocks and names as Markdown has them."""
    text = _CODE.sub(_fenced, text + "\n").rstrip()
    return _ROLE.sub(r"`\1`", text)


class Docstrings(griffe.Extension):
    """Rewrites every docstring when it is loaded."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each object."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
