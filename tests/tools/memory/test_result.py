"""Files of memory profiles: what is refused, and one against another."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tools.memory.examples import SETS, TIMES, VANILLA, Results, example, out_of_memory, renamed, simulated
from tools.memory.compare import compare
from tools.memory.pictures import draw_all
from tools.memory.result import ResultError, load_result, load_results, validate, write_result, write_text

# ---------------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("results", SETS.values(), ids=SETS)
def test_examples_are_valid_and_come_back(results: Callable[[], Results], tmp_path: Path) -> None:
    for result in results():
        path = tmp_path / f"{result['experiment']}.json"
        write_result(path, result)
        assert load_result(path) == result  # to the last digit: bytes and timestamps
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json"] * len(results())


def at(data: Any, keys: list[str | int]) -> Any:
    for key in keys:
        data = data[key]
    return data


BROKEN: list[tuple[str, Any, str]] = [
    # where ("!" before the name: taken away), what is put there, what the message says
    ("schema", "other/1", "no memory profile: it has schema 'other/1'; expected schema 'dpft.memory_profile/1'"),
    ("!schema", None, "it has schema None"),
    ("status", "fine", "status is 'fine'; expected one of ok, out_of_memory, failed"),
    ("experiment", " ", "experiment is empty"),
    ("experiment", 3, "experiment is 3; expected str"),
    ("words", 3, "words is 3; expected str or null"),
    ("notes", [None], "notes[0].note is None; expected str"),
    ("environment.versions", ["2.13"], "environment.versions is ['2.13']; expected dict or null"),
    ("profiling.independent", 1, "profiling.independent is 1; expected str or null"),
    ("profiling.time_ratio", "2", "profiling.time_ratio is '2'; expected int or float or null"),
    ("!config", None, "config is missing"),
    ("!snapshots", None, "snapshots is missing"),
    ("!timeline", None, "timeline is missing"),
    ("peak_memory_mb", None, "peak_memory_mb is None"),
    ("peak_memory_mb", float("nan"), "peak_memory_mb is nan; expected a finite number"),
    ("peak_memory_mb", -1.0, "peak_memory_mb is -1.0; expected 0 or more"),
    ("peak_memory_mb", 999.0, "peak_memory_mb is 999.0; expected breakdown.peak_allocated_mb, 421.8"),
    ("peak_memory_mb", 10**400, "peak_memory_mb is 1000"),
    ("breakdown.heap_mb", 0.0, "breakdown has 'heap_mb'; expected only"),
    ("config.memory_limit", "x", "config.memory_limit is 'x'; expected int or float or null"),
    ("config.lora", float("inf"), "config.lora is inf; expected a finite number"),
    ("avg_time_ms", True, "avg_time_ms is True"),
    ("parameters", 1.5, "parameters is 1.5; expected int"),
    ("breakdown", None, "breakdown is None; expected dict"),
    ("!breakdown.buffers_mb", None, "breakdown.buffers_mb is missing"),
    ("breakdown.gradients_mb", 51.0, "breakdown adds up to 422.8 MiB; expected total_allocated_mb, 421.8 MiB"),
    ("breakdown.gradients_mb", -50.0, "breakdown.gradients_mb is -50.0; expected 0 or more"),
    ("breakdown.peak_allocated_mb", 430.0, "breakdown.total_allocated_mb is 421.8; expected peak_allocated_mb, 430.0"),
    ("snapshots.0.allocated_mb", 51.0, "snapshots[0].components adds up to 50.5 MiB; expected allocated_mb, 51 MiB"),
    ("snapshots.0.components.colour_mb", 0.0, "snapshots[0].components has 'colour_mb'"),
    ("snapshots.0", 7, "snapshots[0] is 7; expected dict"),
    ("phases.1.components.norm_samples_mb", 9.0, "phases[1].components adds up to 430.8 MiB; expected peak_mb"),
    ("phases.0.module", 4, "phases[0].module is 4; expected str or null"),
    ("largest.0.component", "heap", "largest[0].component is 'heap'"),
    ("time_ms.min", 101.0, "time_ms has min 101.0, median 100.0, max 105.0"),
    ("timeline.unit", "s", "timeline.unit is 's'; expected 'ms'"),
    ("timeline.columns.0", "heap_mb", "timeline.columns has 'heap_mb'"),
    ("timeline.points.1", [1.0, 2.0], "timeline.points[1] is [1.0, 2.0]; expected a list of the time and 10 amounts"),
    ("timeline.points.0.0", 99.0, "timeline.points[1] is at 2.5 ms; expected 99.0 ms or later"),
    ("timeline.points.2.3", None, "timeline.points[2].gradients_mb is None"),
    ("timeline.marks.0", [0.0], "timeline.marks[0] is [0.0]; expected [milliseconds, name]"),
]


@pytest.mark.parametrize(("where", "value", "message"), BROKEN, ids=[f"{b[0]}={b[1]}"[:40] for b in BROKEN])
def test_inconsistent_result_is_refused(where: str, value: Any, message: str, tmp_path: Path) -> None:
    result = example()
    *keys, last = [int(key) if key.isdigit() else key for key in where.removeprefix("!").split(".")]
    if where.startswith("!"):
        del at(result, keys)[last]
    else:
        at(result, keys)[last] = value
    with pytest.raises(ResultError, match=re.escape(message)) as caught:
        validate(result)
    assert "\n" not in str(caught.value)
    with pytest.raises(ResultError):
        write_result(tmp_path / "broken.json", result)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("data", [None, [], 3, "text", {}])
def test_foreign_data_are_refused(data: Any) -> None:
    with pytest.raises(ResultError, match="no memory profile"):
        validate(data)


def test_reason_is_due_only_where_it_failed() -> None:
    with pytest.raises(ResultError, match="reason is None and status out_of_memory"):
        validate({**out_of_memory(), "reason": None})
    lost = out_of_memory()
    lost["failure"]["components"]["gradients_mb"] += 1
    with pytest.raises(ResultError, match=r"failure\.components adds up"):
        validate(lost)


@pytest.mark.parametrize("scale", [0.01, 1.0])
@pytest.mark.parametrize(("share", "refused"), [(0.0, False), (0.9, False), (-0.9, False), (1.1, True), (-1.1, True)])
def test_sums_have_a_tolerance(scale: float, share: float, refused: bool) -> None:
    """Of 4.2 MiB a thousandth of a MiB; of 422 MiB a ten-thousandth."""
    result = example(scale=scale)
    off = share * (1e-3 if scale < 1 else 1e-4 * result["breakdown"]["total_allocated_mb"])
    result["breakdown"]["activation_hooks_mb"] += off
    if refused:
        with pytest.raises(ResultError, match="breakdown adds up"):
            validate(result)
    else:
        validate(result)


def test_files_that_are_no_results(tmp_path: Path) -> None:
    whole = tmp_path / "vanilla.json"
    write_result(whole, example())
    text = whole.read_text()
    for content, message in (
        (text[: len(text) // 2], "is no whole JSON file"),
        ("", "is no whole JSON file"),
        ("[" * 100_000, "is no whole JSON file"),
        (text.replace('"parameters": 13107200', '"parameters": NaN'), "it has NaN where a number belongs"),
        ('{"a": 1}', "it has schema None"),
    ):
        (tmp_path / "other.json").write_text(content)
        for load in (lambda: load_result(tmp_path / "other.json"), lambda: load_results(tmp_path)):
            with pytest.raises(ResultError, match=rf"other\.json.*{message}") as caught:
                load()
            assert "\n" not in str(caught.value)
    (tmp_path / "other.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ResultError, match=r"other\.json is no whole JSON file"):
        load_results(tmp_path)
    with pytest.raises(ResultError, match=r"absent\.json cannot be read: No such file"):
        load_result(tmp_path / "absent.json")


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="absent is no folder"):
        load_results(tmp_path / "absent")
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ResultError, match="has no result"):
        load_results(tmp_path)
    names = ["zebra", "opacus_fast", "per_sample", "fast", "opacus_ghost", "flash_clip", "ghost", "vanilla", "ant"]
    for i, name in enumerate(names):
        write_result(tmp_path / f"{i}.json", renamed(example(), name))
    found = [result["experiment"] for result in load_results(tmp_path)]
    order = ["vanilla", "ghost", "flash_clip", "fast", "per_sample", "opacus_fast", "opacus_ghost", "ant", "zebra"]
    assert found == order
    write_result(tmp_path / "again.json", example())
    with pytest.raises(ResultError, match=r"again\.json are both of 'vanilla'|are both of 'vanilla'"):
        load_results(tmp_path)


def test_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Path, target: Path) -> None:
        raise OSError("no space")

    write_text(tmp_path / "text", "old")
    monkeypatch.setattr(Path, "replace", broken)
    with pytest.raises(OSError, match="no space"):
        write_text(tmp_path / "text", "new")
    with pytest.raises(OSError, match="no space"):
        draw_all([example()], tmp_path / "pictures")
    assert (tmp_path / "text").read_text() == "old"
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["text"]


# ---------------------------------------------------------------------------------------------------------------------
# Comparison


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
    slow["time_ms"] = {"median": 400.0, "min": 400.0, "max": 400.0, "values": [400.0]}
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


def test_comparison_of_different_experiments_and_settings(tmp_path: Path) -> None:
    ghost, flash = example("ghost"), example("flash_clip")
    flash["config"] |= {"seq_len": 1024, "strategy": "two_pass", "seed": 7, "num_iter": 9, "warmup_iter": 0}
    flash["environment"]["versions"]["torch"] = "9.9"
    flash |= {"time_ms": None, "avg_time_ms": None}
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
