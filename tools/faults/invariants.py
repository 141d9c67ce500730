"""What must be true of a training that was killed and resumed, whatever dpft says about it: see kill_ranks.py."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

PROCESSES = 2
WINDOW = 4  # values of noise: some 100 bits of entropy


@dataclass(frozen=True)
class Kill:
    """When and whom. ``release``: of the start, from 1; ``delay``: seconds after the instant was seen on ``rank``."""

    instant: str
    victim: str
    release: int = 1
    rank: int = 0
    delay: float = 0.0


@dataclass
class Start:
    """One launch, from its beginning to its end.

    Attributes:
        kill: None: it was to end by itself.
        struck: the kill's instant came.
        told: by rank, the lines that it wrote.
        ledger: releases in the file after the end, by this program's own reading.
        status: of the launcher.
        seconds: from the kill to the end of the last process, or of the whole start.
        left: complaints about processes that did not end, or that went on without the ledger's lock.
        said: the end of the output.
    """

    kill: Kill | None
    struck: bool = False
    told: dict[int, list[dict[str, Any]]] = field(default_factory=lambda: {rank: [] for rank in range(PROCESSES)})
    ledger: int = 0
    status: int | None = None
    seconds: float = 0.0
    left: list[str] = field(default_factory=list)
    said: str = ""

    def lines(self, what: str) -> list[dict[str, Any]]:
        """The lines of one kind, of all ranks."""
        return [line for lines in self.told.values() for line in lines if line["what"] == what]

    @property
    def released(self) -> int:
        """Releases that the optimiser of any rank was given."""
        return max((line["number"] for line in self.lines("release")), default=0)


def violations(starts: list[Start], replicated: bool, epsilon_of: Callable[[int], float]) -> list[str]:
    """What is wrong with a sequence of starts; empty if nothing is.

    Args:
        starts: in order.
        replicated: every rank holds the whole noise (DDP), so that it must be the same on all of them.
        epsilon_of: the accountant's epsilon of a number of releases.
    """
    wrong: list[str] = []
    seen = before = killed = 0
    whole: set[int] = set()  # steps whose checkpoint was written to its end
    saved: dict[int, set[str]] = {}
    for number, start in enumerate(starts):
        name = f"start {number}"
        for line in start.lines("ready"):
            if line["count"] != before:
                wrong.append(f"{name} began at {line['count']} releases; the ledger had {before}")
            if line["epsilon"] < epsilon_of(seen) * (1 - 1e-9):
                wrong.append(f"{name} reports epsilon {line['epsilon']}; {seen} releases cost {epsilon_of(seen)}")
            if (line["loaded"] or 0) < max(whole, default=0):
                wrong.append(f"{name} loaded step {line['loaded']}; the checkpoint of {max(whole)} was whole")
            if line["loaded"] is not None and line["digest"] and {line["digest"]} != saved.get(line["loaded"]):
                wrong.append(f"{name} did not load the parameters that step {line['loaded']} saved")
        for line in start.lines("saving"):
            if line["digest"]:
                saved.setdefault(line["step"], set()).add(line["digest"])
        whole |= {line["step"] for line in start.lines("saved")}
        seen += start.released
        killed += start.struck
        if start.ledger < max(seen, before):
            wrong.append(f"after {name} the ledger counts {start.ledger}; {seen} were made, {before} counted before")
        if start.ledger > seen + killed:  # a line may stand for a release that a kill forestalled
            wrong.append(f"after {name} the ledger counts {start.ledger}; only {seen} were made, in {killed} kills")
        wrong += [f"{name}: {what}" for what in _ending(start)]
        before = start.ledger
    return wrong + repeats(starts, replicated)


def _ending(start: Start) -> list[str]:
    """What is wrong with how a start ended."""
    wrong = list(start.left)
    if not start.struck:
        if start.status != 0 or not start.lines("end"):
            wrong.append(f"ended by itself with status {start.status}; expected 0. It said: {start.said}")
        return wrong
    assert start.kill is not None
    if start.status == 0:
        wrong.append("status 0, although it was killed")
    expected = {"rank": "SIGKILL", "all": "SIGKILL", "stop": "imed out", "hang": "imed out"}.get(start.kill.victim, "")
    if expected not in start.said:
        wrong.append(f"its output does not tell why it ended ({expected!r}): {start.said}")
    return wrong


def repeats(starts: list[Start], replicated: bool) -> list[str]:
    """Noise that occurs twice; with ``replicated``, noise that should and does not."""
    wrong: list[str] = []
    windows: list[np.ndarray] = []
    for number, start in enumerate(starts):
        by_release: dict[int, dict[int, list[str]]] = {}
        for rank, lines in start.told.items():
            for line in lines:
                if line["what"] == "release":
                    by_release.setdefault(line["number"], {}).setdefault(rank, []).extend(line["noise"])
        for release, by_rank in by_release.items():
            noises = list(by_rank.values())
            if replicated and any(noise != noises[0] for noise in noises):
                wrong.append(f"start {number}, release {release}: the replicas were given different noise")
            windows += [_windows(part) for noise in noises[: 1 if replicated else None] for part in noise]
        if start.released and not sum(map(len, windows)):
            wrong.append(f"start {number}: releases without noise")
    every = np.concatenate(windows) if windows else np.empty(0, np.uint64)
    doubled = len(every) - len(np.unique(every))
    if doubled:
        wrong.append(f"{doubled} of {len(every)} runs of {WINDOW} values of noise occur more than once")
    return wrong


def _windows(part: str) -> np.ndarray:
    """64 bits of every run of values, wherever it begins; of none with a zero, which pads ZeRO's partitions."""
    values = np.frombuffer(base64.b64decode(part), dtype=np.uint32).astype(np.uint64)
    if len(values) < WINDOW:
        return np.empty(0, np.uint64)
    runs = np.lib.stride_tricks.sliding_window_view(values, WINDOW)
    runs = runs[(runs & np.uint64(0x7FFFFFFF)).all(axis=1)]
    mixed = np.zeros(len(runs), np.uint64)
    for column in range(WINDOW):  # arithmetic modulo 2^64
        mixed = (mixed ^ runs[:, column]) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return mixed
