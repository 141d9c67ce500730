"""Whatever happens to the process or the disk, the ledger never counts less than was released."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import dpft.privacy.ledger as module
from dpft.errors import LedgerError
from dpft.privacy import Ledger, Mechanism, PrivacyConfig, compose_epsilon
from dpft.privacy.ledger_file import encode

A = Mechanism(sampler="poisson", noise_multiplier=1.0, sample_rate=0.02)
B = Mechanism(sampler="poisson", noise_multiplier=2.0, sample_rate=0.02)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "ledger.jsonl"


def fill(path: Path, releases: int, mechanism: Mechanism = A) -> None:
    with Ledger.open(path, "new", mechanism=mechanism) as ledger:
        for _ in range(releases):
            ledger.record()


def resume(path: Path, mechanism: Mechanism = A) -> Ledger:
    return Ledger.open(path, "resume", mechanism=mechanism)


# ---------------------------------------------------------------------------------------------------- order
def test_records_count_and_resume(path: Path) -> None:
    config = PrivacyConfig(target_delta=1e-6, noise_multiplier=1, num_steps=9, expected_batch_size=20)
    opened = Ledger.open(path, "new", mechanism=A, config=config.to_dict(), fingerprint=config.fingerprint())
    with opened as ledger:
        assert ledger.count == 0 and ledger.events() == []
        assert [ledger.record() for _ in range(3)] == [1, 2, 3]
        run_id = ledger.run_id
    with resume(path) as ledger:
        assert (ledger.count, ledger.run_id) == (3, run_id)
        assert ledger.record() == 4
    content = Ledger.read(path)
    assert (content.count, content.run_id, content.torn, content.unterminated) == (4, run_id, 0, False)
    assert content.header["fingerprint"] == config.fingerprint()
    assert PrivacyConfig.from_dict(content.header["config"]) == config


def test_each_release_is_on_the_disk_when_record_returns(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    write, fsync = os.write, os.fsync

    def noted_write(fd: int, data: bytes) -> int:
        calls.append("write")
        return write(fd, data)

    def noted_fsync(fd: int) -> None:
        calls.append("fsync")
        fsync(fd)

    monkeypatch.setattr(os, "write", noted_write)
    monkeypatch.setattr(os, "fsync", noted_fsync)
    with Ledger.open(path, "new", mechanism=A) as ledger:
        assert calls == ["write", "fsync", "fsync"]  # the file, then its directory
        calls.clear()
        ledger.record()
        assert calls == ["write", "fsync"]


def test_a_short_write_is_continued(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    with Ledger.open(path, "new", mechanism=A) as ledger:
        monkeypatch.setattr(os, "write", lambda fd, data: write(fd, bytes(data)[:7]))
        ledger.record()
    assert Ledger.read(path).count == 1 and Ledger.read(path).torn == 0


def test_events_of_a_changed_configuration(path: Path) -> None:
    fill(path, 5, A)
    with resume(path, B) as ledger:
        for _ in range(3):
            ledger.record()
        assert ledger.events() == [(A, 5), (B, 3)]
        assert compose_epsilon(ledger.events(), 1e-5) > compose_epsilon([(A, 5)], 1e-5)
    with resume(path, A) as ledger:
        ledger.record()
        assert ledger.events() == [(A, 5), (B, 3), (A, 1)]
    assert Ledger.read(path).events == ((A, 5), (B, 3), (A, 1))


def test_nothing_that_depends_on_data_is_written(path: Path) -> None:
    fill(path, 2)
    releases = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    assert all(set(line) == {"release", "segment", "time", "crc"} for line in releases)
    # Minutes would tell how long a step took, which grows with the size of the drawn batch.
    assert all(line["time"].endswith(":00Z") and len(line["time"]) == len("2026-01-01T00:00Z") for line in releases)


# ------------------------------------------------------------------------------------------------ torn lines
def test_torn_at_every_byte(path: Path) -> None:
    fill(path, 2)
    with resume(path, B) as ledger:
        ledger.record()
    whole = path.read_bytes()
    header_ends = whole.index(b"\n")
    starts = [at + 1 for at in range(len(whole)) if whole.startswith(b'\n{"release"', at)]
    assert len(starts) == 3
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        if size < header_ends:
            with pytest.raises(LedgerError, match="header"):
                resume(path)
            continue
        begun = sum(start < size for start in starts)  # at least one byte on the disk: it may have happened
        before = Ledger.read(path).count
        with resume(path, B) as ledger:
            assert ledger.count == before
            assert begun <= before <= begun + 1  # one too many where the line of a resume was cut
            assert ledger.record() == before + 1
        with resume(path) as ledger:  # repaired: whole lines only, and the count stands
            assert ledger.count == before + 1
        assert Ledger.read(path).torn == 0


def test_torn_while_being_repaired(path: Path) -> None:
    """The crash of a crash: cut the repaired file everywhere behind the first tear."""
    fill(path, 2)
    torn = path.read_bytes()[:-9]
    path.write_bytes(torn)
    resume(path).close()
    repaired = path.read_bytes()
    assert repaired.startswith(torn)
    for size in range(len(torn), len(repaired) + 1):
        path.write_bytes(repaired[:size])
        with resume(path) as ledger:
            assert 2 <= ledger.count <= 3  # a second tear may count once more, never less
            assert ledger.record() == ledger.count
        assert Ledger.read(path).torn == 0


def test_a_tail_of_zeros_counts(path: Path) -> None:
    fill(path, 2)
    with open(path, "ab") as file:
        file.write(b"\0" * 40)
    with resume(path) as ledger:
        assert ledger.count == 3


# --------------------------------------------------------------------------------------------------- damage
def test_damage_in_the_middle_is_refused_at_every_byte(path: Path) -> None:
    fill(path, 3)
    whole = path.read_bytes()
    last = whole[:-1].rindex(b"\n")
    for position in range(last):
        damaged = bytearray(whole)
        damaged[position] ^= 0x01
        path.write_bytes(bytes(damaged))
        with pytest.raises(LedgerError):
            resume(path)
        assert path.read_bytes() == bytes(damaged)  # and left as it is


def test_a_line_that_is_missing_or_doubled_is_refused(path: Path) -> None:
    fill(path, 4)
    lines = path.read_bytes().splitlines(keepends=True)
    for wrong in ([0, 1, 3, 4], [0, 1, 2, 2, 3, 4], [1, 2, 3, 4], [0, 2, 1, 3, 4], [0, 0, 1, 2, 3, 4]):
        path.write_bytes(b"".join(lines[i] for i in wrong))
        with pytest.raises(LedgerError):
            resume(path)


def test_missing_foreign_and_newer_files_are_refused(path: Path) -> None:
    with pytest.raises(LedgerError, match="no ledger at"):
        resume(path)
    path.parent.mkdir()
    for content in (b"", b"hello\n", b'{"loss": 1}\n'):
        path.write_bytes(content)
        with pytest.raises(LedgerError, match="header"):
            resume(path)
    path.write_bytes(encode({"dpft_ledger": 99, "run_id": "x", "mechanism": A.to_dict()}))
    with pytest.raises(LedgerError, match="format 99"):
        resume(path)
    with pytest.raises(LedgerError, match="mode"):
        Ledger.open(path, "append", mechanism=A)  # type: ignore[arg-type]  # wrong on purpose


def test_new_does_not_forget_releases(path: Path) -> None:
    fill(path, 0)
    fill(path, 0)  # nothing was released: may begin again
    path.write_bytes(b"")
    fill(path, 1)
    before = path.read_bytes()
    with pytest.raises(LedgerError, match=r"1 releases already.*resume"):
        fill(path, 0)
    path.write_bytes(before[:-3])  # the torn one counts, too
    with pytest.raises(LedgerError, match="1 releases already"):
        fill(path, 0)
    path.write_bytes(before[:30])
    with pytest.raises(LedgerError, match="header"):
        fill(path, 0)


# ------------------------------------------------------------------------------------------------ full disk
@pytest.mark.parametrize("call", ["write", "fsync"])
@pytest.mark.parametrize("written", [0, 11])
def test_a_full_disk_stops_the_release(path: Path, monkeypatch: pytest.MonkeyPatch, call: str, written: int) -> None:
    ledger = Ledger.open(path, "new", mechanism=A)
    ledger.record()
    write = os.write

    def full(fd: int, data: Any = b"") -> int:
        if call == "write" and written:
            write(fd, bytes(data)[:written])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(LedgerError, match="did not happen") as caught:
            ledger.record()
    assert isinstance(caught.value.__cause__, OSError)
    assert ledger.count == 1
    with pytest.raises(LedgerError, match="failed before"):  # also with space again: a torn line lies in the way
        ledger.record()
    state = ledger.state_dict()
    ledger.close()
    with resume(path) as ledger:
        ledger.check_resume(state)
        assert ledger.count == (1 if (call, written) == ("write", 0) else 2)
        ledger.record()


def test_a_full_disk_stops_the_start(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(LedgerError, match="No space"):
            fill(path, 0)
    fill(path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(LedgerError, match="No space"):
            resume(path)
    resume(path).close()


def test_a_deleted_ledger_stops_the_release(path: Path) -> None:
    with Ledger.open(path, "new", mechanism=A) as ledger:
        path.unlink()
        with pytest.raises(LedgerError, match="deleted"):
            ledger.record()


# ----------------------------------------------------------------------------------------------------- lock
def test_two_cannot_write_at_once(path: Path) -> None:
    with Ledger.open(path, "new", mechanism=A) as ledger:
        for mode in ("new", "resume"):
            with pytest.raises(LedgerError, match="another process"):
                Ledger.open(path, mode, mechanism=A)
        assert Ledger.read(path).count == 0  # a reader needs no lock, and takes none away
        with pytest.raises(LedgerError, match="another process"):
            resume(path)
        ledger.record()
    ledger.close()
    with pytest.raises(LedgerError, match="closed"):
        ledger.record()
    resume(path).close()


def test_a_forked_child_neither_writes_nor_holds_the_lock(path: Path) -> None:
    ledger = Ledger.open(path, "new", mechanism=A)
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            ledger.record()
            os.write(write_end, b"recorded")
        except LedgerError:
            os.write(write_end, b"refused")
        time.sleep(60)  # outlives its parent's ledger, like a DataLoader's worker
        os._exit(0)
    try:
        assert os.read(read_end, 99) == b"refused"
        with pytest.raises(LedgerError, match="another process"):
            resume(path)  # the parent's lock stands
        ledger.close()
        resume(path).close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


# ---------------------------------------------------------------------------------------------- checkpoints
def test_checkpoints_are_checked(path: Path, tmp_path: Path) -> None:
    fill(path, 3)
    with resume(path) as ledger:
        state = json.loads(json.dumps(ledger.state_dict()))
        assert state == {"run_id": ledger.run_id, "count": 3}
        ledger.check_resume(state)
        ledger.record()
        ledger.check_resume(state)  # a checkpoint behind the ledger is what a crash leaves
        with pytest.raises(LedgerError, match="counts 5"):
            ledger.check_resume({**state, "count": 5})
        with pytest.raises(LedgerError, match="run_id"):
            ledger.check_resume({"count": 1})
    fill(tmp_path / "other", 9)
    with resume(tmp_path / "other") as other, pytest.raises(LedgerError, match="belongs to run"):
        other.check_resume(state)


# ------------------------------------------------------------------------------------------------- SIGKILL
CHILD = """
import os, sys, time
from dpft.errors import LedgerError
from dpft.privacy import Ledger, Mechanism
mechanism = Mechanism(sampler="poisson", noise_multiplier=1.0, sample_rate=0.02)
for line in sys.stdin:
    path, mode = line.split()
    ledger = Ledger.open(path, mode, mechanism=mechanism)
    child = os.fork()
    if child:  # the parent waits, so that one import serves all kills
        ledger.close()
        print(child, flush=True)
        os.waitpid(child, 0)
        print("dead", flush=True)
        continue
    ledger = None
    while ledger is None:  # until the parent has let go of its lock, which a busy machine may keep it from for long
        try:
            ledger = Ledger.open(path, "resume", mechanism=mechanism)
        except LedgerError:
            time.sleep(0.005)
    out = os.open(path + ".seen", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    while True:
        number = ledger.record()
        os.pwrite(out, b"%12d" % number, 0)  # what the run would have released
"""


@pytest.mark.slow
def test_sigkill_at_random_instants_never_loses_a_release(tmp_path: Path) -> None:
    path, seen = tmp_path / "ledger", tmp_path / "ledger.seen"
    dice = random.Random(0)
    kills, released = 20, 0
    environment = {**os.environ, "PYTHONPATH": str(Path(module.__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            for kill in range(kills):
                seen.write_bytes(b"")
                process.stdin.write(f"{path} {'resume' if kill else 'new'}\n")
                process.stdin.flush()
                child = int(process.stdout.readline())
                deadline = time.monotonic() + 60
                while not seen.read_bytes():
                    assert time.monotonic() < deadline, "the child records nothing"
                    time.sleep(0.001)
                time.sleep(dice.uniform(0, 0.02))
                os.kill(child, signal.SIGKILL)
                assert process.stdout.readline() == "dead\n"
                reported = int(seen.read_bytes())
                count = Ledger.read(path).count
                assert reported <= count <= reported + 1
                assert count > released
                released = count
        finally:
            process.kill()
    assert released >= kills
