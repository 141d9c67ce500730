"""The commands of tools/profile_memory.py without their processes: what is refused, printed and left behind."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tools.memory.examples import example
from tools import profile_memory
from tools.memory import commands
from tools.memory.result import write_result

SIZE = ["--vocab-size", "320", "--hidden-dim", "64", "--num-layers", "2", "--num-heads", "2", "--seq-len", "96"]
SIZE += ["--device", "cpu", "--threads", "1"]
ENVIRONMENT = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "TOKENIZERS_PARALLELISM", "PYTORCH_CUDA_ALLOC_CONF")
REPORT = {"memory_breakdown_comparison.png", "memory_timeline.png", "performance_tradeoff.png", "summary.txt"}
REPORT |= {"memory_table.tex", "index.html"}


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    """What a run sets for its processes is taken back."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ENVIRONMENT:
            patch.setenv(name, os.environ.get(name, "1"))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of results."""
    made = tmp_path_factory.mktemp("runs")
    for name in ("vanilla", "ghost", "flash_clip"):
        write_result(made / f"{name}.json", example(name))
    return made


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


def test_an_interruption_after_the_measurements(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    result = json.loads((folder / "vanilla.json").read_text())

    def measured(names: Any, setup: Any, repetitions: int, say: Any, keep: Any) -> list[dict[str, Any]]:
        keep(result)
        return [result]

    monkeypatch.setattr(commands, "measure", measured)
    monkeypatch.setattr(commands, "write_report", interrupted)
    words = ["run", *SIZE, "--experiments", "vanilla", "--output-dir", str(tmp_path / "runs")]
    assert profile_memory.main(words) == 130
    (made,) = (tmp_path / "runs").iterdir()
    assert f"interrupted; what was finished is in {made}" in capsys.readouterr().err
    assert [path.name for path in made.iterdir()] == ["vanilla.json"]
    assert profile_memory.main(["plot", "--input-dir", str(made), "--output-dir", str(tmp_path / "plots")]) == 130
    assert capsys.readouterr().err.strip() == "profile_memory: interrupted"
