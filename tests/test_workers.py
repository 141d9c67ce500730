"""Worker processes of the loader: a child that stops before its first instruction is forked again."""

from __future__ import annotations

import gc
import os
import resource
import signal
import time
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

import pytest
import torch

import dpft.workers
from tests.test_loader import batches, schedule
from tests.training import examples

STOPPING: list[Path] = []


def stop_once_a_file() -> None:
    """Stops this child for every file that is left, as the interpreter's own lock can."""
    for file in STOPPING:
        if file.exists():
            file.write_text(str(os.getpid()))
            file.rename(file.with_suffix(".stopped"))
            time.sleep(600)


os.register_at_fork(after_in_child=stop_once_a_file)


@pytest.fixture
def stopping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two files, each of which stops one child. The limit of half a second begins where a child has stopped.

    On a busy machine a child may need longer to come so far: it would be given up before it has stopped, or reported.
    """
    files = [tmp_path / f"child_{i}.waiting" for i in range(2)]
    stopped = 0

    def wait(reports: list[Any], within: float) -> list[Any]:
        nonlocal stopped
        until = time.monotonic() + 30
        while time.monotonic() < until and sum(not file.exists() for file in files) == stopped:
            if ready := wait_for(reports, 0.01):
                return ready
        stopped += 1
        return wait_for(reports, within)

    monkeypatch.setattr(dpft.workers, "REPORT_WITHIN", 0.5)
    monkeypatch.setattr(dpft.workers, "wait", wait)
    monkeypatch.setattr(dpft.workers, "fork_may_stop", lambda version: True)
    for file in files:
        file.touch()
    monkeypatch.setattr(f"{__name__}.STOPPING", files)
    return files


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_children_that_stop_are_forked_again(stopping: list[Path]) -> None:
    """Two children stop; every example still arrives once, and nothing of the two is left."""
    p = schedule()
    loader = dpft.PrivateDataLoader(examples(12), batches(p, 4), None, num_workers=2)
    without = dpft.PrivateDataLoader(examples(12), batches(p, 4), None)
    for found, expected in zip(loader, without, strict=True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
    assert all(gone(file) for file in stopping)


def gone(file: Path) -> bool:
    try:
        os.kill(int(file.with_suffix(".stopped").read_text()), 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_a_machine_on_which_no_child_starts_says_so(stopping: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dpft.workers, "TRIES", 2)
    context = dpft.workers.ReportingForkContext()
    gc.collect()  # what the tests before have left is not closed in between
    before = descriptors()
    process = context.Process(target=time.sleep, args=(600,))
    with pytest.raises(RuntimeError, match=r"2 worker processes in a row did not start within 0\.5 s.*num_workers=0"):
        process.start()
    assert descriptors() == before
    assert all(gone(file) for file in stopping)


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_an_interrupted_start_leaves_no_child(stopping: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any) -> Any:
        while not stopping[0].with_suffix(".stopped").exists():
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(dpft.workers, "wait", interrupted)
    before = descriptors()
    with pytest.raises(KeyboardInterrupt):
        dpft.workers.ReportingForkContext().Process(target=time.sleep, args=(600,)).start()
    assert descriptors() == before and gone(stopping[0])


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_children_that_others_reap(stopping: list[Path]) -> None:
    previous = signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    try:
        process = dpft.workers.ReportingForkContext().Process(target=time.sleep, args=(600,))
        process.start()
        assert process.is_alive()
        process.kill()
    finally:
        signal.signal(signal.SIGCHLD, previous)


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_a_child_that_was_given_up_never_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reports late: it could be ended within a queue, and leave the next one waiting for that queue's lock."""
    begun = tmp_path / "begun"
    waits: list[Any] = []

    def late(report: Any, within: float) -> Any:
        waits.append(within)
        time.sleep(0.2)  # it lives, has reported, and is not told so
        return [] if len(waits) == 1 else report

    monkeypatch.setattr(dpft.workers, "wait", late)
    process = dpft.workers.ReportingForkContext().Process(target=append, args=(begun,))
    process.start()
    process.join()
    assert len(waits) == 2 and process.exitcode == 0 and begun.read_text() == "begun "


def append(file: Path) -> None:
    with open(file, "a") as stream:
        stream.write("begun ")


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_more_files_than_select_knows() -> None:
    """Descriptors from 1,024 on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if soft < 2048 else soft, hard))
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        process = dpft.workers.ReportingForkContext().Process(target=time.sleep, args=(0,))
        process.start()
        process.join()
        assert process.exitcode == 0
    finally:
        for fd in files:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    "version, may_stop",
    [
        ((3, 10, 0), True),
        ((3, 10, 14), True),
        ((3, 10, 15), False),
        ((3, 11, 0), True),
        ((3, 11, 9), True),
        ((3, 11, 10), False),
        ((3, 12, 0), False),
        ((3, 14, 1), False),
    ],
)
def test_versions_that_need_it(version: tuple[int, int, int], may_stop: bool) -> None:
    assert dpft.workers.fork_may_stop(version) is may_stop


def test_elsewhere_torch_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dpft.workers, "fork_may_stop", lambda version: False)
    assert dpft.workers.worker_context() is None
    monkeypatch.setattr(dpft.workers, "fork_may_stop", lambda version: True)
    assert isinstance(dpft.workers.worker_context(), dpft.workers.ReportingForkContext)
    monkeypatch.setattr(dpft.workers.multiprocessing, "get_start_method", lambda allow_none: "spawn")
    assert dpft.workers.worker_context() is None, "a start method that its user chose stands"
