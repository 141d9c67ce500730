"""Make docs/benchmarks.md of the JSON files that are kept in docs/benchmarks: no number on that page is typed.

    python tools/benchmark_pages.py            # writes docs/benchmarks.md
    python tools/benchmark_pages.py --check    # status 1 if the page is not what the files give

Also a hook of mkdocs, which writes the page before a build. Needs the standard library alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

DOCS = Path(__file__).resolve().parents[1] / "docs"
Rows = list[list[str]]
METHODS = {
    "plain": "plain training",
    "one_pass": "dpft, one-pass",
    "two_pass": "dpft, two-pass",
    "per_example": "dpft, per-example",
    "opacus_hooks": "Opacus, per-sample gradients",
    "opacus_ghost": "Opacus, ghost clipping",
    "opacus_fast": "Opacus, fast gradient clipping",
    "fastdp": "fastDP",
}
ENGINES = {"ddp": "DDP", "fsdp2": "FSDP2", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3"} | {
    "zero2_offload": "ZeRO-2, optimiser on the CPU"
}
CASES = {
    "plain": "plain, Hugging Face's step",
    "plain_long": "plain, `dpft.long_context` and a chunked head",
    "one_pass": "private, one-pass",
    "one_pass_long": "private, one-pass, `dpft.long_context`",
    "two_pass_long": "private, two-pass, `dpft.long_context`",
}


class Section(NamedTuple):
    """How files whose name has a pattern are shown."""

    pattern: str
    title: str
    text: str
    tables: Callable[[dict[str, Any]], Iterator[str]]


def table(head: Sequence[str], rows: Rows) -> str:
    """A table in Markdown."""
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in [list(head), *rows]]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def times(value: float | None, digits: int = 2) -> str:
    """A ratio to plain training."""
    return "" if value is None else f"{value:.{digits}f} x"


def spread(found: dict[str, float] | None) -> str:
    """A median with its range."""
    return f"{found['median']:.2f} x ({found['min']:.2f} to {found['max']:.2f})" if found else ""


def gib(value: float | None) -> str:
    """Bytes, in GiB."""
    return "" if value is None else f"{value / 2**30:.1f}"


def conditions(found: dict[str, Any]) -> str:
    """Machine, versions and commit in one paragraph."""
    place = found.get("gpu") or found.get("cpu") or found.get("machine", "unknown machine")
    parts = [place, f"{found['cores']} cores", f"{found['memory_gib']:g} GiB"]
    parts += [f"{found['threads']} thread" + "s" * (found["threads"] > 1)] if "threads" in found else []
    parts += [found["backend"]] if "backend" in found else []
    versions = [f"{name} {version}" for name, version in found["versions"].items() if version]
    commit = f"commit {(found['commit'] or 'unknown')[:8]}" + " with uncommitted changes" * found.get("dirty", False)
    load = [f"load before {found['load_before']:g}"] if "load_before" in found else []
    python = f"Python {found['python']}"
    return f"*{', '.join([*parts, python, *versions, commit, *load])}.*"


def steps(report: dict[str, Any]) -> Iterator[str]:
    """Of benchmark_steps.py: a table for each shape that was run."""
    left_out: list[str] = []
    for result in report["results"]:
        rows = []
        for row in result["rows"]:
            if "flops_ratio" not in row:
                reason = row["reason"].rstrip(".")
                left_out.append(reason if reason.startswith("not run") else f"{METHODS[row['method']]}: {reason}")
                continue
            rows.append(
                [
                    METHODS[row["method"]],
                    spread(row.get("time_ratio")) or "not timed",
                    f"{row['seconds']['median']:.2f}" if "seconds" in row else "",
                    times(row["memory_ratio"]),
                    f"{row['peak_bytes'] / 2**20:,.0f}",
                    times(row["flops_ratio"]),
                    f"{row['error']:.0e}" if "error" in row else "",
                ]
            )
        if rows:
            head = ("", "time", "seconds", "memory", "MiB", "FLOPs", "error of the clipped sum")
            yield f"**{result['title']}**\n\n{table(head, rows)}"
            if first := result.get("first_steps"):
                yield (
                    f"One-pass's first step: {times(first['first'])} plain; the first {first['count']} together: "
                    f"{times(first['all'])}."
                )
    if left_out:
        counts = Counter(left_out).items()
        yield "Without a result: " + "; ".join(f"{reason} ({count} x)" for reason, count in counts) + "."


def norms(report: dict[str, Any]) -> Iterator[str]:
    """Of benchmark_norms.py: one row for each layer and length."""
    methods = list(dict.fromkeys(row["method"] for result in report["results"] for row in result["rows"]))
    rows = []
    for result in report["results"]:
        layer, found = result["layer"], {row["method"]: row for row in result["rows"]}
        shape = f"{layer['p']:,} x {layer['d']:,}, {layer['dtype']}"
        ratios = [found[m].get("times_opacus", {}).get("median") if m in found else None for m in methods]
        rows.append([shape, str(layer["rows"]), f"{result['tokens']:,}", *(times(ratio) for ratio in ratios)])
    yield table(("layer", "B", "T", *methods), rows)


def engines(report: dict[str, Any]) -> Iterator[str]:
    """Of measure_engines.py: one row for each engine and strategy."""
    shapes = report["shapes"]
    yield (
        f"Llama, {shapes['width']} wide, {shapes['layers']} layers, T = {shapes['tokens']}, V = {shapes['vocab']:,}, "
        f"{shapes['parameters']:,} parameters, physical batches of {shapes['rows']}"
        + (f", {shapes['ranks']} ranks, {shapes['sequence']} of one sequence." if "sequence" in shapes else ".")
    )
    rows = []
    for engine, found in report["results"].items():
        for row in found:
            physical = f"{row['physical']} physical" + ", checkpointed" * row["checkpointing"]
            rows.append(
                [
                    ENGINES[engine],
                    METHODS[row["strategy"]],
                    physical,
                    f"{row['wire']:.2f}",
                    times(row["wire_ratio"]),
                    f"{row['peak']:.2f}",
                    times(row["peak_ratio"]),
                    times(row["flops_ratio"]),
                ]
            )
    head = ("engine", "", "batches of a step", "sent", "of plain", "peak", "of plain", "FLOPs of plain")
    yield table(head, rows)


def long_context(report: dict[str, Any]) -> Iterator[str]:
    """Of measure_long_context.py."""
    shapes = report["shapes"]
    size = f"Llama, {shapes['width']} wide, {shapes['layers']} layers"
    yield f"{size}, V = {shapes['vocab']:,}, T = {shapes['tokens']:,}."
    rows = [
        [
            CASES[row["case"]],
            f"{row['peak'] / 2**20:,.0f}",
            times(row["peak_of_plain"], 3),
            f"{row['host'] / 2**20:,.0f}",
            f"{row['flops'] / 1e12:.2f} T",
            times(row["flops_of_plain"], 3),
        ]
        for row in report["results"]
    ]
    yield table(("", "peak, MiB", "of plain", "host, MiB", "FLOPs", "of plain"), rows)


def planned(report: dict[str, Any]) -> Iterator[str]:
    """Of plan_long_context.py."""
    rows = [
        [
            f"{row['model']}, {row['training']}",
            str(row["cards"]),
            f"{row.get('longest', row.get('tokens')):,}" + " (longest)" * ("longest" in row),
            gib(row["device_bytes"]),
            gib(row["host_bytes"]),
            times(row["peak_of_plain"]),
            f"{row['seconds']:,.0f}",
        ]
        for row in report["rows"]
    ]
    yield f"Cards of {report['memory'] / 2**30:.1f} GiB."
    yield table(("model", "cards", "tokens", "device, GiB", "host, GiB", "peak of plain", "seconds"), rows)


def audit(report: dict[str, Any]) -> Iterator[str]:
    """Of audit.py: one row for dpft as it is, and for each defect that was planted."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for found in report["audits"]:
        groups.setdefault(found["what"], []).append(found)
    rows = []
    for what, runs in groups.items():
        bounds = [run["epsilon_lower"] for run in runs]
        failed = dict.fromkeys(name for run in runs for name in run["failed"])
        rows.append(
            [
                what,
                str(len(runs)),
                str(sum(run["violated"] for run in runs)),
                f"{median(bounds):.2f} ({min(bounds):.2f} to {max(bounds):.2f})",
                f"{runs[0]['claimed']['epsilon']:.2f}",
                ", ".join(failed) or "none",
            ]
        )
    yield table(("", "runs", "refuted", "epsilon proven", "claimed", "tests that failed"), rows)


