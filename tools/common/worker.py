"""One process that does as it is told: forked from a server that has imported the libraries and run nothing.

A start costs a fork, and each process begins with an empty allocator. What a process is asked is answered with a value,
or with one line of reason where it failed; a process that dies, runs out of memory or takes too long is noticed, and
takes nothing with it but its own answer.

    with Worker("one_pass", preload=["torch"], threads=2) as worker:
        worker.ask(Case, shape, "cpu")          # a class: the process makes an object of it, and keeps it
        seconds = worker.ask("time", 0)         # a method of that object
        plan = worker.ask(predict, shape)       # a function of a module
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn

import torch

from tools.common.failures import out_of_memory, reason_of
from tools.common.processes import end_process

ROOT = Path(__file__).resolve().parents[2]
KILLED = -signal.SIGKILL
What = Callable[..., Any] | str


class WorkerError(RuntimeError):
    """What a worker was asked failed; the text is one line of reason.

    Attributes:
        out_of_memory: an allocation failed.
        status: the exit status of a process that died, -9 where it was killed; None where it did not die.
    """

    def __init__(self, reason: str, out_of_memory: bool = False, status: int | None = None) -> None:
        super().__init__(reason)
        self.out_of_memory, self.status = out_of_memory, status


class Worker:
    """The parent's side of one process, which lives until :meth:`end`, or until its parent dies.

    Args:
        label: the name of the process.
        preload: modules that the fork server imports. It has those of the first worker of this program, since it is
            started once; what it does not have, a process imports itself.
        threads: of torch.
        log: a file for what the process prints, with the tracebacks of what fails; without one it is discarded.
    """

    def __init__(self, label: str, *, preload: Sequence[str], threads: int, log: Path | None = None) -> None:
        _start_server(preload)
        context = multiprocessing.get_context("forkserver")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, threads, os.devnull if log is None else str(log)), name=label, daemon=True
        )
        self._process.start()
        theirs.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def send(self, what: What, *arguments: Any) -> None:
        """Give a command, which :meth:`receive` has the answer of.

        Args:
            what: a class of a module, of which the process makes and keeps an object, and answers None; a function of
                a module; or the name of a method of the object.
        """
        with contextlib.suppress(BrokenPipeError):  # a process that died is noticed where its answer is due
            self._connection.send((what, arguments))

    def receive(self, seconds: float | None = None, hear: Callable[[str], None] = lambda words: None) -> Any:
        """The answer to the command given.

        Args:
            seconds: that it may take; None for any time.
            hear: called with what the process says by :func:`report` before it answers.

        Raises:
            WorkerError: it failed; or it took longer, or the process died: then the process has ended.
        """
        limit = None if seconds is None else time.monotonic() + seconds
        while True:
            if not self._connection.poll(None if limit is None else max(0.0, limit - time.monotonic())):
                self.end()
                raise WorkerError(f"stopped after {seconds:.0f} s")
            try:
                kind, value = self._connection.recv()
            except (EOFError, ConnectionResetError):
                self._died()
            if kind == "report":
                hear(value)
            elif kind == "failure":
                raise WorkerError(*value)
            else:
                return value

    def ask(
        self,
        what: What,
        *arguments: Any,
        seconds: float | None = None,
        hear: Callable[[str], None] = lambda words: None,
    ) -> Any:
        """:meth:`send` and :meth:`receive`."""
        self.send(what, *arguments)
        return self.receive(seconds, hear)

    @property
    def alive(self) -> bool:
        """Whether the process is there."""
        return self._process.is_alive()

    def end(self) -> None:
        """End the process, whatever it is doing."""
        self._connection.close()
        end_process(self._process)

    def _died(self) -> NoReturn:
        self._process.join(10)
        status = self._process.exitcode
        self.end()
        killed = " (killed, as the system does where memory runs out)" * (status == KILLED)
        raise WorkerError(f"its process ended with status {status}{killed}", status=status) from None


def end_all(workers: Iterable[Worker]) -> None:
    """End several."""
    for worker in workers:
        worker.end()


def _start_server(preload: Sequence[str]) -> None:
    """Start the fork server of this program, unless it runs.

    It is a Python of its own that looks for modules where it is started, not where this program found them, and passes
    over in silence what it cannot import: from another directory than the project's root it would preload nothing of
    ``tools``, or what somebody else calls ``tools``. The processes themselves begin where this program is.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(preload))
    before = os.getcwd()
    os.chdir(ROOT)
    try:
        forkserver.ensure_running()
    finally:
        os.chdir(before)


# ---------------------------------------------------------------------------------------------------------------------
# In the process

_parent: Connection | None = None


def report(words: str) -> None:
    """Tell the parent what this process is at: its ``hear`` is called with it. Outside of a worker nobody hears it."""
    if _parent is not None:
        with contextlib.suppress(BrokenPipeError):
            _parent.send(("report", words))


def _serve(connection: Connection, threads: int, log: str) -> None:
    """Answer commands until the other end closes."""
    global _parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its children
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open(log, "w") as file:  # by file descriptors, since libraries print from C++
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(threads)
    _parent = connection
    kept: Any = None
    while True:
        try:
            command = connection.recv_bytes()
        except EOFError:
            return
        try:
            what, arguments = pickle.loads(command)
            if isinstance(what, str):
                value = getattr(kept, what)(*arguments)
            elif isinstance(what, type):
                kept = value = None
                kept = what(*arguments)
            else:
                value = what(*arguments)
            answer = pickle.dumps(("value", value))
        except Exception as error:  # whatever a library raises is a result of the measurement
            traceback.print_exc()
            answer = pickle.dumps(("failure", (reason_of(error), out_of_memory(error))))
        sys.stdout.flush()  # the parent may end this process when it has the answer
        try:
            connection.send_bytes(answer)
        except BrokenPipeError:
            return


def _end_with_parent() -> None:
    """End this process when its parent dies: one that is killed cannot end its children itself."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
