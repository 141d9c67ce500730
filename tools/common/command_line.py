"""What every command does alike: options with errors of one line, and progress on the error stream."""

from __future__ import annotations

import argparse
import sys
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the command line in one line, with status 2; shows the docstring as it is written."""

    def __init__(self, prog: str, description: str | None = None, **options: Any) -> None:
        as_written = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, description=description, formatter_class=as_written, **options)

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"{self.prog.split()[0]}: {message}\n")


def say(line: str) -> None:
    """Progress, to the terminal's error stream."""
    print(f"  ... {line}", file=sys.stderr, flush=True)
