"""Every stage of tools/gpu.py, rehearsed on the CPU; also where only the packages of a GPU machine are installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.gpu_stages.stages import NAMES

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[3]
NOT_THERE = ("opacus", "datasets", "deepspeed", "dp_accounting", "hypothesis", "fastDP")
# None in sys.modules is what the import system takes for "there is no such package"; run by every Python that starts.
BLOCK = f"import sys\nsys.modules.update(dict.fromkeys({NOT_THERE!r}))\n"


def rehearse(output: Path, **environment: str) -> dict[str, dict[str, object]]:
    command = [sys.executable, "tools/gpu.py", "--rehearse", "--seconds", "600", "--output", str(output)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "# Rehearsal on" in done.stdout
    return {name: json.loads((output / f"{name}.json").read_text()) for name in NAMES}


@pytest.mark.timeout(600)
def test_every_stage(tmp_path: Path) -> None:
    found = rehearse(tmp_path)
    assert {name: stage["status"] for name, stage in found.items()} == dict.fromkeys(NAMES, "done")
    methods = {row["method"] for row in found["long"]["rows"] if "seconds" in row and "method" in row}
    assert methods == {"plain", "one_pass", "two_pass", "opacus_ghost"}
    judged = [row for row in found["kernels"]["rows"] if "good" in row]
    assert len(judged) == 3 * 4 + 2 * 3 and all(row["good"] for row in judged)
    assert {row["experiment"] for row in found["memory"]["rows"]} == {"vanilla", "ghost", "flash_clip"}
    (recipe,) = found["recipe"]["rows"]
    assert recipe["card"] and "model.safetensors" in recipe["files"]
    assert (tmp_path / "summary.md").read_text().startswith("# Rehearsal on")


@pytest.mark.timeout(600)
def test_with_the_packages_of_a_gpu_machine(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(BLOCK)
    found = rehearse(tmp_path / "out", PYTHONPATH=str(tmp_path / "site"))
    assert {name: stage["status"] for name, stage in found.items()} == dict.fromkeys(NAMES, "done")
    (missing,) = (row for row in found["machine"]["rows"] if row["what"] == "missing")
    assert {"opacus", "datasets", "deepspeed", "dp_accounting"} <= set(missing["packages"])
    assert {"method": "opacus_ghost", "reason": "Opacus is not installed"} in found["long"]["rows"]
    assert "dp_accounting" in found["recipe"]["rows"][0]["reason"]
    assert {row["method"] for row in found["long"]["rows"] if "seconds" in row and "method" in row} == {
        "plain",
        "one_pass",
        "two_pass",
    }
