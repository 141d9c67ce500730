"""``dpft recipes``: the recipes, copied from the installed package into a folder of the user's."""

from __future__ import annotations

import argparse
import shlex
import shutil
from pathlib import Path
from typing import Any

COPIED = ("recipes", "accelerate_config.yaml")  # as docs and recipes name them from the folder of a checkout


def add_to(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser("recipes", help="copy the recipes into a folder of yours")
    command.add_argument("--to", default=".", help="folder that gets recipes/ (default: this one)", metavar="DIR")
    command.set_defaults(run=copy)


def source() -> Path:
    """The folder that has what is copied: ``dpft/_recipes`` of a wheel, or the root of a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "_recipes"
    return installed if installed.is_dir() else package.parent


def copy(args: argparse.Namespace) -> str:
    """Copy; nothing that exists is overwritten.

    Raises:
        FileExistsError: something of that name is there.
        FileNotFoundError: dpft was installed without its recipes.
        NotADirectoryError: the target is a file.
    """
    origin, target = source(), Path(args.to).expanduser()
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"--to is {args.to}, a file; expected a folder, which may be new")
    for name in COPIED:
        if not (origin / name).exists():
            raise FileNotFoundError(f"{origin} has no {name}; expected the recipes. Install dpft again.")
        if (target / name).exists():
            raise FileExistsError(f"{target / name} exists and is not overwritten. Name another folder with --to.")
    target.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        if (origin / name).is_dir():
            shutil.copytree(origin / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(origin / name, target / name)
    enter = "" if args.to == "." else f"cd {shlex.quote(str(target))} && "
    copied = ", ".join(str(target / name) for name in COPIED)
    return f"copied: {copied}\nstart:  {enter}accelerate launch recipes/llama_dp.py"
