"""One memory profile against another: a regression check for CI."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tools.memory.components import TITLES
from tools.memory.derived import amounts, milliseconds, time_ratio
from tools.memory.result import ResultError, load_result, load_results

# They change how well a peak is known, not what it is.
NOT_COMPARED = ("repetitions", "seed", "num_iter", "warmup_iter")
MACHINE = ("gpu", "cpu")
LIBRARIES = ("torch", "transformers", "opacus", "peft")


@dataclass(frozen=True)
class Row:
    """One amount before and after; None where there is none, and ``change_percent`` also where it was 0."""

    experiment: str
    what: str
    before: float | None
    after: float | None
    unit: str
    change_percent: float | None
    regressed: bool


@dataclass
class Comparison:
    """What :func:`compare` found.

    Attributes:
        rows: the peak, each component at the peak instant, the highest of a component at any instant where it has
            changed, and the time, of every experiment that both sides have.
        failures: experiments that were ok and no longer are, or that are missing; each of them is a regression.
        warnings: what makes the two sides less comparable, or is new; none of them is a regression.
    """

    threshold_percent: float
    least_mb: float
    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def regressed(self) -> bool:
        """Whether anything got worse by more than the threshold."""
        return bool(self.failures) or any(row.regressed for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"regressed": self.regressed, **asdict(self)}

    def text(self) -> str:
        """A table for the terminal, what is missing or failed, the warnings and the verdict."""
        lines = [f"warning: {text}" for text in self.warnings]
        for experiment in dict.fromkeys(row.experiment for row in self.rows):
            rows = [row for row in self.rows if row.experiment == experiment]
            lines += ["", experiment, f"  {'':32}{'before':>12}{'after':>12}{'change':>12}"]
            for row in rows:
                mark = "  REGRESSED" * row.regressed
                cells = f"{_cell(row.before):>12}{_cell(row.after):>12}{_change(row):>12} {row.unit}"
                lines.append(f"  {row.what:32}{cells}{mark}")
        lines += ["", *(f"REGRESSED: {text}" for text in self.failures)]
        limit = f"more than {self.threshold_percent:g} % and {self.least_mb:g} MiB above"
        count = len(self.failures) + sum(row.regressed for row in self.rows)
        lines.append(f"{count} regressed ({limit})" if count else f"nothing is {limit}")
        return "\n".join(lines).strip("\n") + "\n"


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _change(row: Row) -> str:
    return "-" if row.change_percent is None else f"{row.change_percent:+.1f} %"


def _side(path: Path) -> dict[str, dict[str, Any]]:
    results = load_results(path) if path.is_dir() else [load_result(path)]
    return {result["experiment"]: result for result in results}


def _settings(result: dict[str, Any]) -> dict[str, Any]:
    """What two results have to share for their difference to be the code's."""
    config = {f"config.{key}": value for key, value in result["config"].items() if key not in NOT_COMPARED}
    environment = result["environment"]
    machine = {key: environment.get(key) for key in MACHINE}
    versions = environment.get("versions") or {}
    return {**config, **machine, **{name: versions.get(name) for name in LIBRARIES}}


def _warnings(label: str, before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    first, second = _settings(before), _settings(after)
    names = sorted(name for name in {**first, **second} if first.get(name) != second.get(name))
    return [f"{label}: {name} differs: {first.get(name)!r} before, {second.get(name)!r} after" for name in names]


def compare(before: Path, after: Path, threshold_percent: float = 5.0, least_mb: float = 1.0) -> Comparison:
    """Hold one result, or one run's folder, against an earlier one.

    Two files are compared whatever their experiments are; folders by experiment. The peak or a component, at the peak
    instant or at its own highest, is a regression where it is both more than ``threshold_percent`` and more than
    ``least_mb`` above what it was; one that was 0, where it is more than ``least_mb``. The time is shown and never a
    regression. An experiment that was not ok before is left out with a warning.

    Args:
        before: a result's file or a run's folder, of which at least one experiment is ok.
        after: the same.
        threshold_percent: 0 or more.
        least_mb: MiB, 0 or more.

    Raises:
        ResultError: a file or folder that :func:`tools.memory.result.load_result` refuses; a file against a folder; an
            nothing that was ok before; a threshold that is negative or no number.
    """
    for name, value in (("threshold", threshold_percent), ("least difference", least_mb)):
        if not (math.isfinite(value) and value >= 0):
            raise ResultError(f"the {name} is {value}; expected a finite number, 0 or more")
    if before.exists() and after.exists() and before.is_dir() != after.is_dir():
        folder, file = (before, after) if before.is_dir() else (after, before)
        raise ResultError(f"{folder} is a folder and {file} a file; expected two files or two folders")
    first, second = _side(before), _side(after)
    broken = {name: f"{r['status']} ({r['reason']})" for name, r in first.items() if r["status"] != "ok"}
    if len(broken) == len(first):
        came = "; ".join(f"{name} is {why}" for name, why in broken.items())
        raise ResultError(f"{before}: {came}; expected one that is ok to compare with")
    found = Comparison(threshold_percent, least_mb)
    found.warnings += [f"{name} was {why} before: nothing to compare with" for name, why in broken.items()]
    if before.is_dir():
        pairs = [(name, result, second.get(name)) for name, result in first.items() if name not in broken]
        found.warnings += [f"{name} is new" for name in second if name not in first]
    else:
        ((old, result),), ((new, other),) = first.items(), second.items()
        pairs = [(old if old == new else f"{old} -> {new}", result, other)]
    for label, old_result, new_result in pairs:
        if new_result is None:
            found.failures.append(f"{label} is missing in {after}")
            continue
        found.warnings += _warnings(label, old_result, new_result)
        if new_result["status"] != "ok":
            found.failures.append(f"{label} was ok and is {new_result['status']}: {new_result['reason']}")
            continue
        found.rows += _rows(label, old_result, new_result, threshold_percent, least_mb)
    return found


def _rows(label: str, before: dict[str, Any], after: dict[str, Any], threshold: float, least_mb: float) -> list[Row]:
    old, new = amounts(before), amounts(after)
    triples = [("peak", before["peak_memory_mb"], after["peak_memory_mb"])]
    triples += [(TITLES[key], old[key], new[key]) for key in TITLES]
    old, new = before.get("highest") or {}, after.get("highest") or {}
    ever = [(f"{TITLES[key]}, ever", old.get(f"{key}_mb", 0.0), new.get(f"{key}_mb", 0.0)) for key in TITLES]
    triples += [one for one in ever if old and new and abs(one[2] - one[1]) > least_mb]
    rows = []
    for what, was, now in triples:
        change = 100 * (now - was) / was if was > 0 else None
        # Of one that was 0, or of the unattributed below it, least_mb alone decides.
        worse = now - was > least_mb and 100 * (now - was) > threshold * was
        rows.append(Row(label, what, was, now, "MiB", change, worse))
    for what, of, unit in (("time per step", milliseconds, "ms"), ("time over vanilla's", time_ratio, "x")):
        was, now = of(before), of(after)
        if of is time_ratio and was is None and now is None:
            continue
        change = 100 * (now - was) / was if was and now is not None else None
        rows.append(Row(label, what, was, now, unit, change, False))
    return rows
