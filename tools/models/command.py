"""check_models.py: the command line, every row in a process of its own, the table and the JSON."""

from __future__ import annotations

import argparse
import queue
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.common.command_line import Parser, say
from tools.common.conditions import conditions, versions
from tools.common.json_files import json_path, write_json
from tools.common.worker import Worker, WorkerError
from tools.models.checking import CRASH, check
from tools.models.lists import LISTS, Subject, subjects
from tools.models.report import is_bad, markdown, one_line, summary, trimmed

PRELOAD = ("torch", "transformers", "dpft", "tools.models.checking")


def main(description: str | None, arguments: list[str] | None = None) -> int:
    """Read the command line, check the rows and write what was found; returns the exit status.

    0 where every strategy of every row is exact or refused, 1 where one is wrong or crashes.
    """
    parser = Parser("check_models", description)
    parser.add_argument("--list", choices=list(LISTS), default="causal_lm", help="of what (default: causal_lm)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="model types and adapters, of the list")
    parser.add_argument("--jobs", type=int, default=2, help="rows at a time (default: 2)")
    parser.add_argument("--seconds", type=float, default=120.0, help="that a row may take (default: 120)")
    parser.add_argument("--json", type=json_path, metavar="PATH", help="everything that was found")
    parser.add_argument("--markdown", type=markdown_path, metavar="PATH", help="the table")
    args = parser.parse_args(arguments)
    if args.jobs < 1:
        parser.error(f"--jobs is {args.jobs}; expected 1 or more")
    chosen = subjects(args.list)
    if args.only:
        unknown = sorted(set(args.only) - {subject.name for subject in chosen})
        if unknown:
            parser.error(f"--only {' '.join(unknown)}: not in the list {args.list}")
        chosen = [subject for subject in chosen if subject.name in args.only]
    found = conditions(threads=1)
    found["versions"] |= versions(("peft", "bitsandbytes", "torchao"))
    rows = check_all(chosen, args.jobs, args.seconds)
    report = {"conditions": found, "list": args.list, "rows": rows}
    if args.json:
        write_json(args.json, report)
    if args.markdown:
        args.markdown.write_text(markdown(report), encoding="utf-8")
    print("\n".join(summary(rows)))
    return int(any(is_bad(row) for row in rows))


def markdown_path(text: str) -> Path:
    """A command line's path for the table.

    Raises:
        argparse.ArgumentTypeError: another suffix than ``.md``, or no such folder.
    """
    path = Path(text)
    if path.suffix != ".md" or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not a file in a folder that exists whose name ends in .md")
    return path


def check_all(chosen: Sequence[Subject], jobs: int, seconds: float) -> list[dict[str, Any]]:
    """Each row in a process of its own, ``jobs`` at a time; in the order given."""
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
            began = time.monotonic()
            row = trimmed(check_apart(chosen[i], seconds, starting))
            rows[i] = row
            say(f"{sum(r is not None for r in rows)}/{len(rows)} {one_line(row)} ({time.monotonic() - began:.0f} s)")

    threads = [threading.Thread(target=work) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [row for row in rows if row is not None]


def check_apart(subject: Subject, seconds: float, starting: threading.Lock) -> dict[str, Any]:
    """:func:`check` in a process, which is ended when its time is over; a process that dies is a crash."""
    with starting:  # the fork server is started by the first
        worker = Worker(str(subject), preload=PRELOAD, threads=1)
    try:
        row: dict[str, Any] = worker.ask(check, subject, seconds=seconds)
    except WorkerError as error:
        row = {"name": subject.name, "head": subject.head, "class": subject.class_name}
        row |= {"status": CRASH, "reason": str(error)}
    finally:
        worker.end()
    return row
