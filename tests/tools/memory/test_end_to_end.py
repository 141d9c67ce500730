"""tools/profile_memory.py from end to end: real processes, small models, and what can go wrong with them."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.tools.memory.measured import TINY
from tools import profile_memory
from tools.common.worker import report
from tools.memory.measurement import memory_of
from tools.memory.result import load_result, load_results, validate
from tools.memory.setup import DEFAULT_EXPERIMENTS, Setup

SIZE = ["--vocab-size", "320", "--hidden-dim", "64", "--num-layers", "2", "--num-heads", "2", "--seq-len", "96"]
SIZE += ["--device", "cpu", "--threads", "1"]
SHORT = [*SIZE, "--num-iter", "1", "--warmup-iter", "1"]
pytestmark = pytest.mark.slow  # every test starts several processes, or reads what they have left
ENVIRONMENT = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "TOKENIZERS_PARALLELISM", "PYTORCH_CUDA_ALLOC_CONF")
REPORT = {"memory_breakdown_comparison.png", "memory_timeline.png", "performance_tradeoff.png", "summary.txt"}
REPORT |= {"memory_table.tex", "index.html"}
SNAPSHOTS = ["0_model_loaded", "1_wrapped_with_dp", "2_optimizer_created", "3_after_warmup"]
POINTS = ("before_forward", "after_forward", "after_backward", "after_step")


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    """What a run sets for its processes is taken back."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ENVIRONMENT:
            patch.setenv(name, os.environ.get(name, "1"))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the default experiments."""
    parent = tmp_path_factory.mktemp("runs") / "new"
    assert profile_memory.main(["run", *SIZE, "--output-dir", str(parent)]) == 0
    (made,) = parent.iterdir()
    return made


def test_a_run_leaves_everything(folder: Path) -> None:
    assert folder.name.startswith("run_")
    results = {f"{name}.json" for name in DEFAULT_EXPERIMENTS}
    assert {path.name for path in folder.iterdir()} == REPORT | results | {"run.json"}
    loaded = load_results(folder)
    assert [result["experiment"] for result in loaded] == list(DEFAULT_EXPERIMENTS)
    for result in loaded:
        names = [*SNAPSHOTS, *(f"iter{i}_{point}" for i in range(3) for point in POINTS)]
        assert [snapshot["name"] for snapshot in result["snapshots"]] == names
        parts = ("forward", "backward", "step")
        phases = ["wrap", "optimizer", "warmup", *(f"iter{i}_{part}" for i in range(3) for part in parts)]
        assert [phase["name"] for phase in result["phases"]] == phases
        assert sum(result["breakdown"].values()) == pytest.approx(3 * result["peak_memory_mb"])
        assert abs(result["breakdown"]["unattributed_mb"]) <= 0.02 * result["peak_memory_mb"]
        assert len(result["time_ms"]["values"]) == 3
        assert result["avg_time_ms"] == pytest.approx(sum(result["time_ms"]["values"]) / 3)
        assert result["profiling"]["time_ratio"] > 0
        others = [name for name in DEFAULT_EXPERIMENTS if name != result["experiment"]]
        assert result["timing"] == {"interleaved_with": others, "alone_because": None}
        paired = zip(result["time_ms"]["values"], loaded[0]["time_ms"]["values"], strict=True)
        assert result["time_over_vanilla"]["values"] == pytest.approx([time / vanilla for time, vanilla in paired])
        assert {"cpu", "commit", "versions", "date", "threads"} <= result["environment"].keys()
        drawn = max(sum(point[1:]) for point in result["timeline"]["points"])
        assert drawn == pytest.approx(result["peak_memory_mb"], rel=0.02), "what is drawn ends below the peak"


def test_the_pictures_are_pictures(folder: Path) -> None:
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            image.load()
            assert min(image.size) > 400
            assert len(np.unique(np.asarray(image.convert("L").resize((64, 64))))) > 16, path.name


def test_peaks_do_not_depend_on_the_order(folder: Path, tmp_path: Path) -> None:
    """Nor on what ran before: each alone, the last one first, gives the very bytes."""
    before = {result["experiment"]: result for result in load_results(folder)}
    for name in reversed(DEFAULT_EXPERIMENTS):
        path = tmp_path / f"{name}.json"
        assert profile_memory.main(["single", "--experiment", name, "--output", str(path), *SIZE]) == 0
        after = load_result(path)
        assert after["timing"] == {"interleaved_with": [], "alone_because": "it is the only experiment"}
        assert after["time_over_vanilla"] is None and len(after["time_ms"]["values"]) == 3
        assert after["breakdown"] == before[name]["breakdown"]
        assert [p["peak_mb"] for p in after["phases"]] == [p["peak_mb"] for p in before[name]["phases"]]


def test_json_for_machines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", "--experiments", "vanilla", *SHORT, "--simulate", "--output-dir", str(tmp_path), "--json"]
    assert profile_memory.main([*arguments, "--repetitions", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    (result,) = found["results"]
    validate(result)
    assert result["config"]["simulate"] is True
    assert result["time_ms"] is None
    assert result["repetitions"]["count"] == len(result["repetitions"]["peak_memory_mb"]["values"]) == 2
    assert Path(found["directory"]).parent == tmp_path


def test_out_of_memory_is_a_result_and_the_suite_goes_on(tmp_path: Path) -> None:
    """The limit lets plain training pass, and stops what needs every example's gradients besides."""
    arguments = ["run", "--experiments", "per_sample", "vanilla", *SHORT, "--batch-size", "16"]
    arguments += ["--seq-len", "16", "--hidden-dim", "256", "--vocab-size", "8000", "--memory-limit", "0.35"]
    assert profile_memory.main([*arguments, "--output-dir", str(tmp_path)]) == 0
    (made,) = tmp_path.iterdir()
    failed, good = (load_result(made / f"{name}.json") for name in ("per_sample", "vanilla"))
    assert (failed["status"], good["status"]) == ("out_of_memory", "ok")
    assert failed["failure"]["phase"] == "warmup, backward"
    assert failed["failure"]["module"]
    assert re.search(r"asked for [\d.]+ MiB more; the limit is 0.35 GiB", failed["reason"])
    assert failed["failure"]["allocated_mb"] > 0
    assert sum(failed["failure"]["components"].values()) == pytest.approx(failed["failure"]["allocated_mb"])
    assert {path.name for path in made.iterdir()} >= REPORT
    assert "out of memory" in (made / "summary.txt").read_text()


