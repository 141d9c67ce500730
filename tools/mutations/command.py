"""mutate.py: its command line, and the run of one mutation on a copy of the project."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tools.common.command_line import Parser
from tools.common.conditions import conditions
from tools.common.json_files import json_path, write_json
from tools.mutations.catalogue import MUTATIONS
from tools.mutations.mutation import Mutation

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("dpft", "tests", "tools", "recipes", "pyproject.toml", "setup.cfg", "accelerate_config.yaml")
LIMIT = 600.0  # seconds for the tests of one mutation
FAILED_TESTS = 1  # pytest's status where tests ran and some failed


def parse(description: str | None, arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    names = [mutation.name for mutation in MUTATIONS]
    parser = Parser("mutate", description)
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help="these alone")
    parser.add_argument("--list", action="store_true", help="say what they are, and stop")
    parser.add_argument("--jobs", type=int, default=1, help="mutations at a time (default 1)")
    parser.add_argument("--json", type=json_path, help="where the table goes as JSON")
    return parser.parse_args(arguments)


def mutated(mutation: Mutation, text: str) -> str:
    """The changed text of the mutation's file.

    Raises:
        ValueError: what is to be replaced is not there exactly once.
    """
    if text.count(mutation.old) != 1:
        raise ValueError(
            f"{mutation.name}: {mutation.file} has {mutation.old!r} {text.count(mutation.old)} times; expected once. "
            "Bring the mutation up to date."
        )
    return text.replace(mutation.old, mutation.new)


def tested(mutation: Mutation, tests: Sequence[str], change: bool) -> tuple[int, str]:
    """Pytest's status and output on a copy of the project, with or without the mutation."""
    with tempfile.TemporaryDirectory(prefix="dpft-mutation-") as folder:
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, Path(folder, name), ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, folder)
        file = Path(folder, mutation.file)
        if change:
            file.write_text(mutated(mutation, file.read_text()))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n0", *tests]
        environment = {**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
            )
            return done.returncode, done.stdout
        except subprocess.TimeoutExpired:
            return -1, f"its tests did not end in {LIMIT:.0f} s"


def run(mutation: Mutation) -> dict[str, Any]:
    """Run the mutation's tests; it is caught if one fails that passes without it."""
    began = time.monotonic()
    status, output = tested(mutation, mutation.tests, change=True)
    failed = [
        line.split(" - ")[0].removeprefix("FAILED ") for line in output.splitlines() if line.startswith("FAILED")
    ]
    row = {"name": mutation.name, "file": mutation.file, "what": mutation.what, "caught": status == FAILED_TESTS}
    row |= {"by": failed[:1], "seconds": time.monotonic() - began}
    if row["caught"] and tested(mutation, failed[:1], change=False)[0] != 0:
        row |= {"caught": False, "reason": f"{failed[0]} fails without the mutation, too"}
    if status not in (0, FAILED_TESTS):
        row["reason"] = f"pytest ended with status {status}: {output[-600:]}"
    return row


def execute(args: argparse.Namespace) -> int:
    """Run the mutations; 1 if one was not caught."""
    chosen = [mutation for mutation in MUTATIONS if args.only is None or mutation.name in args.only]
    if args.list:
        for mutation in chosen:
            print(f"{mutation.name:32} {mutation.file:32} {mutation.what}")
        return 0
    rows: list[dict[str, Any]] = []
    for row in ThreadPoolExecutor(args.jobs).map(run, chosen):  # each waits for a process
        rows.append(row)
        verdict = "caught by " + (rows[-1]["by"] or ["?"])[0] if rows[-1]["caught"] else "SURVIVED"
        print(f"{row['name']:32} {verdict} {rows[-1].get('reason', '')}", flush=True)
        if args.json:
            caught = sum(row["caught"] for row in rows)
            write_json(args.json, {"conditions": conditions(1), "caught": caught, "of": len(rows), "mutations": rows})
    survived = [row["name"] for row in rows if not row["caught"]]
    print(
        f"{len(rows) - len(survived)} of {len(rows)} caught"
        + (f"; survived: {', '.join(survived)}" if survived else "")
    )
    return int(bool(survived))
