"""How benchmark_steps.py runs a shape: every method in a process of its own, checked, then timed in turns."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from tools.benchmarks import oracle
from tools.benchmarks.cases import STRATEGIES, Method, Shape, find_method
from tools.benchmarks.digest import Digest, Error, error_of
from tools.benchmarks.presets import Longest, Run
from tools.benchmarks.worker import PRELOAD, Case, first_steps, predict
from tools.common.spread import spread
from tools.common.worker import Worker, WorkerError, end_all

REFERENCE = "per_example"
PEERS = ("opacus", "fastdp")
# Relative, of the whole gradient. *Measured* of Opacus 1.6 in float32: 4.9e-4 at T = 2048, B = 4.
PEERS_ROUNDING = 1e-3
GRACE = 60.0  # seconds that a command may take beyond the budget before it is stopped
Row = dict[str, Any]


class Budget:
    """Seconds from now on, after which nothing new is started."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds; negative when it is spent."""
        return self._end - time.monotonic()

    @property
    def allowed(self) -> float:
        """Seconds that a command may take which is given now."""
        return max(0.0, self.left) + GRACE


@dataclass
class Machine:
    """Where it runs.

    Attributes:
        memory_limit: bytes that a process may allocate beyond its model; None for what the device has.
    """

    device: str
    threads: int
    memory_limit: int | None = None

    def worker(self, label: str) -> Worker:
        """A new process."""
        return Worker(label, preload=PRELOAD, threads=self.threads)


@dataclass
class Entry:
    """A method at a shape: its process while it has one, and what came of it."""

    name: str
    method: Method
    row: Row
    worker: Worker | None = None
    digest: Digest = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)

    @property
    def going(self) -> bool:
        """It has not failed and was not refused."""
        return self.worker is not None

    def stop(self, reason: str = "") -> None:
        """End the process; with a reason, the row says it."""
        if reason:
            self.row["reason"] = reason
        if self.worker is not None:
            self.worker.end()
            self.worker = None


