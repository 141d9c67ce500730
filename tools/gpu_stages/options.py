"""The command line of gpu.py."""

from __future__ import annotations

import argparse
from pathlib import Path

from tools.common.command_line import Parser
from tools.gpu_stages.stages import NAMES


def parse(description: str | None, arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; ends with status 2 and one line where it is wrong."""
    parser = Parser("gpu", description)
    parser.add_argument("--list", action="store_true", help="say what the stages are, and stop")
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="STAGE", help="these alone")
    parser.add_argument("--skip", action="store_true", help="leave out stages that have a result in --output")
    parser.add_argument("--seconds", type=float, default=500.0, help="for all stages (default 500)")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny shapes")
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu"), help="folder (default outputs/gpu)")
    parser.add_argument("--stage", choices=NAMES, help=argparse.SUPPRESS)  # in the process of one stage
    args = parser.parse_args(arguments)
    if not args.seconds > 0:
        parser.error(f"--seconds is {args.seconds:g}; expected a number above 0")
    return args
