"""A stored memory profile: its components, how it is checked, read and written.

One file per experiment. Every ``_mb`` is MiB (2**20 bytes), every ``_ms`` milliseconds; at every instant that a result
tells of, its components and what is unattributed add up to what was allocated then.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tools.memory.components import TITLES, UNATTRIBUTED

SCHEMA = "dpft.memory_profile/1"
STATUSES = ("ok", "out_of_memory", "failed")
SUMMARY = "run.json"
ORDER = ("vanilla", "ghost", "flash_clip", "fast", "per_sample")
ABSOLUTE_MB = 1e-3
RELATIVE = 1e-4
NUMBER = (int, float)
HUGE = 1e30  # beyond it, a whole number may be too large to be shown or divided


class ResultError(ValueError):
    """A file that is not a result, or one that contradicts itself. The message is one line."""


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _field(data: Mapping[str, Any], name: str, kinds: tuple[type, ...], where: str = "", null: bool = False) -> Any:
    """A field of a kind that is expected; numbers finite, and never a bool in their place."""
    label = f"{where}.{name}" if where else name
    expected = " or ".join([kind.__name__ for kind in kinds] + ["null"] * null)
    if name not in data:
        raise ResultError(f"{label} is missing; expected {expected}")
    value = data[name]
    if value is None and null:
        return value
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise ResultError(f"{label} is {_short(value)}; expected {expected}")
    if isinstance(value, NUMBER) and not -HUGE < value < HUGE:
        raise ResultError(f"{label} is {_short(value)}; expected a finite number below {HUGE:g}")
    return value


def _amount(data: Mapping[str, Any], name: str, where: str = "", null: bool = False, below: bool = False) -> Any:
    """MiB or milliseconds: a number that is not negative, unless ``below``."""
    value = _field(data, name, NUMBER, where, null)
    if value is not None and value < -ABSOLUTE_MB and not below:
        raise ResultError(f"{f'{where}.{name}' if where else name} is {value}; expected 0 or more")
    return value


def _sums(components: Mapping[str, Any], total: float, where: str, total_name: str) -> None:
    """The components of one instant, each of them named, against what was allocated."""
    parts = [_amount(components, f"{key}_mb", where, below=key == UNATTRIBUTED) for key in TITLES]
    if abs(sum(parts) - total) > max(ABSOLUTE_MB, RELATIVE * abs(total)):
        raise ResultError(f"{where} adds up to {sum(parts):.6g} MiB; expected {total_name}, {total:.6g} MiB")


def _instant(entry: Mapping[str, Any], total_name: str, where: str) -> None:
    total = _amount(entry, total_name, where)
    components = _field(entry, "components", (dict,), where)
    for name in components:
        if name.removesuffix("_mb") not in TITLES or not name.endswith("_mb"):
            names = ", ".join(f"{key}_mb" for key in TITLES)
            raise ResultError(f"{where}.components has {_short(name)}; expected only {names}")
    _sums(components, total, f"{where}.components", total_name)


def _entries(data: Mapping[str, Any], name: str) -> Iterable[tuple[str, dict[str, Any]]]:
    for number, entry in enumerate(_field(data, name, (list,))):
        if not isinstance(entry, dict):
            raise ResultError(f"{name}[{number}] is {_short(entry)}; expected dict")
        yield f"{name}[{number}]", entry


def _spread(data: Mapping[str, Any], name: str, where: str = "", null: bool = False) -> None:
    spread = _field(data, name, (dict,), where, null)
    if spread is None:
        return
    label = f"{where}.{name}" if where else name
    least, median, most = (_amount(spread, key, label) for key in ("min", "median", "max"))
    if not least <= median <= most:
        raise ResultError(f"{label} has min {least}, median {median}, max {most}; expected them in this order")
    _field(spread, "values", (list,), label)


def _timing(data: Mapping[str, Any]) -> None:
    """Ratios to vanilla: positive, at most one for each time, and only where vanilla took its steps in between."""
    _spread(data, "time_over_vanilla", null=True)
    timing = _field(data, "timing", (dict,), null=True)
    others: list[Any] = []
    if timing is not None:
        others = _field(timing, "interleaved_with", (list,), "timing")
        for number, name in enumerate(others):
            _field({"name": name}, "name", (str,), f"timing.interleaved_with[{number}]")
        alone = _field(timing, "alone_because", (str,), "timing", null=True)
        if (alone is None) != bool(others):
            expected = "either experiments that it was interleaved with, or the reason why there are none"
            raise ResultError(f"timing is {_short(timing)}; expected {expected}")
    ratios = data["time_over_vanilla"]
    if ratios is None:
        return
    times = _field(data, "time_ms", (dict,))["values"]
    if "vanilla" not in [*others, *([data["experiment"]] if others else [])]:
        came = f"time_over_vanilla is there and timing is {_short(timing)}"
        raise ResultError(f"{came}; expected vanilla in the same rounds")
    if not 0 < len(ratios["values"]) <= len(times):
        came = f"{len(ratios['values'])} ratios of {len(times)} times"
        raise ResultError(f"time_over_vanilla has {came}; expected one for each time, or fewer where a step failed")
    if not ratios["min"] > 0:
        raise ResultError(f"time_over_vanilla has min {ratios['min']}; expected ratios above 0")


def _timeline(data: Mapping[str, Any]) -> None:
    timeline = _field(data, "timeline", (dict,), null=True)
    if timeline is None:
        return
    if _field(timeline, "unit", (str,), "timeline") != "ms":
        raise ResultError(f"timeline.unit is {_short(timeline['unit'])}; expected 'ms'")
    columns = _field(timeline, "columns", (list,), "timeline")
    for name in columns:
        if not isinstance(name, str) or not name.endswith("_mb") or name.removesuffix("_mb") not in TITLES:
            raise ResultError(f"timeline.columns has {_short(name)}; expected a component's name with _mb")
    before = -math.inf
    for number, point in enumerate(_field(timeline, "points", (list,), "timeline")):
        if not isinstance(point, list) or len(point) != len(columns) + 1:
            expected = f"a list of the time and {len(columns)} amounts"
            raise ResultError(f"timeline.points[{number}] is {_short(point)}; expected {expected}")
        row = dict(zip(["time", *columns], point, strict=True))
        for name in row:
            _field(row, name, NUMBER, f"timeline.points[{number}]")
        if row["time"] < before:
            raise ResultError(f"timeline.points[{number}] is at {row['time']} ms; expected {before} ms or later")
        before = row["time"]
    for number, mark in enumerate(_field(timeline, "marks", (list,), "timeline")):
        if not (isinstance(mark, list) and len(mark) == 2 and isinstance(mark[1], str)):
            raise ResultError(f"timeline.marks[{number}] is {_short(mark)}; expected [milliseconds, name]")
        _field({"time": mark[0]}, "time", NUMBER, f"timeline.marks[{number}]")


def _host(data: Mapping[str, Any]) -> None:
    """Host memory, which is in no total: its peak, and ``[milliseconds, MiB]`` through the timeline's step."""
    host = _field({"host": None, **data}, "host", (dict,), null=True)
    if host is None:
        return
    most = _amount(host, "peak_mb", "host")
    for number, point in enumerate(_field(host, "points", (list,), "host")):
        if not isinstance(point, list) or len(point) != 2:
            raise ResultError(f"host.points[{number}] is {_short(point)}; expected [milliseconds, MiB]")
        row = dict(zip(("time", "mb"), point, strict=True))
        _field(row, "time", NUMBER, f"host.points[{number}]")
        if _amount(row, "mb", f"host.points[{number}]") > most + ABSOLUTE_MB:
            raise ResultError(f"host.points[{number}] has {row['mb']} MiB; expected at most host.peak_mb, {most}")


