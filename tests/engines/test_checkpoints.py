"""A training saved in an engine goes on in it, with as many processes and with another number: nothing is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engines.checkpoints_worker import STEPS, lives_of
from tests.engines.launching import ROOT, environment

ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3", "sp2_fsdp2", "sp2_zero3")
ROUNDING = 1e-6  # of a weight near 1 in float32, after one step on a sum that other ranks added up in another order


@pytest.mark.slow
@pytest.mark.timeout(450)  # more than its process has
def test_a_training_goes_on_with_any_number_of_processes(tmp_path: Path) -> None:
    """One test, because one process imports for all of them."""
    words = [sys.executable, "-m", "tests.engines.checkpoints_worker", str(tmp_path), *ENGINES]
    done = subprocess.run(
        words, cwd=ROOT, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=400
    )
    (tmp_path / "log").write_bytes(done.stdout)
    for engine in ENGINES:
        for life, processes, before in lives_of(engine):
            ranks = [facts_of(tmp_path, engine, life, rank) for rank in range(processes)]
            check(f"{engine}, {life}", processes, before, ranks)
            assert ranks[0]["ranks of an example"] == (2 if engine.startswith("sp2") else 1)


def check(name: str, processes: int, before: str | None, ranks: list[dict[str, Any]]) -> None:
    """One life of a run, by what its ranks found."""
    first = ranks[0]
    assert all(facts["processes"] == processes for facts in ranks), name
    assert len({facts["ledger at the end"] for facts in ranks}) == 1, f"{name}: the ranks count differently"
    # the checkpoint says 3 releases and the ledger more: what came after the checkpoint stays spent
    assert all(facts.get("ledger after", 0) == facts["ledger before"] for facts in ranks), name
    assert first["ledger at the end"] == first["ledger before"] + 2 + (STEPS if before is None else 0), name
    assert first["moved at rate zero"] == 0.0, f"{name}: the scheduler does not set the rate that is stepped with"
    assert all(facts["rates"] == [0.0] for facts in ranks), name
    if before is not None:
        assert first["loaded"] == 0.0, f"{name}: weights, moments or counts of steps are not those that were saved"
        assert first["moments"] > 0, name
        assert first["next"] <= ROUNDING < first["moved"], f"{name}: the step after loading is not the one due"
        assert all(facts["removed"] for facts in ranks), name


def facts_of(lived: Path, engine: str, life: str, rank: int) -> dict[str, Any]:
    """What a rank found; what it printed, where it found nothing."""
    path = lived / engine / f"{life}-{rank}.json"
    if not path.exists():
        log = path.with_suffix(".log")
        pytest.fail(f"{engine}, {life}, rank {rank}: {(log if log.exists() else lived / 'log').read_text()[-3000:]}")
    return json.loads(path.read_text())
