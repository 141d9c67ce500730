"""tools/profile_memory.py from end to end: real processes, small models, and everything that can go wrong."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from tools import profile_memory
from tools.memory import suite
from tools.memory.result import load_result, load_results, validate
from tools.memory.setup import DEFAULT_EXPERIMENTS, Setup

SIZE = ["--vocab-size", "320", "--hidden-dim", "64", "--num-layers", "2", "--num-heads", "2", "--seq-len", "96"]
SIZE += ["--device", "cpu", "--threads", "1"]
SHORT = [*SIZE, "--num-iter", "1", "--warmup-iter", "1"]
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
        assert {"cpu", "commit", "versions", "date", "threads"} <= result["environment"].keys()
        drawn = max(sum(point[1:]) for point in result["timeline"]["points"])
        assert drawn == pytest.approx(result["peak_memory_mb"], rel=0.02), "what is drawn ends below the peak"


def test_the_pictures_are_pictures(folder: Path) -> None:
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            image.load()
            assert min(image.size) > 400
            assert len(set(image.convert("L").resize((64, 64)).getdata())) > 16, path.name


def test_peaks_do_not_depend_on_the_order(folder: Path, tmp_path: Path) -> None:
    """Nor on what ran before: each alone, the last one first, gives the very bytes."""
    before = {result["experiment"]: result for result in load_results(folder)}
    for name in reversed(DEFAULT_EXPERIMENTS):
        path = tmp_path / f"{name}.json"
        assert profile_memory.main(["single", "--experiment", name, "--output", str(path), *SIZE]) == 0
        after = load_result(path)
        assert after["breakdown"] == before[name]["breakdown"]
        assert [p["peak_mb"] for p in after["phases"]] == [p["peak_mb"] for p in before[name]["phases"]]


def test_plot_and_compare_of_stored_results(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = tmp_path / "drawn"
    assert profile_memory.main(["plot", "--input-dir", str(folder), "--output-dir", str(drawn)]) == 0
    assert {path.name for path in drawn.iterdir()} == REPORT
    small, large = folder / "flash_clip.json", folder / "ghost.json"
    capsys.readouterr()
    # Either takes more of something than the other: which is a regression both ways, and neither against itself.
    assert profile_memory.main(["compare", str(small), str(large), "--least-mb", "0.01"]) == 1
    assert profile_memory.main(["compare", str(large), str(small), "--threshold", "1000", "--least-mb", "5"]) == 0
    assert profile_memory.main(["compare", str(folder), str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.rpartition("\n{")[2].join(["{", ""]))
    assert found["regressed"] is False


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


def _dies(setup: Setup, name: str, say: Any) -> dict[str, Any]:
    say("iter0_backward")
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def test_a_process_that_is_killed_is_a_result() -> None:
    setup = profile_memory.setup_of(profile_memory.parse(["run", *SHORT]))
    found = suite.ask(_dies, setup, "vanilla", lambda _: None)
    assert found["status"] == "out_of_memory"
    assert found["failure"]["phase"] == "iter0_backward"
    assert "killed" in found["reason"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "--experiments", "vanila"], "vanila"),
        (["single", "--experiment", "none", "--output", "OUT/x.json"], "none"),
        (["run", "--seq-len", "0"], "at least 1"),
        (["run", "--seq-len", "many"], "--seq-len"),
        (["run", "--hidden-dim", "65", "--num-heads", "2"], "multiple"),
        (["run", "--dtype", "int8"], "int8"),
        (["run", "--one-pass", "--two-pass"], "not allowed"),
        (["run", "--model", "./nowhere"], "nowhere"),
        (["run", "--model", "m", "--hidden-dim", "64"], "--hidden-dim"),
        (["run", "--model", "OUT/gpt2", "--seq-len", "129", "--simulate"], "128 positions"),
        (["run", "--engine", "zero2", "--world-size", "2"], "--simulate"),
        (["run", "--simulate", "--world-size", "2"], "engine"),
        (["run", "--memory-limit", "-1"], "--memory-limit"),
        (["run", "--memory-limit", "inf"], "--memory-limit"),
        (["run", "--memory-limit", "1", "--simulate"], "--memory-limit"),
        (["run", "--engine", "zero2", "--simulate"], "--world-size"),
        (["run", "--experiments", "opacus_ghost", "--simulate"], "opacus_ghost"),
        (["run", "--seed", "9" * 20], "--seed"),
        (["run", "--loss-chunk", "1.5"], "1.5"),
        (["run", "--output-dir", "OUT/file/below"], "file"),
        (["single", "--experiment", "vanilla", "--output", "OUT/x.txt"], ".json"),
        (["single", "--experiment", "vanilla", "--output", "OUT/file/x.json"], "cannot be written"),
        (["plot", "--input-dir", "OUT/nowhere", "--output-dir", "OUT/p"], "no folder"),
        (["plot", "--input-dir", "OUT/cut", "--output-dir", "OUT/p"], "cut off"),
        (["plot", "--input-dir", "OUT/foreign", "--output-dir", "OUT/p"], "memory profile"),
        (["plot", "--input-dir", "OUT/good", "--output-dir", "OUT/file"], "file"),
        (["compare", "OUT/cut/vanilla.json", "OUT/good/vanilla.json"], "cut off"),
        (["compare", "OUT/good/vanilla.json", "OUT/nowhere.json"], "nowhere.json"),
        (["compare", "OUT/good/vanilla.json", "OUT/good"], "folder"),
        (["fly"], "fly"),
        ([], "command"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_one_line_and_status_2(
    arguments: list[str], words: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("a file")
    for name in ("cut", "foreign", "good"):
        (tmp_path / name).mkdir()
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2/config.json").write_text('{"model_type": "gpt2", "n_positions": 128}')
    whole = (folder / "vanilla.json").read_text()
    (tmp_path / "cut/vanilla.json").write_text(whole[: len(whole) // 2])
    (tmp_path / "foreign/other.json").write_text('{"some": "thing"}')
    shutil.copy(folder / "vanilla.json", tmp_path / "good/vanilla.json")
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    try:
        status = profile_memory.main([text.replace("OUT", str(tmp_path)) for text in arguments])
    except SystemExit as error:
        status = error.code  # type: ignore[assignment]  # argparse exits with a number
    printed = capsys.readouterr()
    assert status == 2
    assert printed.out == ""
    (line,) = printed.err.strip().splitlines()
    assert words in line
    assert sorted(tmp_path.rglob("*")) == before


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


def test_an_interruption_after_the_measurements(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    result = json.loads((folder / "vanilla.json").read_text())
    monkeypatch.setattr(profile_memory, "run_experiment", lambda *args: result)
    monkeypatch.setattr(profile_memory, "write_report", interrupted)
    words = ["run", *SIZE, "--experiments", "vanilla", "--output-dir", str(tmp_path / "runs")]
    assert profile_memory.main(words) == 130
    (made,) = (tmp_path / "runs").iterdir()
    assert f"interrupted; what was finished is in {made}" in capsys.readouterr().err
    assert [path.name for path in made.iterdir()] == ["vanilla.json"]
    assert profile_memory.main(["plot", "--input-dir", str(made), "--output-dir", str(tmp_path / "plots")]) == 130
    assert capsys.readouterr().err.strip() == "profile_memory: interrupted"


def _endless(setup: Setup, name: str, say: Any) -> dict[str, Any]:
    say("iter0_forward")
    time.sleep(1000)
    return {}


def test_a_parent_that_is_killed_leaves_no_child() -> None:
    """All that a child notices of it is that the pipe is closed."""
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    setup = profile_memory.setup_of(profile_memory.parse(["run", *SHORT]))
    child = context.Process(target=suite._serve, args=(theirs, _endless, setup, "vanilla"))
    child.start()
    theirs.close()
    assert ours.recv() == ("at", "iter0_forward")
    ours.close()
    child.join(30)
    assert child.exitcode == 1
