"""The command line of tools/profile_trainers.py: what is refused, and the shapes that it asks for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tools.benchmarks.cases import build_model
from tools.profile_trainers import main
from tools.trainers.options import SIZES, parse, shapes_of


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--mode test --trainer StandardTrainer", "--mode test settles --trainer itself"),
        ("--mode test --gradient-checkpointing", "settles --gradient-checkpointing itself"),
        ("--mode profile --batch-size 2", "--mode profile settles --batch-size itself"),
        ("--mode single", "--mode single needs --trainer: StandardTrainer, "),
        ("--mode single --trainer Nobody", "trainer is 'Nobody'; expected one of StandardTrainer, "),
        ("--mode single --trainer os:path", "trainer is 'os:path'; expected one of"),
        ("--mode single --trainer nowhere:Nobody", "No module named 'nowhere'"),
        ("--mode single --trainer StandardTrainer --seq-len 1", "--seq-len is 1; expected at least 2"),
        ("--mode test --warmup 0", "--warmup is 0; expected at least 1"),
        ("--mode all", "invalid choice: 'all'"),
        ("--mode test --json here.txt", "not a file whose name ends in .json"),
    ],
)
def test_wrong_options(given: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(None, given.split())
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("profile_trainers: ") and said in line


def test_what_cannot_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "file").touch()
    for given, directory in (
        ("--mode profile", tmp_path / "runs"),
        ("--mode single --trainer StandardTrainer --device cuda", tmp_path / "runs"),
        ("--mode test", tmp_path / "file" / "runs"),
    ):
        assert main([*given.split(), "--output-dir", str(directory)]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("profile_trainers: ")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_shapes_of_the_modes() -> None:
    single = "--mode single --trainer StandardTrainer --batch-size 2 --seq-len 8 --model-size medium --dtype bfloat16"
    (shape,) = shapes_of(parse(None, [*single.split(), "--gradient-checkpointing"]))
    assert shape == replace(SIZES["medium"], rows=2, tokens=8, dtype="bfloat16", checkpointing=True)
    shapes = shapes_of(parse(None, ["--mode", "profile"]))
    assert [(s.rows, s.tokens) for s in shapes] == [(4, 512), (4, 1024), (8, 512), (8, 1024)]
    models = {name: build_model(size, "meta") for name, size in SIZES.items()}
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    assert 1e6 < sizes["small"] < 1.1e6 < 1e8 < sizes["medium"] < 2e8 < 9e8 < sizes["large"] < 1.1e9
