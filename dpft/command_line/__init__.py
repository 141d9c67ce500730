"""``dpft`` on the command line: thin commands over the public functions, one clear line for every wrong input."""

from __future__ import annotations

from dpft.command_line.main import main

__all__ = ["main"]
