"""tools/common/worker.py on real processes: what they answer, and how one that fails, dies or hangs is noticed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.tools.common import commands
from tools.common.worker import Worker, WorkerError

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[3]
PRELOAD = ["torch", "tools.common.worker", "tests.tools.common.commands"]


def start(log: Path | None = None) -> Worker:
    return Worker("tested", preload=PRELOAD, threads=1, log=log)


@pytest.fixture
def worker() -> Iterator[Worker]:
    with start() as started:
        yield started
    assert not started.alive


def test_it_keeps_an_object_and_calls_functions(worker: Worker) -> None:
    assert worker.ask(commands.Counter, 3) is None
    assert worker.ask("add", 2) == 5
    assert worker.ask(commands.facts, "torch")["threads"] == 1
    assert worker.ask("add", 2) == 7


def test_a_failure_is_one_line_and_the_process_goes_on(worker: Worker) -> None:
    for what, arguments, reason in (
        (commands.Counter, (-1,), "ValueError: start is below 0"),
        ("add", (1,), "AttributeError: 'NoneType' object has no attribute 'add'"),
        (commands.unsendable, (), "AttributeError: Can't "),
    ):
        with pytest.raises(WorkerError) as failed:
            worker.ask(what, *arguments)
        assert str(failed.value).startswith(reason) and "\n" not in str(failed.value)
        assert not failed.value.out_of_memory and failed.value.status is None
    with pytest.raises(WorkerError, match=r"^out of memory \(RuntimeError: ") as failed:
        worker.ask(commands.allocate, 1 << 50)
    assert failed.value.out_of_memory
    assert worker.ask(commands.told, 0) == 0


def test_what_it_reports_is_heard_before_the_answer(worker: Worker) -> None:
    heard: list[str] = []
    assert worker.ask(commands.told, 3, hear=heard.append) == 3
    assert heard == ["step 0", "step 1", "step 2"]
    assert worker.ask(commands.told, 3, seconds=60.0) == 3  # nobody listens


@pytest.mark.parametrize("wait", [False, True], ids=["asked", "died before it was asked"])
def test_a_process_that_dies_is_noticed(worker: Worker, wait: bool) -> None:
    worker.send(commands.leave, 7)
    if wait:
        worker._process.join()
        worker.send(commands.told, 0)
    with pytest.raises(WorkerError, match=r"^its process ended with status 7$") as failed:
        worker.receive()
    assert failed.value.status == 7 and not worker.alive


def test_a_process_that_is_killed_has_said_what_it_was_at(worker: Worker) -> None:
    heard: list[str] = []
    with pytest.raises(WorkerError, match=r"status -9 \(killed, as the system does where memory runs out\)") as failed:
        worker.ask(commands.kill_oneself, hear=heard.append)
    assert failed.value.status == -signal.SIGKILL and heard == ["nearly done"]


def test_a_process_that_takes_too_long_is_ended(worker: Worker) -> None:
    with pytest.raises(WorkerError, match="stopped after 0 s"):
        worker.ask(commands.sleep, seconds=0.2)
    assert not worker.alive


def test_a_process_that_ignores_sigterm_is_ended(worker: Worker) -> None:
    worker.ask(commands.ignore_signals)
    worker.send(commands.sleep)
    worker.end()
    assert not worker.alive


def test_an_interrupt_ends_it() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with start() as busy, pytest.raises(KeyboardInterrupt):
            thread = commands.interrupt(0.3)
            busy.ask(commands.sleep)
        thread.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert not busy.alive


def test_what_it_prints_is_in_the_log(tmp_path: Path) -> None:
    with start(tmp_path / "log.txt") as logged:
        logged.ask(commands.say, "hello")
        with pytest.raises(WorkerError):
            logged.ask(commands.Counter, -1)
    log = (tmp_path / "log.txt").read_text()
    assert "hello\n" in log and "hello in C\n" in log
    assert "Traceback" in log and "and a second line" in log


def run(code: str, cwd: Path) -> str:
    """The output of a program that finds ``tools`` as the entries do, whatever the directory that it runs in."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, stdout=subprocess.PIPE, text=True).stdout


def test_modules_of_the_project_are_preloaded_from_any_directory(tmp_path: Path) -> None:
    """Also from one that has a package ``tools`` of its own."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "__init__.py").touch()
    ask = "print(json.dumps(worker.ask(commands.facts, 'tools.benchmarks.digest')))"
    code = f"import json\nfrom tests.tools.common import commands\nfrom tools.common.worker import Worker\n"
    code += f"with Worker('w', preload=['tools.benchmarks.digest'], threads=1) as worker:\n    {ask}"
    found = json.loads(run(code, tmp_path))
    assert found["loaded"] and Path(found["cwd"]).resolve() == tmp_path.resolve()


def test_it_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    pid = int(run("from tests.tools.common import commands\ncommands.worker_that_outlives()", tmp_path))
    try:
        psutil.Process(pid).wait(30)
    except psutil.NoSuchProcess:
        pass
    assert not psutil.pid_exists(pid)