def flat(report: dict[str, Any]) -> Iterator[str]:
    """Any list of results, a column for each of their fields; a pair of numbers is from the first to the last step."""
    found = next((report[key] for key in ("results", "rows") if isinstance(report.get(key), list)), None)
    if not found:
        raise ValueError("no list of results or rows: write a table for this file in tools/benchmark_pages.py")
    if "shapes" in report:
        yield "; ".join(f"{name.replace('_', ' ')}: {value}" for name, value in report["shapes"].items()) + "."
    if "note" in report:
        yield f"{report['note']}.".replace("..", ".")
    names = list(dict.fromkeys(name for row in found for name in row))
    yield table(
        [name.replace("_", " ") for name in names], [[_cell(row.get(name)) for name in names] for row in found]
    )


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(map(_cell, value))
    if isinstance(value, dict):
        raise ValueError(f"a field is {value}: write a table for this file in tools/benchmark_pages.py")
    return "" if value is None else f"{value:,g}" if isinstance(value, float) else str(value)


_STEPS = (
    "Forward and backward of one physical batch to the clipped sum, beside plain training; noise and optimiser are "
    "left out. Time: median of interleaved rounds with its range. Memory: bytes of live tensors above parameters and "
    "batch. Error: relative, of the whole clipped sum; the larger of that against float64 at a small size and that "
    "against one example at a time at this size. A method whose sum is wrong gets no time. "
    "`python tools/benchmark_steps.py`"
)
_ENGINES = (
    "One step beside plain training under the same engine, counted and not timed. *Sent* and *peak* are of one rank, "
    "in units of the parameters' float32 bytes. `python tools/measure_engines.py`, explained in "
)
SECTIONS = (
    Section("steps_short_*.json", "Steps: short texts", _STEPS, steps),
    Section("steps_2048_*.json", "Steps: 2,048 tokens", _STEPS, steps),
    Section("steps_*.json", "Steps: all methods", _STEPS, steps),
    Section(
        "norms_*.json",
        "Norms of one linear layer",
        "Opacus's time divided by the method's, of the same round, for the squared gradient norms of a layer p x d: "
        "above 1 is faster than Opacus. `python tools/benchmark_norms.py`",
        norms,
    ),
    Section("engines_*.json", "Engines", f"{_ENGINES}[engines.md](engines.md).", engines),
    Section("sequence_*.json", "Sequence parallelism", f"{_ENGINES}[long_context.md](long_context.md).", engines),
    Section(
        "long_context_planned.json",
        "Long context, planned",
        "Planned by `dpft.plan` and not run: seconds are a roofline on the data sheet's rates. "
        "`python tools/plan_long_context.py`, explained in [long_context.md](long_context.md).",
        planned,
    ),
    Section(
        "noise_planned.json",
        "Noise, planned",
        "What `dpft.plan(privacy=...)` counts of the noise of one logical batch, and did not run: earlier noise that "
        "is kept, and bytes moved over an H100's bandwidth. `python tools/plan_noise.py`, explained in "
        "[howto/correlated_noise.md](howto/correlated_noise.md#what-it-takes).",
        flat,
    ),
    Section(
        "long_context_*.json",
        "Long context, counted",
        "One checkpointed step on one long text. Peaks are the allocator's, above the parameters; copies that stand "
        "for the offload count as host. `python tools/measure_long_context.py`",
        long_context,
    ),
    Section(
        "advice_*.json",
        "Choosing batch, steps, learning rate and clip norm",
        "Private trainings on a grid of settings. `python tools/measure_advice.py`, discussed in "
        "[choosing.md](choosing.md).",
        flat,
    ),
    Section(
        "loss_over_epsilon_*.json",
        "Loss over epsilon",
        "Private trainings of one setting. `python tools/measure_advice.py --curve`",
        flat,
    ),
    Section(
        "clip_norms_*.json",
        "Clip norms",
        "Private trainings that differ in the clip norm alone. `python tools/measure_clip_norms.py`, discussed in "
        "[howto/batch.md](howto/batch.md).",
        flat,
    ),
    Section(
        "audit/*.json",
        "Audit",
        "Attacks on dpft as it is, and with a defect planted in it. A bound above the claim, or a test that fails, "
        "refutes the claim. `python tools/audit.py`, explained in [audit.md](audit.md).",
        audit,
    ),
    Section("*.json", "", "", flat),
)


