"""One memory profile against another."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.tools.memory.examples import TIMES, VANILLA, alone, example, out_of_memory, simulated
from tools.memory.compare import compare
from tools.memory.result import ResultError, write_result


def stored(folder: Path, *results: dict[str, Any]) -> Path:
    for result in results:
        write_result(folder / f"{result['experiment']}.json", result)
    return folder


def raised(**more: float) -> dict[str, Any]:
    """Vanilla, with MiB added to some components."""
    return example(**{key: VANILLA.get(key, 0.0) + mb for key, mb in more.items()})


@pytest.mark.parametrize(
    ("more", "threshold", "least", "regressed"),
    [
        ({}, 0.0, 0.0, []),
        ({"gradients": 2.5}, 5.0, 1.0, []),  # of 50: 5 %, not more
        ({"gradients": 2.6}, 5.0, 1.0, ["gradients"]),
        ({"gradients": 2.6}, 5.0, 2.7, []),  # more than 5 %, and too small to matter
        ({"gradients": 1.0}, 1.0, 1.0, []),  # 1 MiB, not more
        ({"gradients": -30.0}, 0.0, 0.0, []),
        ({"norm_samples": 1.0}, 5.0, 1.0, []),  # was 0
        ({"norm_samples": 1.1}, 5.0, 1.0, ["norms"]),
        ({"activation_hooks": 30.0}, 5.0, 1.0, ["peak", "saved activations"]),
        ({"unattributed": 2.0}, 5.0, 1.0, ["unattributed"]),
        ({"activation_hooks": 30.0, "temp_matrices": -30.0}, 5.0, 1.0, ["saved activations"]),
    ],
)
def test_regressions(
    more: dict[str, float], threshold: float, least: float, regressed: list[str], tmp_path: Path
) -> None:
    before, after = stored(tmp_path / "a", example()), stored(tmp_path / "b", raised(**more))
    for a, b in ((before, after), (before / "vanilla.json", after / "vanilla.json")):
        found = compare(a, b, threshold, least)
        assert [row.what for row in found.rows if row.regressed] == regressed
        assert found.regressed == bool(regressed) and not found.warnings and not found.failures
        assert found.text().count("REGRESSED") == len(regressed)
        assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["regressed"] == bool(regressed)
    back = compare(after, before, threshold, least)
    assert not back.regressed or any(mb < -1 for mb in more.values())


def test_comparison_shows_amounts_and_time(tmp_path: Path) -> None:
    slow = raised(gradients=10.0)
    slow["time_ms"] = {"median": 400.0, "min": 400.0, "max": 400.0, "values": [400.0] * 3}
    found = compare(stored(tmp_path / "a", example()), stored(tmp_path / "b", slow), 50.0, 1.0)
    rows = {row.what: row for row in found.rows}
    assert rows["gradients"].before == 50.0 and rows["gradients"].after == 60.0
    assert rows["gradients"].change_percent == pytest.approx(20.0)
    assert rows["norms"].change_percent is None
    assert (rows["time per step"].before, rows["time per step"].after) == (TIMES["vanilla"], 400.0)
    assert rows["time per step"].unit == "ms" and not found.regressed
    text = found.text()
    assert re.search(r"gradients +50\.00 +60\.00 +\+20\.0 % MiB\n", text)
    assert re.search(r"time per step +100\.00 +400\.00 +\+300\.0 % ms\n", text)
    assert "nothing is more than 50 % and 1 MiB above" in text


def test_comparison_shows_the_ratio_to_vanillas_time(tmp_path: Path) -> None:
    """It is never a regression, and left out where neither side has one."""
    slow = example("ghost")
    slow["time_over_vanilla"] = {"median": 3.02, "min": 3.0, "max": 3.1, "values": [3.0, 3.02, 3.1]}
    found = compare(stored(tmp_path / "a", example("ghost")), stored(tmp_path / "b", slow))
    assert re.search(r"time over vanilla's +1\.51 +3\.02 +\+100\.0 % x\n", found.text()) and not found.regressed
    found = compare(stored(tmp_path / "c", alone("ghost")), stored(tmp_path / "d", alone("ghost")))
    assert "over vanilla's" not in found.text()


def test_comparison_of_different_experiments_and_settings(tmp_path: Path) -> None:
    ghost, flash = example("ghost"), example("flash_clip")
    flash["config"] |= {"seq_len": 1024, "strategy": "two_pass", "seed": 7, "num_iter": 9, "warmup_iter": 0}
    flash["environment"]["versions"]["torch"] = "9.9"
    flash |= dict.fromkeys(("time_ms", "avg_time_ms", "time_over_vanilla", "timing"))
    folder = stored(tmp_path, ghost, flash)
    found = compare(folder / "ghost.json", folder / "flash_clip.json", 5.0, 1.0)
    assert {row.experiment for row in found.rows} == {"ghost -> flash_clip"} and not found.regressed
    named = [re.search(r": (\S+) differs", text) for text in found.warnings]
    assert [name and name[1] for name in named] == ["config.seq_len", "config.strategy", "torch"]
    assert "512 before, 1024 after" in found.text()
    back = compare(folder / "flash_clip.json", folder / "ghost.json", 5.0, 1.0)
    assert [row.what for row in back.rows if row.regressed] == ["peak", "temporary matrices"]


def test_missing_new_and_failed_experiments(tmp_path: Path) -> None:
    a = stored(tmp_path / "a", example(), example("ghost"), example("per_sample"))
    b = stored(tmp_path / "b", example(), example("flash_clip"), out_of_memory("per_sample"))
    found = compare(a, b)
    assert found.regressed and not any(row.regressed for row in found.rows)
    assert len(found.failures) == 2
    assert (
        found.failures[0].startswith("ghost is missing") and "per_sample was ok and is out_of_memory" in found.text()
    )
    assert found.warnings == ["flash_clip is new"]
    back = compare(b, a)
    assert "per_sample was out_of_memory" in back.warnings[0] and "flash_clip is missing" in back.failures[0]
    assert {row.experiment for row in back.rows} == {"vanilla"}
    with pytest.raises(ResultError, match=r"per_sample is out_of_memory .* expected one that is ok"):
        compare(b / "per_sample.json", a / "per_sample.json")
    with pytest.raises(ResultError, match="expected two files or two folders"):
        compare(a, b / "vanilla.json")
    with pytest.raises(ResultError, match="cannot be read"):
        compare(a, tmp_path / "absent")
    for threshold, least in ((-1.0, 1.0), (float("nan"), 1.0), (1.0, float("inf"))):
        with pytest.raises(ResultError, match="expected a finite number, 0 or more"):
            compare(a, a, threshold, least)


def test_a_component_that_grows_away_from_the_peak(tmp_path: Path) -> None:
    """What the private step keeps may be large where the whole is not."""
    sides = [example("ghost"), example("ghost")]
    for side, kept in zip(sides, (3.0, 7.0), strict=True):
        side["highest"] = {"book_keeping_mb": kept, "gradients_mb": 5.0}
    a, b = (stored(tmp_path / name, side) / "ghost.json" for name, side in zip("ab", sides, strict=True))
    assert [row.what for row in compare(a, b).rows if row.regressed] == ["book-keeping of the private step, ever"]
    assert not compare(b, a).regressed and not compare(a, a).regressed


def test_versions_that_decide_the_bytes_are_named(tmp_path: Path) -> None:
    other = example("ghost")
    other["environment"]["versions"] |= {"transformers": "9.9", "opacus": "9.9"}
    a, b = (stored(tmp_path / name, side) / "ghost.json" for name, side in (("a", example("ghost")), ("b", other)))
    assert [text.split()[1] for text in compare(a, b).warnings] == ["opacus", "transformers"]


def test_simulated_results_are_compared_without_time(tmp_path: Path) -> None:
    found = compare(stored(tmp_path / "a", simulated()), stored(tmp_path / "b", simulated()))
    assert found.rows[-1].before is None and found.rows[-1].change_percent is None and not found.regressed
    assert re.search(r"time per step +- +- +- ms", found.text())
