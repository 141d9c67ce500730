"""SIGKILL at every system call of a payment: what was acknowledged counts, and the file is readable and complete.

A child process is killed before or after a write, after half of one, or before or after its fsync. The page cache
outlives a killed process, so that what was written is there; that it is there after a power failure too is what fsync
before the acknowledgement is for, and its order is tested beside this (test_account.py).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dpft.privacy import Account, Ledger, Mechanism

ROOT = Path(__file__).resolve().parent.parent.parent
QUERY = Mechanism(sampler="poisson", noise_multiplier=15.0, sample_rate=1.0)
RUN = "11111111-2222-3333-4444-555555555555"

KILLED = """
import json, os, signal, sys
from pathlib import Path
from dpft.privacy import Account, Mechanism
from dpft.privacy.account import composition

query = Mechanism(sampler="poisson", noise_multiplier=15.0, sample_rate=1.0)
composition.rdp_curve([(query, 1)])  # what takes seconds at first, once, and not in each child
write, fsync = os.write, os.fsync


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def at(point):
    def killed_write(fd, data):
        if point == "before write":
            die()
        if point == "half written":
            write(fd, bytes(data)[: len(data) // 2])
            die()
        written = write(fd, data)
        if point == "before fsync":
            die()
        return written

    def killed_fsync(fd):
        fsync(fd)
        if point == "after fsync":
            die()

    os.write, os.fsync = killed_write, killed_fsync


def act(account, what):
    if what == "spend":
        account.spend([(query, 1)], "a figure")
    elif what == "reserve":
        account.reserve("new", [(query, 3)], "a training")
    elif what == "finish":
        account.finish("run", [(query, 2)])
    elif what == "settle":
        account.settle()
    elif what == "create":
        Account.create(account, epsilon=3.0, delta=1e-5)


for path, what, point in json.loads(sys.argv[1]):
    account = path if what == "create" else Account.open(path)
    child = os.fork()
    if child == 0:
        at(point)
        act(account, what)
        os._exit(0)  # never: it dies before this
    _, status = os.waitpid(child, 0)
    print(int(os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL), flush=True)
"""

POINTS = ("before write", "half written", "before fsync", "after fsync")
ACTS = ("spend", "reserve", "finish", "settle", "create")


def prepared(folder: Path, act: str) -> Path:
    """An account with a training that reserved 5 releases, made 2 of them, and died."""
    folder.mkdir(parents=True)
    path = folder / "account.jsonl"
    if act == "create":
        return path
    account = Account.create(path, epsilon=3.0, delta=1e-5)
    ledger = folder / "ledger.jsonl"
    with Ledger.open(ledger, "new", mechanism=QUERY) as run:
        run.record()
        run.record()
        name = run.run_id if act == "settle" else "run"
    account.reserve(name, [(QUERY, 5)], "a training", ledger=ledger)
    return path


@pytest.mark.slow
def test_killed_at_every_point_of_every_payment(tmp_path: Path) -> None:
    cases = [
        (str(prepared(tmp_path / act / point.replace(" ", "-"), act)), act, point) for act in ACTS for point in POINTS
    ]
    ran = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps(cases)],
        env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert ran.stdout.split() == ["1"] * len(cases)  # each was killed, so that nobody was told "paid"
    for path, act, point in cases:
        check(Path(path), act, point in ("before fsync", "after fsync"))


def check(path: Path, act: str, whole: bool) -> None:
    """What a killed payment left: all of it or nothing, never less than what had been acknowledged before."""
    if act == "create":
        if whole:
            assert Account.open(path).entries() == ()
        elif path.exists():  # empty or torn: refused, and nobody has paid from it
            with pytest.raises(Exception, match="complete account header"):
                Account.open(path)
        return
    account = Account.open(path)
    open_, freed = [(QUERY, 5)], [(QUERY, 2)]
    expected: dict[str, tuple[Any, Any]] = {
        "spend": (open_, [*open_, (QUERY, 1)]),
        "reserve": (open_, [*open_, (QUERY, 3)]),
        "finish": (open_, freed),
        "settle": (open_, freed),
    }
    assert account.uses() == expected[act][whole]
    # The lock died with its process; the next one pays, settles, and finds every line.
    account.spend([(QUERY, 1)], "the next one")
    if act == "settle":
        assert bool(account.settle()) is not whole
        assert account.uses() == [*freed, (QUERY, 1)]
    else:
        assert account.uses() == [*expected[act][whole], (QUERY, 1)]
    assert Account.open(path).statement()["exceeded"] is False


def test_two_that_settle_and_one_that_resumes_at_once(tmp_path: Path) -> None:
    """The ledger's lock decides: who settles holds it until the line is written; an open run is let alone."""
    path = prepared(tmp_path / "a", "settle")
    one, other = Account.open(path), Account.open(path)
    ledger = tmp_path / "a" / "ledger.jsonl"
    with Ledger.open(ledger, "resume", mechanism=QUERY) as run:
        assert one.settle() == other.settle() == []
        one.reserve(run.run_id, [(QUERY, 2), (QUERY, 3)], "it goes on", ledger=ledger, released=[(QUERY, 2)])
        run.record()
    assert one.uses() == [(QUERY, 2), (QUERY, 3)]
    assert len(one.settle()) == 1 and other.settle() == [] and other.uses() == [(QUERY, 2), (QUERY, 1)]
