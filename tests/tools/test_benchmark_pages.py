"""The page of benchmarks and the README's picture show what the kept JSON files say, and notice when those change."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tools import benchmark_pages, readme_picture

DOCS = benchmark_pages.DOCS


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    """A copy of the JSON files that may be changed."""
    for path in [*(DOCS / "benchmarks").glob("*.json"), *(DOCS / "benchmarks").glob("audit/*.json")]:
        target = tmp_path / path.relative_to(DOCS)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return tmp_path


def change(docs: Path, name: str, *keys: Any, to: Any) -> None:
    """Set one value of a JSON file."""
    path = docs / "benchmarks" / name
    report = json.loads(path.read_text(encoding="utf-8"))
    place = report
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = to
    path.write_text(json.dumps(report), encoding="utf-8")


def test_the_page_is_what_the_files_give() -> None:
    assert (DOCS / "benchmarks.md").read_text(encoding="utf-8") == benchmark_pages.page(), (
        "run python tools/benchmark_pages.py"
    )


def test_every_file_has_a_section_with_its_commit() -> None:
    page = benchmark_pages.page()
    for path in (DOCS / "benchmarks").rglob("*.json"):
        if "gpu" in path.parts:
            continue
        name = path.relative_to(DOCS / "benchmarks").as_posix()
        (section,) = [part for part in page.split("\n## ") if f"(benchmarks/{name})" in part]
        assert json.loads(path.read_text(encoding="utf-8"))["conditions"]["commit"][:7] in section
        assert "|---|" in section


@pytest.mark.parametrize(
    ("name", "keys", "value", "shown"),
    [
        ("steps_short_cpu.json", ("results", 0, "rows", 1, "memory_ratio"), 77.125, "77.12 x"),
        ("steps_cpu.json", ("results", 0, "rows", 1, "time_ratio", "median"), 77.125, "77.12 x"),
        ("norms_cpu.json", ("results", 0, "rows", 1, "times_opacus", "median"), 77.125, "77.12 x"),
        ("engines_cpu.json", ("results", "ddp", 0, "peak"), 77.125, "77.12"),
        ("sequence_cpu_2.json", ("results", "zero2", 0, "wire_ratio"), 77.125, "77.12 x"),
        ("long_context_cpu.json", ("results", 0, "peak_of_plain"), 77.125, "77.125 x"),
        ("long_context_planned.json", ("rows", 0, "seconds"), 7712.0, "7,712"),
        ("noise_planned.json", ("rows", 0, "ms for a logical batch"), 77.125, "77.125"),
        ("audit/audit.json", ("audits", -1, "epsilon_lower"), 77.125, "77.12"),
    ],
)
def test_a_number_on_the_page_is_that_of_the_file(
    docs: Path, name: str, keys: tuple[Any, ...], value: float, shown: str
) -> None:
    assert shown not in benchmark_pages.page(docs)
    change(docs, name, *keys, to=value)
    assert shown in benchmark_pages.page(docs)


def test_a_new_file_gets_a_table_or_an_error(docs: Path) -> None:
    found = json.loads((docs / "benchmarks" / "norms_cpu.json").read_text(encoding="utf-8"))["conditions"]
    new = docs / "benchmarks" / "classification_cpu.json"
    new.write_text(json.dumps({"conditions": found, "results": [{"epsilon": 8, "accuracy": [0.18, 0.787]}]}))
    assert "| epsilon | accuracy |\n|---|---|\n| 8 | 0.18 to 0.787 |" in benchmark_pages.page(docs)
    new.write_text(json.dumps({"conditions": found, "something": 1}))
    with pytest.raises(ValueError, match="classification_cpu"):
        benchmark_pages.page(docs)


def test_the_hook_writes_the_page_once(docs: Path) -> None:
    benchmark_pages.on_pre_build({"docs_dir": str(docs)})
    written = (docs / "benchmarks.md").stat().st_mtime_ns
    benchmark_pages.on_pre_build({"docs_dir": str(docs)})
    assert (docs / "benchmarks.md").stat().st_mtime_ns == written


def test_the_picture_is_of_the_results_that_are_kept() -> None:
    assert readme_picture.is_current(), "run python tools/readme_picture.py"


def test_the_picture_is_old_when_a_result_changes(docs: Path) -> None:
    (docs / "images").mkdir()
    shutil.copy(DOCS / readme_picture.PICTURE, docs / readme_picture.PICTURE)
    assert readme_picture.is_current(docs)
    change(docs, "steps_2048_cpu.json", "results", 0, "rows", 1, "memory_ratio", to=0.5)
    assert not readme_picture.is_current(docs)


def test_losses_are_of_the_setting_with_most_values_of_epsilon(docs: Path) -> None:
    def row(epsilon: float, loss: float, batch: int = 256) -> dict[str, float]:
        setting = {"batch": batch, "steps": 12, "learning_rate": 0.005, "clip_norm": 1.0, "lora_r": 0}
        return {**setting, "epsilon": epsilon, "loss_before": 4.7, "loss_after": loss}

    results = [row(8, 4.0, batch=512), row(8, 4.2), row(8, 4.4), row(3, 4.5)]
    path = docs / "benchmarks" / "loss_over_epsilon_cpu.json"
    path.write_text(json.dumps({"results": results}))
    found = readme_picture.losses(docs)
    assert found is not None and found.setting["batch"] == 256 and found.before == pytest.approx(4.7)
    assert found.by_epsilon == pytest.approx({3.0: 4.5, 8.0: 4.3})
    path.write_text(json.dumps({"results": results[:3]}))
    assert readme_picture.losses(docs) is None
