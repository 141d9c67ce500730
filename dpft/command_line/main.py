"""The parser of ``dpft`` and its commands."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from dpft.command_line import accounting, environment, planning, recipes
from dpft.errors import DPFTError


class _OneLine(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> None:  # type: ignore[override]  # argparse says NoReturn; exit() does not return
        self.exit(2, f"{self.prog}: error: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser; each command has set ``run``, a function from the parsed arguments to what is printed."""
    parser = _OneLine(prog="dpft", description="Differentially private fine-tuning: figures without a training run.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for part in (accounting, planning, environment, recipes):
        part.add_to(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit status is 0, or 2 with one line on standard error if it cannot be carried out."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        text = args.run(args)
    except (DPFTError, ValueError, OSError, ImportError) as error:
        print(f"dpft: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    try:
        print(text, flush=True)
    except BrokenPipeError:  # as of `| head`; the interpreter would complain once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