def _breakdown(data: Mapping[str, Any], null: bool) -> None:
    breakdown = _field(data, "breakdown", (dict,), null=null)
    if breakdown is None:
        return
    total, peak = (_amount(breakdown, name, "breakdown") for name in ("total_allocated_mb", "peak_allocated_mb"))
    known = {*(f"{key}_mb" for key in TITLES), "total_allocated_mb", "peak_allocated_mb"}
    if unknown := sorted(set(breakdown) - known):
        raise ResultError(f"breakdown has {_short(unknown[0])}; expected only {', '.join(sorted(known))}")
    _sums(breakdown, total, "breakdown", "total_allocated_mb")
    if abs(total - peak) > max(ABSOLUTE_MB, RELATIVE * peak):
        raise ResultError(f"breakdown.total_allocated_mb is {total}; expected peak_allocated_mb, {peak}")
    whole = data.get("peak_memory_mb")
    if whole is not None and abs(whole - peak) > max(ABSOLUTE_MB, RELATIVE * peak):
        raise ResultError(f"peak_memory_mb is {whole}; expected breakdown.peak_allocated_mb, {peak}")


def _failure(data: Mapping[str, Any]) -> None:
    failure = _field(data, "failure", (dict,), null=True)
    if failure is None:
        return
    _field(failure, "phase", (str,), "failure", null=True)
    _field(failure, "module", (str,), "failure", null=True)
    if _amount(failure, "allocated_mb", "failure", null=True) is not None and failure.get("components"):
        _instant(failure, "allocated_mb", "failure")


