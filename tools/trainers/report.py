"""What profile_trainers.py prints: tables of time, memory, operators and bytes, and in words where the time goes."""

from __future__ import annotations

from typing import Any

from tools.common.meter import MIB
from tools.trainers.operators import CLASSES, Count, total

BASELINE = "StandardTrainer"
TOP = 10
# The classes in the words of a sentence.
WORDS = {
    "norm": "norms",
    "clip": "clipping",
    "einsum": "matrix products of the private step",
    "private other": "other private work",
    "model products": "matrix products of the model",
    "model other": "other operators of the model",
    "noise": "noise",
    "optimiser": "the optimiser",
}
PHASE_WORDS = {"forward": "the forward", "backward": "the backward", "step": "step()", "zero_grad": "zero_grad()"}


def total_of(row: dict[str, Any]) -> Count:
    """The sum of a row's classes."""
    return total(Count(**count) for count in row["classes"].values())


def baseline_of(result: dict[str, Any]) -> dict[str, Any] | None:
    """The row of plain training, where it succeeded and has been timed."""
    timed = (row for row in result["rows"] if row["status"] == "ok" and "seconds" in row)
    return next((row for row in timed if row["trainer"] == BASELINE), None)


def complete(result: dict[str, Any]) -> dict[str, Any]:
    """The result with, in each row that succeeded, ratios to plain training (None where it failed) and ``answer``."""
    plain = baseline_of(result)
    rows = []
    for row in result["rows"]:
        row = dict(row)
        if row["status"] == "ok" and "seconds" in row:
            whole = total_of(row)
            row["bytes_moved"], row["flops"] = whole.bytes, whole.flops
            row["time_ratio"] = row["peak_ratio"] = row["bytes_ratio"] = row["flops_ratio"] = None
            if plain is not None:
                reference = total_of(plain)
                shared = row.get("time_over_plain")  # of the same rounds
                apart = row["seconds"]["median"] / plain["seconds"]["median"]
                row["time_ratio"] = shared["median"] if shared else apart
                row["peak_ratio"] = row["peak_bytes"] / plain["peak_bytes"]
                row["bytes_ratio"] = whole.bytes / reference.bytes
                row["flops_ratio"] = whole.flops / reference.flops
            row["answer"] = explain(row, plain)
        rows.append(row)
    return {**result, "rows": rows}


def explain(row: dict[str, Any], plain: dict[str, Any] | None) -> str:
    """A paragraph: where the time of a trainer goes, compared with plain training; every number is a measured one."""
    name, seconds = row["trainer"], row["seconds"]["median"]
    memory = f"{_mib(row['retained_bytes'])} MiB stay after a step"
    if row["retained_gradient_bytes"]:
        memory += f" ({_mib(row['retained_gradient_bytes'])} of them in .grad)"
    if plain is None or name == BASELINE:
        missing = "" if name == BASELINE else f" There is nothing to compare with: {BASELINE} failed."
        phases = [f"{_ms(row['phases'][p]['median'])} in {words}" for p, words in PHASE_WORDS.items()]
        largest = sorted(CLASSES, key=lambda c: -row["classes"][c]["seconds"])[:3]
        shares = [f"{100 * row['classes'][c]['seconds'] / total_of(row).seconds:.0f} % in {WORDS[c]}" for c in largest]
        return (
            f"{name} takes {_ms(seconds)} ms a step: {_listed(phases)}. Operators spend their time {_listed(shares)}. "
            f"Peak memory is {_mib(row['peak_bytes'])} MiB; {memory}.{missing}"
        )
    before = plain["seconds"]["median"]
    phase = {p: row["phases"][p]["median"] - plain["phases"][p]["median"] for p in PHASE_WORDS}
    classes = {c: row["classes"][c]["seconds"] - plain["classes"][c]["seconds"] for c in CLASSES}
    known = {o["name"]: o["seconds"] for o in plain["operators"]}
    grown = {o["name"]: o["seconds"] - known.get(o["name"], 0.0) for o in row["operators"]}
    private = [f"{_mib(row['classes'][c]['bytes'])} MiB in {WORDS[c]}" for c in ("norm", "clip", "einsum")]
    return (
        f"{name} takes {row['time_ratio']:.2f} x the time of {BASELINE}: {_ms(seconds)} against {_ms(before)} ms a "
        f"step, a difference of {_signed(seconds - before)} ms, of which {_changes(phase, PHASE_WORDS)}. In a "
        f"step in which each operator is timed by itself, {_ms(total_of(row).seconds)} against "
        f"{_ms(total_of(plain).seconds)} ms in all: {_changes(classes, WORDS)}. The profiler's largest "
        f"changes: {_changes(grown, {})}. It moves "
        f"{total_of(row).bytes / total_of(plain).bytes:.2f} x the bytes, of them {_listed(private)}. Peak memory is "
        f"{row['peak_bytes'] / plain['peak_bytes']:.2f} x ({_mib(row['peak_bytes'])} against "
        f"{_mib(plain['peak_bytes'])} MiB); {memory}."
    )