def section(path: Path, report: dict[str, Any], folder: Path) -> list[str]:
    """What is said of a file."""
    name = path.relative_to(folder).as_posix()
    of = next(s for s in SECTIONS if fnmatch(name, s.pattern))
    title = of.title or path.stem.removesuffix("_cpu").replace("_", " ").capitalize()
    where = "GPU" if report["conditions"].get("gpu") else "CPU"
    texts = [of.text] if of.text else []
    body = [*texts, *of.tables(report), conditions(report["conditions"])]
    return [f"## {title} ({where}, {path.stem})", *body, f"[benchmarks/{name}](benchmarks/{name})"]


def page(docs: Path = DOCS) -> str:
    """The whole page.

    Args:
        docs: folder with ``benchmarks/``.

    Raises:
        ValueError: a file of which no table can be made.
    """
    folder = docs / "benchmarks"
    files = [*folder.glob("*.json"), *folder.glob("audit/*.json")]
    order = {
        path: next(n for n, s in enumerate(SECTIONS) if fnmatch(_name(path, folder), s.pattern)) for path in files
    }
    summaries = sorted(folder.glob("gpu/*/summary.md"))
    gpu = ", ".join(f"[{path.parent.name}]({path.relative_to(docs).as_posix()})" for path in summaries)
    parts = [
        "# Benchmarks",
        "Generated by `python tools/benchmark_pages.py` from the JSON files of "
        "`docs/benchmarks`; do not edit. Every table has the conditions under which its numbers were measured. Ratios "
        "are to plain training in the same round, unless a table says otherwise.",
        f"Measured on GPUs: {gpu}."
        if gpu
        else "Nothing was measured on a GPU yet: `make gpu` does it in one command.",
        "Which models are exact under which strategy: [models.md](models.md).",
    ]
    for path in sorted(files, key=lambda path: (order[path], _name(path, folder))):
        try:
            parts += section(path, json.loads(path.read_text(encoding="utf-8")), folder)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{_name(path, folder)}: {error!r}") from error
    return "\n\n".join(parts) + "\n"


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def write(docs: Path = DOCS) -> None:
    """Write the page if it differs: a server that watches the folder would build for ever."""
    target, text = docs / "benchmarks.md", page(docs)
    if not target.exists() or target.read_text(encoding="utf-8") != text:
        target.write_text(text, encoding="utf-8")


def on_pre_build(config: Any) -> None:
    """The hook of mkdocs."""
    write(Path(config["docs_dir"]))


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and do what it says; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(arguments)
    if not args.check:
        write()
        return 0
    target = DOCS / "benchmarks.md"
    same = target.exists() and target.read_text(encoding="utf-8") == page()
    print("docs/benchmarks.md is " + ("what the files give" if same else "old: run python tools/benchmark_pages.py"))
    return int(not same)


if __name__ == "__main__":
    sys.exit(main())
