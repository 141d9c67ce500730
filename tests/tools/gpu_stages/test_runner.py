"""tools/gpu.py without its stages: the budget, what is left out, what a run that is cut off keeps, the table."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from tools import gpu
from tools.gpu_stages import runner
from tools.gpu_stages.context import DONE, FAILED, SKIPPED, WRONG, Context
from tools.gpu_stages.stages import NAMES, STAGES, Stage
from tools.gpu_stages.summary import summary


def read(path: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads(path.read_text())
    return found


def test_stages_are_those_of_a_lease() -> None:
    assert len(NAMES) == len(set(NAMES)) == 11
    assert sum(stage.seconds for stage in STAGES) < 550


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(NAMES)


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--output", str(tmp_path / "out")]) == 2
    assert "--rehearse" in capsys.readouterr().err and not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--seconds", "0"])
    assert stopped.value.code == 2


def stages(*seconds: float) -> list[Stage]:
    return [Stage(f"s{i}", value, "what", "module:run") for i, value in enumerate(seconds)]


def test_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gets its seconds, the last of them what is left; one for which too little is left is not begun."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    given: list[tuple[str, float]] = []

    def run(stage: Stage, seconds: float) -> None:
        given.append((stage.name, seconds))
        now[0] += seconds

    runner.run_all(stages(30, 50, 60, 100, 10), 100.0 + runner.GRACE, tmp_path, run)
    assert given == [("s0", 30), ("s1", 50), ("s2", 20)]
    for name in ("s3", "s4"):
        assert read(tmp_path / f"{name}.json")["status"] == SKIPPED


def test_a_cut_stage_keeps_its_rows(tmp_path: Path) -> None:
    context = Context(tmp_path / "s0.json", "s0", rehearse=True, seconds=10.0)
    context.add(method="plain", value=1)
    context.add(method="one_pass", value=2)
    runner.keep_status(context.path, stages(1)[0], FAILED, "stopped after 1 s")
    found = read(context.path)
    assert found["status"] == FAILED and found["reason"] == "stopped after 1 s"
    assert found["rows"] == [{"method": "plain", "value": 1}, {"method": "one_pass", "value": 2}]
    assert not runner.has_result(context.path, rehearsal=True)
    context.write(DONE)
    assert runner.has_result(context.path, rehearsal=True) and not runner.has_result(context.path, rehearsal=False)
    assert not list(tmp_path.glob(".*"))


def write(folder: Path, name: str, status: str, rows: list[dict[str, object]]) -> None:
    context = Context(folder / f"{name}.json", name, rehearse=True, seconds=1.0, rows=rows)
    context.write(status)


def test_summary_has_what_was_found_and_what_was_not(tmp_path: Path) -> None:
    conditions = {"cpu": "a CPU", "rehearsal": True, "versions": {"torch": "2"}, "python": "3", "commit": "0123456789"}
    (tmp_path / "conditions.json").write_text(json.dumps(conditions))
    timed = {"seconds": {"median": 0.5}, "time_ratio": {"median": 1.1, "min": 1.0, "max": 1.2}}
    rows: list[dict[str, object]] = [
        {"shape": "llama", "method": "one_pass", **timed, "peak_bytes": 2**21, "memory_ratio": 0.8},
        {"shape": "llama", "method": "opacus_ghost", "reason": "out of memory"},
        {"shape": "llama", "method": "two_pass", "first_seconds": 3.0, "peak_bytes": 2**20},
    ]
    write(tmp_path, "long", DONE, rows)
    write(tmp_path, "kernels", WRONG, [])
    text = summary(tmp_path)
    assert "| kernels | wrong |" in text and "| norms |" not in text
    assert "| llama | one_pass | 0.5 | 1.10 (1.00 to 1.20) | 2 | 0.80 |" in text
    assert "| llama | opacus_ghost | out of memory |" in text and "not timed (first step 3 s) | | 1 |" in text
