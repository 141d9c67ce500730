"""How a DataLoader's worker processes are started.

They are forked, as torch does where nothing else is asked for. In CPython before 3.10.15 and 3.11.10 the child of a
fork stops for ever before its first instruction if another thread was just registering itself with the interpreter,
which threads of gloo and of autograd do around every collective and every backward
(https://github.com/python/cpython/issues/112275). The training then waits for a batch, and the other ranks for this
one. So on these versions a child has to report, and one that does not is ended and forked again.
"""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import sys
from multiprocessing.context import BaseContext, ForkContext, ForkProcess
from multiprocessing.popen_fork import Popen
from typing import Any

# Seconds in which a forked child has to report. It takes milliseconds; one that is only slow is forked again in vain.
REPORT_WITHIN = 10.0
TRIES = 6


def fork_may_stop(version: tuple[int, int, int]) -> bool:
    """Whether this version of CPython can leave a forked child waiting for a lock that nobody holds any more."""
    return version < (3, 10, 15) or (3, 11) <= version < (3, 11, 10)


def worker_context() -> BaseContext | None:
    """For ``DataLoader(multiprocessing_context=)``: None, torch's own choice, wherever that is sound."""
    if not fork_may_stop(sys.version_info[:3]):
        return None
    method = multiprocessing.get_start_method(allow_none=True) or ("fork" if sys.platform == "linux" else "spawn")
    return ReportingForkContext() if method == "fork" else None


class _Reporting:
    """Stands in for a process in its child: says that it lives, and then does what it was made for."""

    def __init__(self, process: Any, report: int, report_to: int) -> None:
        self._process, self._report, self._report_to = process, report, report_to

    def _bootstrap(self, **given: Any) -> int:
        os.write(self._report_to, b"1")
        os.close(self._report_to)
        os.close(self._report)
        return int(self._process._bootstrap(**given))


class ReportingPopen(Popen):
    """Forks as ``multiprocessing`` does, until a child reports."""

    def _launch(self, process_obj: Any) -> None:
        for _ in range(TRIES):
            report, report_to = os.pipe()
            try:
                super()._launch(_Reporting(process_obj, report, report_to))  # type: ignore[misc]  # typeshed lacks it
            finally:
                os.close(report_to)
                reported = select.select([report], [], [], REPORT_WITHIN)[0]
                os.close(report)
            if reported:
                return  # it lives; or it has ended, which its owner will see
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            if self.finalizer is not None:
                self.finalizer()  # closes the pipes of the child that is gone
        raise RuntimeError(
            f"{TRIES} worker processes in a row did not start within {REPORT_WITHIN:g} s each; the machine has no "
            "time or memory for them, or a handler of os.register_at_fork waits. Pass num_workers=0 to load the "
            "examples in the training's own process."
        )


class ReportingForkProcess(ForkProcess):
    """A forked process that is known to have started once ``start()`` returns."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        return ReportingPopen(process_obj)


class ReportingForkContext(ForkContext):
    """``multiprocessing``'s fork context with :class:`ReportingForkProcess`."""

    Process = ReportingForkProcess
