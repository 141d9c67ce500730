"""What workers are asked in tests: functions and a class of a module, as a process finds them again."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from tools.common.worker import Worker, report


class Counter:
    """Counts from a start."""

    def __init__(self, start: int) -> None:
        if start < 0:
            raise ValueError("start is below 0\nand a second line")
        self.count = start

    def add(self, number: int) -> int:
        self.count += number
        return self.count


def told(steps: int) -> int:
    for step in range(steps):
        report(f"step {step}")
    return steps


def allocate(size: int) -> None:
    torch.empty(size)


def unsendable() -> Any:
    return lambda: None


def leave(status: int) -> None:
    os._exit(status)


def kill_oneself() -> None:
    report("nearly done")
    os.kill(os.getpid(), signal.SIGKILL)


def sleep() -> None:
    time.sleep(600)


def ignore_signals() -> None:
    """As a library that is in C++ for long does."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def say(words: str) -> None:
    print(words)
    os.system(f"echo {words} in C")


def facts(module: str) -> dict[str, Any]:
    """Of the process: whether it had a module before it was asked, its threads, where it is."""
    return {"loaded": module in sys.modules, "threads": torch.get_num_threads(), "cwd": str(Path.cwd())}


def pid() -> int:
    return os.getpid()


def worker_that_outlives() -> None:
    """A program that prints the id of a worker that is busy, and is then killed."""
    worker = Worker("busy", preload=[], threads=1)
    print(worker.ask(pid), flush=True)
    worker.send(sleep)
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt(seconds: float) -> threading.Thread:
    """Ctrl-C for this program, later."""
    thread = threading.Thread(target=lambda: (time.sleep(seconds), os.kill(os.getpid(), signal.SIGINT)))
    thread.start()
    return thread