def _changes(values: dict[str, float], words: dict[str, str]) -> str:
    """The three largest changes in seconds, whichever way, in ms: "+12.0 ms in norms, ..."."""
    largest = sorted(values, key=lambda key: -abs(values[key]))[:3]
    return _listed([f"{_signed(values[key])} ms in {words.get(key, key)}" for key in largest])


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _signed(seconds: float) -> str:
    return f"{1000 * seconds:+.1f}"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f}"


def _mib(count: int) -> str:
    return f"{count / MIB:.1f}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _grid(rows: list[list[str]]) -> list[str]:
    """Lines of aligned cells, the first column to the left."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])] + [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return lines


def tables(result: dict[str, Any]) -> str:
    """All that is printed of a shape, from what :func:`complete` made."""
    good = [row for row in result["rows"] if row["status"] == "ok"]
    lines = ["", result["title"]]
    if good:
        lines[-1] += f": {good[0]['parameters']:,} parameters of {_mib(good[0]['parameter_bytes'])} MiB, on the "
        lines[-1] += result["device"]
        lines += [*_measured(good), *_moved(good), *_timed(good)]
        if result["device"] == "cpu":
            lines.append("  dpft's noise is drawn by numpy on a CPU, which is no operator: its time is that of step()")
    for row in good:
        lines += ["", f"  {row['trainer']}: operators by self time, a step of those under the profiler"]
        header = ["operator", "calls", "ms", "%"]
        body = [
            [o["name"], f"{o['calls']:g}", _ms(o["seconds"]), f"{100 * o['share']:.1f}"]
            for o in row["operators"][:TOP]
        ]
        lines += _grid([header, *body])
    if good:
        lines += ["", "  Where does the time go?"]
    lines += [f"  {row['answer']}" for row in good]
    lines += [f"  {row['trainer']}: {row['reason']}" for row in result["rows"] if row["status"] != "ok"]
    return "\n".join(lines)


def _measured(rows: list[dict[str, Any]]) -> list[str]:
    header = ["trainer", "ms a step", "least", "most", "x plain", "forward", "backward", "step", "peak MiB", "x plain"]
    header += ["retained MiB", "of it .grad"]
    body = []
    for row in rows:
        seconds = row["seconds"]
        body.append([row["trainer"], *(_ms(seconds[k]) for k in ("median", "min", "max")), _ratio(row["time_ratio"])])
        body[-1] += [_ms(row["phases"][phase]["median"]) for phase in ("forward", "backward", "step")]
        body[-1] += [_mib(row["peak_bytes"]), _ratio(row["peak_ratio"])]
        body[-1] += [_mib(row["retained_bytes"]), _mib(row["retained_gradient_bytes"])]
    return _grid([header, *body])


def _moved(rows: list[dict[str, Any]]) -> list[str]:
    header = ["MiB moved by operators", *CLASSES, "all", "x plain", "FLOPs x plain"]
    body = [
        [row["trainer"], *(_mib(row["classes"][c]["bytes"]) for c in CLASSES), _mib(row["bytes_moved"])]
        for row in rows
    ]
    for cells, row in zip(body, rows, strict=True):
        cells += [_ratio(row["bytes_ratio"]), _ratio(row["flops_ratio"])]
    return ["", *_grid([header, *body])]


def _timed(rows: list[dict[str, Any]]) -> list[str]:
    header = ["ms in operators", *CLASSES, "all"]
    body = [
        [row["trainer"], *(_ms(row["classes"][c]["seconds"]) for c in CLASSES), _ms(total_of(row).seconds)]
        for row in rows
    ]
    return ["", *_grid([header, *body])]
