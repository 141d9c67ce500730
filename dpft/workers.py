"""How a DataLoader's worker processes are started.

They are forked, torch's default. In CPython before 3.10.15 and 3.11.10 a forked child deadlocks before its first
instruction if another thread is registering itself with the interpreter at the time of the fork, as threads of gloo
and of autograd do around every collective and every backward (https://github.com/python/cpython/issues/112275). The
training then waits for a batch for ever, and the other ranks wait for this one. On these versions each child therefore
has to report that it has started; one that does not is killed and forked again.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext, ForkContext, ForkProcess
from multiprocessing.popen_fork import Popen
from typing import Any

# Seconds that a forked child has to report. It takes milliseconds; one that is only slow is forked again needlessly.
REPORT_WITHIN = 10.0
TRIES = 6


def fork_may_stop(version: tuple[int, int, int]) -> bool:
    """Whether this version of CPython can leave a forked child waiting for a lock that no thread will release."""
    return version < (3, 10, 15) or (3, 11) <= version < (3, 11, 10)


def worker_context() -> BaseContext | None:
    """The argument of ``DataLoader(multiprocessing_context=)``: None, torch's default, wherever that is safe."""
    if not fork_may_stop(sys.version_info[:3]):
        return None
    method = multiprocessing.get_start_method(allow_none=True) or ("fork" if sys.platform == "linux" else "spawn")
    return ReportingForkContext() if method == "fork" else None


class _Reporting:
    """Wraps a process in its child: reports that the child runs, waits for the parent's go-ahead, runs the process."""

    def __init__(self, process: Any, report_to: int, go_from: int, parents: tuple[int, int]) -> None:
        self._process, self._report_to, self._go_from, self._parents = process, report_to, go_from, parents

    def _bootstrap(self, **given: Any) -> int:
        for fd in self._parents:
            os.close(fd)
        os.write(self._report_to, b"1")
        os.close(self._report_to)
        # A child that the parent has given up must not begin: it could be killed while it holds the lock of a queue.
        may_go = os.read(self._go_from, 1)
        os.close(self._go_from)
        return int(self._process._bootstrap(**given)) if may_go else 1


class ReportingPopen(Popen):
    """Forks as ``multiprocessing`` does, repeatedly until a child reports."""

    def _launch(self, process_obj: Any) -> None:
        for _ in range(TRIES):
            if self._reports(process_obj):
                return
        raise RuntimeError(
            f"{TRIES} worker processes in a row did not start within {REPORT_WITHIN:g} s each; the machine is "
            "overloaded or out of memory, or an os.register_at_fork handler blocks. Pass num_workers=0 to load the "
            "examples in the training process."
        )

    def _reports(self, process_obj: Any) -> bool:
        """Fork once; whether the child reported. One that did not is killed before this returns or raises."""
        self.pid, reported = 0, False
        report, report_to = os.pipe()
        go_from, go = os.pipe()
        child = _Reporting(process_obj, report_to, go_from, (report, go))
        try:
            try:
                super()._launch(child)  # type: ignore[misc]  # typeshed lacks it
            finally:
                os.close(report_to)
                os.close(go_from)
            reported = bool(wait([report], REPORT_WITHIN))
            if reported:
                with contextlib.suppress(BrokenPipeError):  # the child has exited, which its owner will see
                    os.write(go, b"1")
        finally:
            os.close(report)
            os.close(go)
            if not reported:
                self._give_up()
        return reported

    def _give_up(self) -> None:
        """Kill the child: a deadlocked one would keep what it inherited, such as the ledger's lock, for ever."""
        if self.pid > 0:
            self._send_signal(signal.SIGKILL)  # type: ignore[attr-defined]  # typeshed lacks it
            self.poll(0)  # does not fail if another caller has reaped it
            self.returncode = None
        if self.finalizer is not None:
            self.finalizer()  # closes the pipes that multiprocessing made
            self.finalizer = None


class ReportingForkProcess(ForkProcess):
    """A forked process that is known to have started once ``start()`` returns."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        return ReportingPopen(process_obj)


class ReportingForkContext(ForkContext):
    """``multiprocessing``'s fork context with :class:`ReportingForkProcess`."""

    Process = ReportingForkProcess