def validate(data: object) -> None:
    """Check that a result is whole and consistent.

    Args:
        data: what the file holds.

    Raises:
        ResultError: a foreign file; a field that is missing, of another kind, NaN or infinite; components of the peak,
            a snapshot, a phase or the failure that do not add up to the total (1e-3 MiB or 1e-4 of it).
    """
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        came = f"schema {_short(data.get('schema'))}" if isinstance(data, dict) else f"a {type(data).__name__}"
        raise ResultError(f"it is no memory profile: it has {came}; expected schema {SCHEMA!r}")
    if not _field(data, "experiment", (str,)).strip():
        raise ResultError("experiment is empty; expected a name")
    status = _field(data, "status", (str,))
    if status not in STATUSES:
        raise ResultError(f"status is {_short(status)}; expected one of {', '.join(STATUSES)}")
    failed = status != "ok"
    reason = _field(data, "reason", (str,), null=True)
    if failed and not reason:
        raise ResultError(f"reason is {_short(reason)} and status {status}; expected the reason in words")
    for name in ("config", "environment"):
        for key, value in _field(data, name, (dict,)).items():
            if isinstance(value, NUMBER):
                _field({key: value}, key, (*NUMBER, bool), name)
    _field({"memory_limit": None, **data["config"]}, "memory_limit", NUMBER, "config", null=True)
    _field({"versions": None, **data["environment"]}, "versions", (dict,), "environment", null=True)
    _field({"words": None, **data}, "words", (str,), null=True)
    for number, note in enumerate(_field({"notes": [], **data}, "notes", (list,))):
        _field({"note": note}, "note", (str,), f"notes[{number}]")
    _field(data, "parameters", (int,), null=failed)
    _amount(data, "avg_time_ms", null=True)
    _amount(data, "peak_memory_mb", null=failed)
    _spread(data, "time_ms", null=True)
    _timing({"time_over_vanilla": None, "timing": None, **data})
    _breakdown(data, null=failed)
    _failure(data)
    for where, entry in _entries(data, "snapshots"):
        _field(entry, "name", (str,), where)
        for name in ("reserved_mb", "resident_mb", "timestamp"):
            _amount(entry, name, where, null=True)
        _instant(entry, "allocated_mb", where)
    for where, entry in _entries(data, "phases"):
        _field(entry, "name", (str,), where)
        for name in ("module", "operator"):
            _field(entry, name, (str,), where, null=True)
        _instant(entry, "peak_mb", where)
    for where, entry in _entries(data, "largest"):
        if _field(entry, "component", (str,), where) not in TITLES:
            raise ResultError(
                f"{where}.component is {_short(entry['component'])}; expected one of {', '.join(TITLES)}"
            )
        _amount(entry, "mb", where)
        _field(entry, "shape", (list,), where, null=True)
    highest = _field({"highest": None, **data}, "highest", (dict,), null=True) or {}
    for name in highest:
        _amount(highest, name, "highest")
    _timeline(data)
    _host(data)
    profiling = _field(data, "profiling", (dict,), null=failed) or {}
    for name in ("time_ratio", "independent_peak_mb", "tracked_peak_mb"):
        _amount({name: None, **profiling}, name, "profiling", null=True)
    _field({"independent": None, **profiling}, "independent", (str,), "profiling", null=True)
    repetitions = _field(data, "repetitions", (dict,), null=failed)
    if repetitions:
        _field(repetitions, "count", (int,), "repetitions")
        _spread(repetitions, "peak_memory_mb", "repetitions", null=failed)


def _no_number(text: str) -> None:
    raise ResultError(f"it has {text} where a number belongs; expected finite numbers only")


def load_result(path: Path) -> dict[str, Any]:
    """Read one result and check it.

    Raises:
        ResultError: no such file, one that is not whole, or what :func:`validate` refuses; the path comes first.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
        validate(data)
    except OSError as error:
        raise ResultError(f"{path} cannot be read: {error.strerror or error}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ResultError(f"{path} is no whole JSON file ({error}); was it cut off? Measure it again") from error
    except ResultError as error:
        raise ResultError(f"{path}: {error}") from error
    result: dict[str, Any] = data
    return result


def ordered(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Vanilla, then ours, then Opacus's, then others; by name among equals."""

    def rank(result: dict[str, Any]) -> tuple[int, str]:
        name = result["experiment"]
        known = ORDER.index(name) if name in ORDER else len(ORDER) + (not name.startswith("opacus"))
        return known, name

    return sorted(results, key=rank)


def load_results(directory: Path) -> list[dict[str, Any]]:
    """Every result of a run's folder, in the order that they are shown in.

    Raises:
        ResultError: no such folder, no result in it, a ``*.json`` (other than the suite's ``run.json``) that is none,
            or two of the same experiment.
    """
    if not directory.is_dir():
        raise ResultError(f"{directory} is no folder; expected one with results, <experiment>.json")
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    for path in sorted(directory.glob("*.json")):
        if path.name == SUMMARY or path.name.startswith("."):
            continue
        result = load_result(path)
        name = result["experiment"]
        if name in found:
            raise ResultError(f"{path} and {found[name][0]} are both of {name!r}; expected one of each experiment")
        found[name] = path, result
    if not found:
        raise ResultError(f"{directory} has no result; expected <experiment>.json files of `profile_memory.py run`")
    return ordered(result for _, result in found.values())


def write_text(path: Path, text: str) -> None:
    """:func:`write_bytes` of a text, in UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write the whole file under another name, then give it its own: a reader never meets half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Check a result and write it, every digit of it: five would cost bytes their exactness and timestamps their day.

    Raises:
        ResultError: what :func:`validate` refuses; nothing is written.
    """
    validate(result)
    write_text(path, json.dumps(result, indent=1, allow_nan=False) + "\n")
