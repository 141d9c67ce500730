"""A training that is started, killed at chosen instants, and resumed, in one folder."""

from __future__ import annotations

import fcntl
import functools
import json
import os
import random
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import psutil

import dpft
from tools.common.accelerate_launch import launch_command, launch_environment
from tools.faults.invariants import PROCESSES, Kill, Start, violations

WORKER = Path(__file__).with_name("worker.py")


INSTANTS = ("prepare", "backward", "ledger", "changed", "save", "any")


VICTIMS = ("rank", "all", "launcher", "stop", "hang")


EXACT = ("ledger", "changed")


TRIGGER = {"prepare": "up", "backward": "backward", "save": "saving", "any": "ready"}  # else "paused"


LONGEST_DELAY = {"prepare": 0.5, "backward": 0.05, "save": 0.3, "any": 1.0}  # else 0


EXAMPLES, LAST_RELEASES = 16, 4


START_LIMIT, END_LIMIT = 240.0, 60.0  # seconds to reach the instant of a kill; and to end after it


PATIENT, HASTY = 120.0, 10.0  # time limit of collectives; of a start in which a rank will hang


def draw(rng: random.Random) -> Kill:
    """A random kill."""
    victim = rng.choices(VICTIMS, (16, 12, 4, 1, 2))[0]
    instant = rng.choice(EXACT if victim == "hang" else INSTANTS)
    delay = rng.uniform(0, LONGEST_DELAY.get(instant, 0.0))
    return Kill(instant, victim, rng.randint(1, 5), rng.randrange(PROCESSES), delay)


