"""A rank that dies or hangs: the run ends on all ranks, nothing that was released is forgotten, and a resume goes on.

A few exact instants on real launches; `tools/kill_ranks.py --kills 200` has hundreds of random ones. What that tool
would call a violation is called one here first, on made-up records.
"""

from __future__ import annotations

import base64
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tools.faults import campaign as campaigns
from tools.faults.invariants import Kill, Start, violations

KILLS = {
    # The rank that holds the ledger dies between its line and the parameters' change, which the other one makes. Then
    # it hangs in the same place, while the other one waits in a process group that DeepSpeed made. (It waits there.
    # After SIGSTOP torch's launcher waits 30 s more.)
    "zero2": [Kill("ledger", "rank", release=2, rank=0), Kill("ledger", "hang", release=3, rank=0)],
    "fsdp2": [
        Kill("save", "all", release=3, rank=1, delay=0.03),
        Kill("backward", "rank", release=4, rank=0, delay=0.005),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("engine", KILLS)
def test_killed_and_resumed(engine: str, tmp_path: Path) -> None:
    campaign = campaigns.Campaign(engine, tmp_path, cpu=True, kills=len(KILLS[engine]))
    assert not campaign.run(KILLS[engine])
    *killed, last = campaign.starts
    assert [start.struck for start in killed] == [True] * len(killed)
    for start in killed:
        assert start.kill is not None
        assert start.status == 1
        # A hung rank is waited for; of a dead one the others know at once.
        assert start.seconds < (campaigns.HASTY if start.kill.victim == "hang" else 0) + 30
        assert "FAILED" in start.said
    assert last.status == 0
    assert last.released == campaigns.LAST_RELEASES
    assert last.lines("ready")[0]["loaded"] >= 2
    released = sum(start.released for start in campaign.starts)
    assert released <= last.ledger <= released + len(killed)
    assert len(last.told[0]) > 8 and len(last.told[1]) > 8  # both ranks said what they were given


# -------------------------------------------------------------------------------------------- the checks themselves


def noise(seed: int) -> str:
    return base64.b64encode(np.random.default_rng(seed).standard_normal(50, dtype=np.float32).tobytes()).decode()


def epsilon_of(releases: int) -> float:
    return releases**0.5


def sharded() -> list[Start]:
    """Two starts of two ranks: three releases and a checkpoint after the second, a kill, a resume, two releases."""
    first, second = Start(Kill("ledger", "rank")), Start(None)
    first.struck, first.status, first.ledger, first.said = True, 1, 4, "Signal 9 (SIGKILL) received"
    second.status, second.ledger = 0, 6
    for rank in range(2):
        ready = {"what": "ready", "count": 0, "epsilon": 0.0, "digest": "start", "loaded": None}
        resumed = {"what": "ready", "count": 4, "epsilon": 2.0, "digest": "two", "loaded": 2}
        first.told[rank] = [ready]
        first.told[rank] += [{"what": "release", "number": n, "noise": [noise(10 * n + rank)]} for n in (1, 2, 3)]
        first.told[rank] += [{"what": "saving", "step": 2, "digest": "two"}, {"what": "saved", "step": 2}]
        second.told[rank] = [resumed]
        second.told[rank] += [{"what": "release", "number": n, "noise": [noise(100 * n + rank)]} for n in (1, 2)]
        second.told[rank] += [{"what": "end", "count": 6}]
    return [first, second]


def replicated() -> list[Start]:
    starts = sharded()
    for start in starts:
        start.told[1] = copy.deepcopy(start.told[0])
    return starts


def line(start: Start, what: str, nth: int = 0) -> dict[str, Any]:
    return [x for x in start.told[1] if x["what"] == what][nth]


def shifted(starts: list[Start]) -> None:
    """The second start repeats five values of the first one's, at another place, on another rank."""
    old = np.frombuffer(base64.b64decode(starts[0].told[0][1]["noise"][0]), np.float32)
    new = np.frombuffer(base64.b64decode(line(starts[1], "release")["noise"][0]), np.float32).copy()
    new[31:36] = old[7:12]
    line(starts[1], "release")["noise"] = [base64.b64encode(new.tobytes()).decode()]


WRONGS: dict[str, tuple[Callable[[list[Start]], None], str]] = {
    "a release that the ledger lacks": (lambda s: setattr(s[0], "ledger", 2), "ledger counts 2; 3 were made"),
    "a count that falls": (lambda s: setattr(s[1], "ledger", 3), "ledger counts 3"),
    "a count out of nowhere": (lambda s: setattr(s[1], "ledger", 9), "only 5 were made"),
    "a resume that forgets": (lambda s: line(s[1], "ready").update(count=3), "began at 3 releases; the ledger had 4"),
    "epsilon too small": (lambda s: line(s[1], "ready").update(epsilon=1.7), "reports epsilon 1.7"),
    "noise twice on two ranks": (lambda s: line(s[0], "release").update(noise=[noise(10)]), "more than once"),
    "noise twice in two starts": (lambda s: line(s[1], "release").update(noise=[noise(31)]), "more than once"),
    "a piece of noise twice": (shifted, "2 of "),
    "no noise": (lambda s: [x.update(noise=[]) for x in s[0].lines("release")] and None, "releases without noise"),
    "other parameters": (lambda s: line(s[1], "ready").update(digest="three"), "did not load the parameters"),
    "a checkpoint of ranks apart": (lambda s: line(s[0], "saving").update(digest="2"), "did not load the parameters"),
    "a checkpoint lost": (lambda s: line(s[1], "ready").update(loaded=None), "the checkpoint of 2 was whole"),
    "a rank left over": (lambda s: s[0].left.append("process 7 did not end in 60 s"), "process 7 did not end"),
    "success of a killed run": (lambda s: setattr(s[0], "status", 0), "status 0, although it was killed"),
    "no reason given": (lambda s: setattr(s[0], "said", "FAILED"), "does not tell why"),
    "a start that failed": (lambda s: setattr(s[1], "status", 1), "ended by itself with status 1"),
    "a start that stopped early": (lambda s: [lines.pop() for lines in s[1].told.values()] and None, "by itself"),
}


def test_checks_are_content() -> None:
    assert not violations(sharded(), False, epsilon_of)
    assert not violations(replicated(), True, epsilon_of)


@pytest.mark.parametrize("name", WRONGS)
def test_checks_complain(name: str) -> None:
    starts = sharded()
    make_wrong, complaint = WRONGS[name]
    make_wrong(starts)
    found = violations(starts, False, epsilon_of)
    assert any(complaint in each for each in found), found


def test_checks_compare_replicas() -> None:
    starts = replicated()
    line(starts[0], "release")["noise"] = [noise(11)]
    assert any("replicas" in each for each in violations(starts, True, epsilon_of))


def test_count_reads_a_torn_line(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    lines = ['{"dpft_ledger":1}', '{"release":1}', '{"segment":1}', '{"release":2}', '{"rel']
    ledger.write_text("\n".join(lines))
    assert campaigns._count(ledger) == 3
