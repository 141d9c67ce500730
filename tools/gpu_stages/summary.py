"""One table of all results in a folder, as Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tools.gpu_stages.stages import STAGES

MIB = 2**20


def summary(folder: Path) -> str:
    """What every stage found."""
    conditions = json.loads((folder / "conditions.json").read_text())
    device = conditions.get("gpu") or f"{conditions['cpu']} (no GPU)"
    versions = ", ".join(f"{name} {version}" for name, version in conditions["versions"].items() if version)
    lines = [f"# {'Rehearsal' if conditions['rehearsal'] else 'Measured'} on {device}", ""]
    lines += [f"{versions}, Python {conditions['python']}, commit {str(conditions['commit'])[:8]}.", ""]
    lines += ["| stage | status | seconds | rows | |", "|---|---|---|---|---|"]
    details: list[str] = []
    for stage in STAGES:
        path = folder / f"{stage.name}.json"
        if not path.exists():
            continue
        found = json.loads(path.read_text())
        cells = [stage.name, found["status"], f"{found.get('seconds', 0.0):.0f}", str(len(found["rows"]))]
        lines.append(f"| {' | '.join(cells)} | {found.get('reason', stage.what)} |")
        if text := steps_table(found["rows"]):
            details += ["", f"## {stage.name}: {stage.what}", "", *text]
    return "\n".join([*lines, *details]) + "\n"


def steps_table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of a table of steps; none where the rows are of something else."""
    steps = [row for row in rows if "shape" in row and "method" in row]
    if not steps:
        return []
    lines = ["| shape | method | seconds | x plain | peak MiB | x plain |", "|---|---|---|---|---|---|"]
    for row in steps:
        if "seconds" not in row:
            first = f"not timed (first step {row['first_seconds']:.3g} s)" if "first_seconds" in row else "not timed"
            peak = f"{row['peak_bytes'] / MIB:,.0f}" if "peak_bytes" in row else ""
            lines.append(f"| {row['shape']} | {row['method']} | {row.get('reason', first)} | | {peak} | |")
            continue
        ratio = row.get("time_ratio")
        times = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})" if ratio else "-"
        memory = f"{row['memory_ratio']:.2f}" if "memory_ratio" in row else "-"
        seconds, peak = f"{row['seconds']['median']:.3g}", f"{row['peak_bytes'] / MIB:,.0f}"
        lines.append(f"| {row['shape']} | {row['method']} | {seconds} | {times} | {peak} | {memory} |")
    return lines