class Campaign:
    """A training that is started, killed and resumed, in one folder."""

    def __init__(self, engine: str, folder: Path, cpu: bool, kills: int) -> None:
        self.engine, self.folder, self.cpu = engine, folder, cpu
        self.ledger = folder / "ledger.jsonl"
        self.privacy = dpft.PrivacyConfig(
            target_delta=1e-5, expected_batch_size=4, noise_multiplier=1.0, num_steps=60 * (kills + 1)
        )
        self.starts: list[Start] = []
        self._read = dict.fromkeys(range(PROCESSES), 0)

    def run(self, kills: list[Kill]) -> list[str]:
        """All the kills, one a start, then a start that ends by itself. Returns the violations."""
        print("start instant   victim     before  made ledger loaded  epsilon status ended in", flush=True)
        for kill in [*kills, None]:
            start = self._start(kill)
            self.starts.append(start)
            self._row(start)
            if kill is not None and start.status == 0:
                break  # the planned steps were done before the kill
        return self.check()

    def check(self) -> list[str]:
        """The violations so far."""

        @functools.cache
        def epsilon_of(releases: int) -> float:
            return replace(self.privacy, num_steps=releases).resolve(EXAMPLES).epsilon if releases else 0.0

        return violations(self.starts, self.engine == "ddp", epsilon_of)

    def _row(self, start: Start) -> None:
        ready = next(iter(start.lines("ready")), {})
        kill, count = start.kill, ready.get("count", "-")
        one = kill is not None and kill.victim in ("rank", "stop", "hang")
        who = "" if kill is None else f"{kill.victim} {kill.rank}" if one else kill.victim
        epsilon = f"{ready['epsilon']:.3f}" if ready else "-"
        print(
            f"{len(self.starts) - 1:5} {'(none)' if kill is None else kill.instant:9} {who:10} {count:>6} "
            f"{start.released:5} {start.ledger:6} {ready.get('loaded') or '-':>6} {epsilon:>8} {start.status:>6} "
            f"{start.seconds:7.1f}s",
            flush=True,
        )

    def _start(self, kill: Kill | None) -> Start:
        start = Start(kill)
        number, scratch = len(self.starts), self.folder / f"start{len(self.starts)}"
        scratch.mkdir(parents=True)
        output, began = scratch / "output", time.monotonic()
        with output.open("wb") as file:
            launcher = subprocess.Popen(
                self._command(number, kill), cwd=scratch, env=self._environment(scratch), stdout=file,
                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        family: list[psutil.Process] = []
        try:
            if kill is not None and self._reached(start, launcher, kill):
                time.sleep(kill.delay)
                family, began = _descendants(launcher), time.monotonic()
                if launcher.poll() is None:
                    self._strike(start, launcher, kill)
            self._ended(start, launcher, family)
        finally:
            family += _descendants(launcher)
            for pid in [launcher.pid, *(process.pid for process in family)]:
                _send(pid, signal.SIGKILL)
            launcher.wait()
            psutil.wait_procs(family, timeout=END_LIMIT)
        start.seconds, start.status = time.monotonic() - began, launcher.returncode
        start.said = output.read_text(errors="replace")[-20_000:]
        self._listen(start)
        start.ledger = _count(self.ledger)
        return start

    def _command(self, number: int, kill: Kill | None) -> list[str]:
        launcher = launch_command(self.engine, WORKER)
        launcher += ["--folder", str(self.folder), "--privacy", json.dumps(self.privacy.to_dict())]
        launcher += ["--examples", str(EXAMPLES), "--start", str(number)]
        launcher += ["--timeout", str(HASTY if kill is not None and kill.victim in ("stop", "hang") else PATIENT)]
        launcher += ["--stop-after", str(LAST_RELEASES)] if kill is None else []
        if kill is not None and kill.instant in EXACT:
            launcher += ["--pause", f"{kill.instant}:{kill.release}:{kill.rank}"]
        return launcher + (["--cpu"] if self.cpu else [])

    def _environment(self, scratch: Path) -> dict[str, str]:
        return {**launch_environment(scratch, self.cpu), "TMPDIR": str(scratch)}

    def _listen(self, start: Start) -> None:
        """Read what the ranks wrote since the last time; a line that a kill cut short does not count."""
        for rank in range(PROCESSES):
            path = self.folder / f"rank{rank}.jsonl"
            if path.exists():
                with path.open("rb") as file:
                    file.seek(self._read[rank])
                    whole, newline, _ = file.read().rpartition(b"\n")
                self._read[rank] += len(whole + newline)
                start.told[rank] += [json.loads(line) for line in whole.splitlines()]

    def _reached(self, start: Start, launcher: subprocess.Popen[bytes], kill: Kill) -> bool:
        """Wait for the instant; False if the start ended, or its time, before it came."""
        what, limit = TRIGGER.get(kill.instant, "paused"), time.monotonic() + START_LIMIT
        while launcher.poll() is None and time.monotonic() < limit:
            self._listen(start)
            if any(x["what"] == what and x.get("number", kill.release) >= kill.release for x in start.told[kill.rank]):
                return True
            time.sleep(0.001)
        return False

    def _strike(self, start: Start, launcher: subprocess.Popen[bytes], kill: Kill) -> None:
        start.struck = True
        ranks = {rank: lines[0]["pid"] for rank, lines in start.told.items() if lines}
        if kill.victim == "all":
            for pid in ranks.values():
                _send(pid, signal.SIGKILL)
        elif kill.victim == "launcher":
            launcher.kill()
        elif kill.victim != "hang":  # that one waits at the instant already, and the others for it
            _send(ranks[kill.rank], signal.SIGSTOP if kill.victim == "stop" else signal.SIGKILL)

    def _ended(self, start: Start, launcher: subprocess.Popen[bytes], family: list[psutil.Process]) -> None:
        """Wait for the end of the launcher and of everything that it started."""
        limit = END_LIMIT if start.struck else START_LIMIT
        try:
            launcher.wait(limit)
        except subprocess.TimeoutExpired:
            start.left.append(f"the launcher did not end in {limit:g} s")
        if start.struck and start.kill is not None and start.kill.victim == "launcher":
            self._listen(start)  # Nobody ends its ranks. What counts is that no second run starts beside them.
            first = {line["what"]: line for line in start.told[0]}
            if "ready" in first and not _is_locked(self.ledger) and _is_alive(first["up"]["pid"]):
                start.left.append("rank 0 goes on and does not hold the ledger")
            return
        _, alive = psutil.wait_procs(family, timeout=END_LIMIT)
        start.left += [f"process {process.pid} did not end in {END_LIMIT:g} s" for process in alive]


def _descendants(launcher: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        return psutil.Process(launcher.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _send(pid: int, what: signal.Signals) -> None:
    try:
        os.kill(pid, what)
    except ProcessLookupError:
        return


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _is_locked(ledger: Path) -> bool:
    """Whether another process has the ledger."""
    with ledger.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _count(ledger: Path) -> int:
    """Releases in a ledger, read without dpft: whole lines that say so, and every line that was cut short."""
    count = 0
    for line in ledger.read_text().splitlines() if ledger.exists() else []:
        try:
            count += "release" in json.loads(line)
        except ValueError:
            count += 1
    return count
