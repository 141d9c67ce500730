"""check_models.py: the command line, every family in a process of its own, the table and the JSON."""

from __future__ import annotations

import argparse
import queue
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.common.command_line import Parser, say
from tools.common.conditions import conditions
from tools.common.json_files import json_path, write_json
from tools.common.worker import Worker, WorkerError
from tools.models.building import LISTS, Family, families
from tools.models.checking import CHECKED, CRASH, STRATEGIES, WRONG, check
from tools.models.report import markdown, one_line, summary

PRELOAD = ("torch", "transformers", "dpft", "tools.models.checking")


def main(description: str | None, arguments: list[str] | None = None) -> int:
    """Read the command line, check the families and write what was found; returns the exit status.

    0 where every strategy of every family is exact or refused, 1 where one is wrong or crashes.
    """
    parser = Parser("check_models", description)
    parser.add_argument("--list", choices=list(LISTS), default="causal_lm", help="which families (default: causal_lm)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="model types, of the list")
    parser.add_argument("--jobs", type=int, default=2, help="families at a time (default: 2)")
    parser.add_argument("--seconds", type=float, default=120.0, help="that a family may take (default: 120)")
    parser.add_argument("--json", type=json_path, metavar="PATH", help="everything that was found")
    parser.add_argument("--markdown", type=markdown_path, metavar="PATH", help="the table")
    args = parser.parse_args(arguments)
    if args.jobs < 1:
        parser.error(f"--jobs is {args.jobs}; expected 1 or more")
    chosen = [family for head in LISTS[args.list] for family in families(head)]
    if args.only:
        unknown = sorted(set(args.only) - {family.model_type for family in chosen})
        if unknown:
            parser.error(f"--only {' '.join(unknown)}: not in the list {args.list}")
        chosen = [family for family in chosen if family.model_type in args.only]
    found = conditions(threads=1)
    rows = check_all(chosen, args.jobs, args.seconds)
    report = {"conditions": found, "list": args.list, "families": rows}
    if args.json:
        write_json(args.json, report)
    if args.markdown:
        args.markdown.write_text(markdown(report), encoding="utf-8")
    print("\n".join(summary(rows)))
    return int(any(failed(row) for row in rows))


def markdown_path(text: str) -> Path:
    """A command line's path for the table.

    Raises:
        argparse.ArgumentTypeError: another suffix than ``.md``, or no such folder.
    """
    path = Path(text)
    if path.suffix != ".md" or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not a file in a folder that exists whose name ends in .md")
    return path


def failed(row: dict[str, Any]) -> bool:
    """Whether a strategy gave something else than the oracle, or crashed."""
    if row["status"] == CRASH:
        return True
    statuses = [row["strategies"][s]["status"] for s in STRATEGIES] if row["status"] == CHECKED else []
    return WRONG in statuses or CRASH in statuses


def check_all(chosen: Sequence[Family], jobs: int, seconds: float) -> list[dict[str, Any]]:
    """Each family in a process of its own, ``jobs`` at a time; in the order given."""
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for i in range(len(chosen)):
        waiting.put(i)
    rows: list[dict[str, Any] | None] = [None] * len(chosen)
    starting = threading.Lock()

    def work() -> None:
        while True:
            try:
                i = waiting.get_nowait()
            except queue.Empty:
                return
            row = check_apart(chosen[i], seconds, starting)
            rows[i] = row
            say(f"{sum(r is not None for r in rows)}/{len(rows)} {one_line(row)}")

    threads = [threading.Thread(target=work) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [row for row in rows if row is not None]


def check_apart(family: Family, seconds: float, starting: threading.Lock) -> dict[str, Any]:
    """:func:`check` in a process, which is ended when its time is over; a process that dies is a crash."""
    began = time.monotonic()
    with starting:  # the fork server is started by the first
        worker = Worker(str(family), preload=PRELOAD, threads=1)
    try:
        row: dict[str, Any] = worker.ask(check, family.model_type, family.head, family.class_name, seconds=seconds)
    except WorkerError as error:
        row = {"model_type": family.model_type, "head": family.head, "class": family.class_name}
        row |= {"status": CRASH, "reason": str(error)}
    finally:
        worker.end()
    return {**row, "seconds": time.monotonic() - began}
