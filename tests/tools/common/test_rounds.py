"""Rounds of steps of several processes, on processes that are played."""

from __future__ import annotations

from typing import Any

import pytest

from tools.common.rounds import Stepper, Times, time_in_rounds, too_large
from tools.common.worker import KILLED, WorkerError


class Played:
    """Takes ``milliseconds`` a step, writes who stepped, and fails in a step if it is to."""

    def __init__(self, name: str, log: list[str], fails: dict[str, tuple[int, WorkerError]]) -> None:
        self.name, self.log, self.fails, self.steps, self.ended = name, log, fails, 0, False

    def step(self) -> float:
        self.steps += 1
        self.log.append(self.name)
        when, error = self.fails.get(self.name, (0, WorkerError("")))
        if when == self.steps:
            raise error
        return float(len(self.log))

    def end(self) -> None:
        self.ended = True


def played(rounds: int, fails: dict[str, tuple[int, WorkerError]] | None = None, **options: Any) -> Any:
    log: list[str] = []
    made: list[Played] = []

    def start(name: str) -> Stepper:
        made.append(Played(name, log, fails or {}))
        return made[-1]

    found = time_in_rounds(["a", "b", "c"], start, rounds, lambda line: None, **options)
    assert all(process.ended for process in made)
    return found, log, made


def test_each_takes_a_step_a_round_back_and_forth() -> None:
    found, log, made = played(3)
    assert log == [*"abc", *"cba", *"abc"] and len(made) == 3
    assert found["b"].beside == ["a", "c"] and found["b"].alone_because is None
    assert found["b"].ratios(found["a"]) == [2 / 1, 5 / 6, 8 / 7]


def test_one_that_fails_does_not_stop_the_others() -> None:
    found, log, _ = played(3, {"b": (2, WorkerError("it raised"))})
    assert log == [*"abc", *"cba", *"ac"]
    assert str(found["b"].failure) == "it raised" and len(found["c"].milliseconds) == 3


@pytest.mark.parametrize("error", [WorkerError("no memory", out_of_memory=True), WorkerError("killed", status=KILLED)])
def test_where_one_runs_out_of_memory_each_is_timed_alone(error: WorkerError) -> None:
    found, log, made = played(2, {"b": (1, error)})
    assert log[-5:] == [*"aabcc"]
    assert len(made) == 6 and found["a"].alone_because == "b ran out of memory beside the others"
    assert found["a"].ratios(found["c"]) == [] and found["b"].failure is error


def test_alone_where_they_are_told_to_be() -> None:
    found, log, _ = played(2, alone_because="they do not fit")
    assert log == [*"aabbcc"] and found["c"].alone_because == "they do not fit"


def test_what_fits() -> None:
    assert too_large({"a": 400.0, "b": 400.0}, 1000.0) is None
    assert "may need 801 MiB; 1000 MiB are free" in str(too_large({"a": 400.0, "b": 401.0}, 1000.0))


def test_ratios_end_with_the_shorter() -> None:
    assert Times([2.0, 3.0]).ratios(Times([1.0])) == [2.0]
