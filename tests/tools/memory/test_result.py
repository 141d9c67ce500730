"""Files of memory profiles: what is refused, and one against another."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tools.memory.examples import SETS, Results, example, out_of_memory, renamed
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
    ("time_over_vanilla.min", 2.0, "time_over_vanilla has min 2.0, median 1.0, max 1.02; expected them in this order"),
    ("time_over_vanilla.min", 0.0, "time_over_vanilla has min 0.0; expected ratios above 0"),
    ("time_over_vanilla.values", [], "time_over_vanilla has 0 ratios of 3 times; expected one for each time"),
    ("time_over_vanilla.values", [1.0] * 4, "time_over_vanilla has 4 ratios of 3 times; expected one for each time"),
    ("time_ms", None, "time_ms is None; expected dict"),
    ("timing", None, "time_over_vanilla is there and timing is None; expected vanilla in the same rounds"),
    ("timing.interleaved_with.0", 3, "timing.interleaved_with[0].name is 3; expected str"),
    ("timing.interleaved_with", [], "timing is {'interleaved_with': [], 'alone_because': None}; expected either"),
    (
        "timing.alone_because",
        "no room",
        "timing is {'interleaved_with': ['ghost', 'flash_clip', 'fast', 'per...; expected",
    ),
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


def test_a_ratio_to_vanillas_time_needs_vanilla_in_the_same_rounds() -> None:
    result = example("ghost")
    validate({**result, "timing": {"interleaved_with": ["vanilla"], "alone_because": None}})
    for others, alone in ((["fast"], None), ([], "it is the only experiment")):
        timing = {"interleaved_with": others, "alone_because": alone}
        with pytest.raises(ResultError, match="expected vanilla in the same rounds"):
            validate({**result, "timing": timing})
        validate({**result, "timing": timing, "time_over_vanilla": None})


def test_a_result_of_before_there_were_ratios_is_read() -> None:
    old = example()
    del old["timing"], old["time_over_vanilla"]
    validate(old)


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