class ShapeRunner:
    """Runs one shape. ``say`` receives lines on what is being done."""

    def __init__(self, run: Run, machine: Machine, budget: Budget, say: Callable[[str], None]) -> None:
        self.run, self.machine, self.budget, self.say = run, machine, budget, say
        self.entries = [self._entry(name) for name in run.methods]
        self.expected: dict[str, Any] = {}
        self.first: dict[str, Any] | None = None
        # On a GPU all models would take the memory that is measured: a model goes aside until its turn.
        self.parks = machine.device == "cuda" and not run.alone

    def _entry(self, name: str) -> Entry:
        method = find_method(name)
        return Entry(name, method, {"method": name, "note": method.remark(self.run.shape)})

    def result(self) -> dict[str, Any]:
        """Run it all; what is written of the shape. Its processes are ended, whatever happens."""
        if self.budget.left <= 0:
            for entry in self.entries:
                entry.stop(self._spent())
            return self._result(None)
        try:
            # dpft.plan predicts a step without its optimiser.
            ours = any(e.name in STRATEGIES for e in self.entries)
            planned = ours and not self.run.shape.update and self.run.shape.architecture != "bert"
            plan = self._once(predict) if planned else None
            self.expected = self._once(oracle.expectations)
            self.first = self._once(first_steps) if self.run.first else None
            if self.run.alone:
                for entry in self.entries:
                    self._prepare([entry])
                    self._time([entry])
                    entry.stop()
            else:
                self._prepare(self.entries)
                self._time(self.entries)
            return self._result(plan)
        finally:
            end_all(e.worker for e in self.entries if e.worker is not None)

    def _spent(self) -> str:
        return f"not run: the time budget of {self.budget.seconds:.0f} s is spent"

    def _once(self, function: Callable[[Shape, str], dict[str, Any]]) -> dict[str, Any]:
        """What a function of shape and device gives in a process made for it; ``reason`` where it failed."""
        self.say(function.__name__)
        with self.machine.worker(function.__name__) as worker:
            try:
                answer = worker.ask(function, self.run.shape, self.machine.device, seconds=self.budget.allowed)
                assert isinstance(answer, dict)
                return answer
            except WorkerError as error:
                return {"reason": str(error)}

    def _ask(self, entry: Entry, name: str, *arguments: Any) -> Any:
        """The answer, or None after a failure, which ends the entry's part. A parked model is back for it."""
        if entry.worker is None:
            return None
        seconds = self.budget.allowed
        try:
            if self.parks:
                entry.worker.ask("park", "cuda", seconds=seconds)
            value = entry.worker.ask(name, *arguments, seconds=seconds)
            if self.parks:
                entry.worker.ask("park", "cpu", seconds=seconds)
            return value
        except WorkerError as error:
            entry.stop(str(error))
            return None

    def _start(self, entries: list[Entry], frozen_norms: bool = False) -> None:
        """Models are built at the same time, in their processes."""
        for entry in entries:
            entry.worker = self.machine.worker(entry.name)
            entry.worker.send(Case, self.run.shape, self.machine.device, entry.name, frozen_norms)
        for entry in entries:
            assert entry.worker is not None
            try:
                entry.worker.receive(self.budget.allowed)
                entry.row["parameters"] = entry.worker.ask("parameters", seconds=GRACE)
            except WorkerError as error:
                entry.stop(str(error))
                continue
            if self.machine.memory_limit is not None:
                self._ask(entry, "limit", self.machine.memory_limit)
            elif self.parks:
                self._ask(entry, "clear")

    def _prepare(self, entries: list[Entry]) -> None:
        """Start, probe, and refuse what is wrong."""
        self._start(entries)
        for entry in entries:
            if self.budget.left <= 0:
                entry.stop(self._spent())
                continue
            self.say(entry.name)
            self._check(entry)
            probe = self._ask(entry, "probe")
            if probe is not None:
                entry.digest = probe["digest"]
                entry.row.update(flops=probe["flops"], peak_bytes=probe["peak_bytes"])
        if self.run.shape.update:
            return
        for frozen in (False, True):
            private = [e for e in entries if e.name != "plain" and e.method.freezes(self.run.shape) == frozen]
            private = [e for e in private if e.going]
            reference = self._reference(frozen) if private else {}
            for entry in private:
                if reference:
                    self._judge(entry, error_of(entry.digest, reference), f"T={self.run.shape.tokens}", whole=True)
                else:
                    entry.row["unchecked"] = f"no reference at this length: checked at T <= {oracle.TOKENS}"

    def _check(self, entry: Entry) -> None:
        """Hold a private method against the oracle."""
        if entry.name == "plain" or not entry.going:
            return
        if "reason" in self.expected:
            entry.stop(f"not timed, for want of the oracle: {self.expected['reason']}")
            return
        answer = self._ask(entry, "check")
        if answer is not None:
            kind = "without_norms" if entry.method.freezes(self.run.shape) else "all"
            error = error_of(answer["digest"], self.expected[kind])
            self._judge(entry, error, f"the oracle's size (T <= {oracle.TOKENS})")

    def _judge(self, entry: Entry, error: Error, where: str, whole: bool = False) -> None:
        """Refuse what is off by more than the limit. ``whole``: at the whole length, against the reference."""
        limit: Error = self.expected["limit"]
        if whole:
            # The reference may be off by as much. Of a gradient that nearly cancels over a long context, as those of
            # queries and keys do, a 16-bit dtype leaves little: there only the gradient of all parameters is judged.
            precise = self.run.shape.dtype == "float32"
            limit = Error(2 * limit.whole, 2 * limit.worst if precise else math.inf, limit.where)
            if entry.name.startswith(PEERS):
                # What grows with length is their rounding, not the adapter's mistake, which the oracle's size shows:
                # Opacus' norms are long float32 sums. It stands in the table beside their time.
                limit = Error(max(limit.whole, PEERS_ROUNDING), limit.worst, limit.where)
        entry.row["error"] = max(entry.row.get("error", 0.0), error.whole)
        entry.row["error_of_worst_parameter"] = max(entry.row.get("error_of_worst_parameter", 0.0), error.worst)
        if not error.within(limit):
            entry.row["refused"] = True
            entry.stop(
                f"wrong, so not timed: its clipped sum at {where} is off by {error}; allowed are "
                f"{limit.whole:.1e} and {limit.worst:.1e}"
            )

    def _reference(self, frozen: bool) -> Digest:
        """The clipped sum at the whole shape, one example at a time; empty where that failed."""
        for entry in self.entries:
            if entry.name == REFERENCE and not frozen and entry.digest and not entry.row.get("refused"):
                return entry.digest
        self.say("reference")
        entry = self._entry(REFERENCE)
        try:
            self._start([entry], frozen)
            answer = self._ask(entry, "probe")
        finally:
            entry.stop()
        return answer["digest"] if answer is not None else {}

    def _time(self, entries: list[Entry]) -> None:
        """One step each, in turns, round after round, while the budget lasts."""
        last = 0.0
        for number in range(self.run.rounds):
            going = [e for e in entries if e.going]
            if self.budget.left < last:
                for entry in going:
                    entry.row["cut"] = f"{number} of {self.run.rounds} rounds: the time budget is spent"
                return
            self.say(f"round {number + 1} of {self.run.rounds}")
            start = time.monotonic()
            # Back and forth, so that a machine that grows slower or faster favours nobody. What was put away for the
            # others' sake warms up again.
            for entry in going if number % 2 == 0 else reversed(going):
                seconds = self._ask(entry, "time", int(self.parks))
                if seconds is not None:
                    entry.seconds.append(seconds)
            last = time.monotonic() - start

    def _result(self, plan: dict[str, Any] | None) -> dict[str, Any]:
        plain = next((e for e in self.entries if e.name == "plain"), None)
        for entry in self.entries:
            self._ratios(entry, plain)
        result = {"shape": asdict(self.run.shape), "title": str(self.run.shape), "rows": [e.row for e in self.entries]}
        if "limit" in self.expected:
            limit = self.expected["limit"]
            result["allowed_error"] = {"whole": limit.whole, "worst_parameter": limit.worst}
        if plan is not None:
            result["plan"] = plan
            result["auto"] = self._auto(plan)
        if self.first is not None:
            result["first_steps"] = self.first
        result["speedups"] = self._speedups()
        return result

    def _ratios(self, entry: Entry, plain: Entry | None) -> None:
        row = entry.row
        if "reason" in row:
            return
        if entry.seconds:
            row["seconds"] = spread(entry.seconds)
            row["rounds"] = len(entry.seconds)
        if plain is None:
            return
        if entry.seconds and plain.seconds:
            row["time_ratio"] = spread(_paired(entry, plain))
        for key, ratio in (("peak_bytes", "memory_ratio"), ("flops", "flops_ratio")):
            if key in row and plain.row.get(key):
                row[ratio] = row[key] / plain.row[key]

    def _speedups(self) -> dict[str, dict[str, float]]:
        """How many times faster one-pass is than each library that is not ours, by round."""
        one_pass = next((e for e in self.entries if e.name == "one_pass" and e.seconds and e.going), None)
        peers = [e for e in self.entries if e.seconds and not e.method.noise and e.name != "plain"]
        return {e.name: spread(_paired(e, one_pass)) for e in peers if "reason" not in e.row} if one_pass else {}

    def _auto(self, plan: dict[str, Any]) -> dict[str, Any]:
        """The planner's choice beside the best of what was timed."""
        timed = [e for e in self.entries if e.name in STRATEGIES and e.seconds and "reason" not in e.row]
        chosen = next((e for e in timed if e.name == plan.get("choice")), None)
        if chosen is None:
            return {"choice": plan.get("choice"), "reason": plan.get("reason", "it was not timed")}
        best = min(timed, key=lambda e: statistics.median(e.seconds))
        slower = statistics.median(_paired(chosen, best)) - 1
        return {"choice": chosen.name, "best": best.name, "slower": slower}