def _dies(setup: Setup, name: str) -> dict[str, Any]:
    report("iter0_backward")
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def test_a_process_that_is_killed_is_a_result() -> None:
    found = memory_of("vanilla", TINY, lambda _: None, _dies)
    assert found["status"] == "out_of_memory"
    assert found["failure"]["phase"] == "iter0_backward"
    assert "killed" in found["reason"]


def _cannot_be_built(setup: Setup, name: str) -> dict[str, Any]:
    report("model")
    raise ValueError("planted")


def test_a_model_that_cannot_be_built_is_a_result() -> None:
    found = memory_of("vanilla", TINY, lambda _: None, _cannot_be_built)
    assert (found["status"], found["failure"]["phase"]) == ("failed", "model")
    assert found["reason"] == "ValueError: planted"


def test_ctrl_c_ends_the_children(tmp_path: Path) -> None:
    command = [sys.executable, profile_memory.__file__, "run", *SIZE, "--num-iter", "1000"]
    command += ["--output-dir", str(tmp_path)]
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a background job is started to ignore it
    parent = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=heed)
    assert parent.stderr is not None
    assert any("warmup" in line for line in parent.stderr)
    children = psutil.Process(parent.pid).children(recursive=True)
    assert children
    os.killpg(parent.pid, signal.SIGINT)
    _, rest = parent.communicate(timeout=60)
    assert parent.returncode == 130
    assert "interrupted" in rest
    assert not psutil.wait_procs(children, timeout=30)[1]
    assert not list(tmp_path.iterdir())  # nothing was finished, and nothing is half there
