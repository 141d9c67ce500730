"""The tables of a memory report, as words: for its text and its page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tools.memory.components import TITLES
from tools.memory.derived import (
    STATUS_WORDS,
    Results,
    added_over,
    amounts,
    milliseconds,
    peak_phase,
    place,
    timed_alone,
    times_of,
    unattributed_percent,
    vanilla_of,
)
from tools.memory.units import grouped, spread_text, unit_for

LARGEST = 5


@dataclass(frozen=True)
class Table:
    """A title, names of columns and rows of words; the first ``left`` columns are words, the others numbers."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1

    def text(self) -> str:
        """Aligned with blanks."""
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]
        lines = [self.title]
        for row in (self.header, *self.rows):
            cells = [
                f"{cell:{'<' if i < self.left else '>'}{width}}"
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append(f"  {'  '.join(cells)}".rstrip())
        return "\n".join(lines)


def _mb(mb: float | None) -> str:
    """MiB to the second place: tables can be added up, and pictures round."""
    return "-" if mb is None else f"{round(mb, 2) + 0.0:,.2f}"  # + 0.0: no minus before a number that is shown as 0


def _added(mb: float) -> str:
    """The same with its sign."""
    return f"{round(mb, 2) + 0.0:+,.2f}"


def component_table(results: Results) -> Table:
    """MiB by component at the peak, a column for each experiment."""
    columns = [amounts(result) for result in results]
    rows = [(words, *(_mb(parts.get(key)) for parts in columns)) for key, words in TITLES.items()]
    totals = [result["breakdown"] and result["breakdown"]["total_allocated_mb"] for result in results]
    rows.append(("total", *(_mb(total) for total in totals)))
    return Table("At the peak, MiB", ("", *(r["experiment"] for r in results)), tuple(rows))


def added_table(results: Results) -> Table | None:
    """MiB by component above the vanilla experiment; None where that or everything else is missing."""
    vanilla = vanilla_of(results)
    others = [r for r in results if vanilla and r is not vanilla and r["breakdown"]]
    if vanilla is None or not others:
        return None
    base, columns = amounts(vanilla), [amounts(result) for result in others]
    rows = [(words, *(_added(parts[key] - base[key]) for parts in columns)) for key, words in TITLES.items()]
    rows.append(("total", *(_added(added_over(result, vanilla)) for result in others)))
    ratios = (times_of(result, vanilla) for result in others)
    rows.append(("total, x vanilla", *("-" if ratio is None else f"{ratio:.3f}" for ratio in ratios)))
    return Table("Added over vanilla, MiB", ("", *(r["experiment"] for r in others)), tuple(rows))


def lost_table(results: Results) -> Table | None:
    """MiB by component when an experiment failed, a column for each that is known of."""
    lost = [r for r in results if r["failure"] and r["failure"].get("components")]
    columns = [result["failure"]["components"] for result in lost]
    rows = [(words, *(_mb(parts[f"{key}_mb"]) for parts in columns)) for key, words in TITLES.items()]
    rows.append(("total", *(_mb(result["failure"]["allocated_mb"]) for result in lost)))
    return Table("When it failed, MiB", ("", *(r["experiment"] for r in lost)), tuple(rows)) if lost else None


def peak_table(results: Results) -> Table:
    """Peak and time of each experiment, with ranges over repetitions."""
    vanilla, rows = vanilla_of(results), []
    for result in results:
        repetitions, measured = result["repetitions"] or {}, vanilla is not None and result["breakdown"]
        peak = result["peak_memory_mb"] if result["status"] == "ok" else None
        ratio = times_of(result, vanilla) if vanilla and measured else None
        time = milliseconds(result)
        average = f"{time:.1f}" if time is not None else "-"
        rows.append(
            (
                result["experiment"],
                STATUS_WORDS[result["status"]],
                _mb(peak),
                spread_text(repetitions.get("peak_memory_mb"), 2),
                str(repetitions.get("count", "-")),
                _added(added_over(result, vanilla)) if vanilla and measured else "-",
                "-" if ratio is None else f"{ratio:.3f}",
                spread_text(result["time_ms"]) if result["time_ms"] else average,
                spread_text(result.get("time_over_vanilla"), 2),
            )
        )
    header = (
        "experiment",
        "result",
        "peak MiB",
        "over repetitions",
        "repetitions",
        "added MiB",
        "x vanilla",
        "median ms a step",
        "time x vanilla",
    )
    return Table("Peak and time", header, tuple(rows), left=2)


def quality_table(results: Results) -> Table:
    """How far each profile can be trusted: what is unattributed, an independent count, what profiling costs."""
    rows = []
    for result in results:
        profiling, share = result["profiling"] or {}, unattributed_percent(result)
        independent, tracked = profiling.get("independent_peak_mb"), profiling.get("tracked_peak_mb")
        off = 100 * (tracked - independent) / independent if independent and tracked is not None else None
        ratio = profiling.get("time_ratio")
        reserved = [s["reserved_mb"] for s in result["snapshots"] if s["reserved_mb"] is not None]
        rows.append(
            (
                result["experiment"],
                profiling.get("independent") or "-",
                "-" if share is None else f"{share:.3f} %",
                _mb(independent),
                "-" if off is None else f"{off:+.3f} %",
                _mb(max(reserved, default=None)),
                "-" if ratio is None else f"{ratio:.2f} x",
            )
        )
    header = (
        "experiment",
        "independent count by",
        "unattributed",
        "its peak MiB",
        "tracker against it",
        "most reserved MiB",
        "step while profiled",
    )
    return Table("How far to trust it", header, tuple(rows), left=2)


def where_table(results: Results) -> Table | None:
    """The phase and module in which each peak happened."""
    rows = []
    for result in results:
        phase = peak_phase(result)
        if phase is not None:
            rows.append((result["experiment"], phase["name"], place(phase), _mb(phase["peak_mb"])))
    header = ("experiment", "phase", "module (operator)", "MiB")
    return Table("Where the peak is", header, tuple(rows), left=3) if rows else None


def highest_table(results: Results) -> Table | None:
    """The most MiB of each component at any instant of the measured steps, a column for each experiment."""
    known = [r for r in results if r.get("highest")]
    rows = [(words, *(_mb(r["highest"].get(f"{key}_mb")) for r in known)) for key, words in TITLES.items()]
    title = "Most of each at any instant of the measured steps, MiB (not the same instant: no sums)"
    return Table(title, ("", *(r["experiment"] for r in known)), tuple(rows[:-1])) if known else None


def host_table(results: Results) -> Table | None:
    """The most MiB of host memory that an experiment's offloaded tensors took; None where none has any."""
    rows = [(r["experiment"], _mb(r["host"]["peak_mb"])) for r in results if r.get("host")]
    title = "Checkpoint inputs in host memory, MiB (in no other figure)"
    return Table(title, ("experiment", "most"), tuple(rows)) if rows else None


def largest_table(results: Results, most: int = LARGEST) -> Table | None:
    """The largest storages at the peak, some of each experiment."""
    rows = []
    for result in results:
        for storage in result["largest"][:most]:
            shape = " x ".join(map(str, storage["shape"] or ())) or "-"
            made = (str(storage.get("count", 1)), shape, str(storage.get("dtype") or "-"), place(storage))
            rows.append((result["experiment"], TITLES[storage["component"]], *made, _mb(storage["mb"])))
    header = ("experiment", "component", "count", "shape", "dtype", "made in", "MiB together")
    return Table("Largest storages at the peak", header, tuple(rows), left=6) if rows else None


def instants_table(result: dict[str, Any], kind: str) -> Table | None:
    """MiB by component at each of a result's ``snapshots``, or at the peak of each of its ``phases``."""
    entries, total = result[kind], {"snapshots": "allocated_mb", "phases": "peak_mb"}[kind]
    shown = [key for key in TITLES if any(abs(entry["components"][f"{key}_mb"]) >= 0.005 for entry in entries)]
    more = [key for key in ("reserved_mb", "resident_mb") if any(entry.get(key) is not None for entry in entries)]
    columns = [[_mb(entry[key]) for entry in entries] for key in (total, *more)]
    columns += [[_mb(entry["components"][f"{key}_mb"]) for entry in entries] for key in shown]
    rows = list(zip([entry["name"] for entry in entries], *columns, strict=True))
    header = (kind.removesuffix("s"), "total", *(key.removesuffix("_mb") for key in more), *(TITLES[k] for k in shown))
    title = {"snapshots": "Snapshots, MiB", "phases": "Highest instant of each phase, MiB"}[kind]
    return Table(title, header, tuple(rows)) if rows else None


def unit_sentence(results: Results) -> str:
    """The highest peak in the unit that reads best."""
    measured = [r for r in results if r["status"] == "ok" and r["peak_memory_mb"] is not None]
    if not measured:
        return "No experiment was measured."
    most = max(measured, key=lambda result: result["peak_memory_mb"])
    unit = unit_for([most["peak_memory_mb"]])
    return f"The highest peak is {unit.text(most['peak_memory_mb'])} {unit.name}, of {most['experiment']}."


def remarks(results: Results) -> list[str]:
    """What each experiment is, and what a reader must know of its measurement, as far as the result says so."""
    lines = [f"{result['experiment']}: {result['words']}" for result in results if result.get("words")]
    lines += [f"{result['experiment']}: {note}" for result in results for note in result.get("notes", [])]
    alone = {result["experiment"]: why for result in results if (why := timed_alone(result))}
    return [*lines, f"timed alone, with no ratio to vanilla's time: {grouped(alone)}"] if alone else lines


def tables_of(results: Results) -> tuple[list[Table], list[Table]]:
    """Every table that there is something in: what was measured, and what explains it."""
    first = (
        peak_table(results),
        component_table(results),
        added_table(results),
        lost_table(results),
        host_table(results),
    )
    second = (highest_table(results), where_table(results), largest_table(results), quality_table(results))
    return [table for table in first if table], [table for table in second if table]