def _paired(entry: Entry, other: Entry) -> list[float]:
    """Ratios of times of the same round: one that failed later has fewer."""
    return [a / b for a, b in zip(entry.seconds, other.seconds, strict=False)]


def longest_context(
    search: Longest, machine: Machine, budget: Budget, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """For each method the longest context that fits, to a multiple of ``search.step``, or as far as time allowed."""
    return [{"method": name, **_longest_of(name, search, machine, budget, say)} for name in search.methods]


def _longest_of(
    name: str, search: Longest, machine: Machine, budget: Budget, say: Callable[[str], None]
) -> dict[str, Any]:
    fits, fails, tokens = 0, search.most + search.step, search.start
    tried: list[dict[str, Any]] = []
    worker: Worker | None = None
    try:
        while fails - fits > search.step:
            if budget.left <= 0:
                return {"tokens": fits, "tried": tried, "reason": "the time budget is spent: it may be longer"}
            say(f"{name}: T={tokens}")
            start = time.monotonic()
            try:
                if worker is None:
                    worker = machine.worker(name)
                    worker.ask(Case, search.shape, machine.device, name, seconds=budget.allowed)
                    if machine.memory_limit is not None:
                        worker.ask("limit", machine.memory_limit, seconds=GRACE)
                good, why = worker.ask("fits", tokens, seconds=budget.allowed), "out of memory"
            except WorkerError as error:
                good, why = False, str(error)
                if worker is not None:
                    worker.end()
                    worker = None
                if why.startswith("stopped after"):
                    return {"tokens": fits, "tried": tried, "reason": f"T={tokens}: {why}: it may be longer"}
            seconds = time.monotonic() - start
            tried.append({"tokens": tokens, "fits": good, "seconds": seconds, **({} if good else {"reason": why})})
            fits, fails = (tokens, fails) if good else (fits, tokens)
            if fails > search.most:
                tokens = min(2 * tokens, search.most)
            else:
                tokens = (fits + fails) // 2 // search.step * search.step
        return {"tokens": fits, "tried": tried, **({"reason": "not looked beyond"} if fits == search.most else {})}
    finally:
        if worker is not None:
            worker.end()
