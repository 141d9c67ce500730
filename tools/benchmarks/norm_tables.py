"""What benchmark_norms.py prints and draws."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.benchmarks.plots import save_plot
from tools.common.meter import MIB

# What is claimed of the fork's tiled kernel: milliseconds of Opacus' function and of the fork's, their ratio as given
# there, MB of intermediates of each. Source: memory_test/README.md of github.com/JackyXiao98/opacus at 1ceb441. It
# does not state the layer's shape or the machine; by the sizes of the Gram matrices its batch is not always the same.
SEEDS = {
    512: (2.2, 1.4, 1.57, 4.0, 2.0),
    1024: (9.3, 2.6, 3.53, 16.0, 2.0),
    2048: (20.6, 5.1, 4.06, 32.0, 1.0),
    4096: (97.3, 17.5, 5.55, 128.0, 1.0),
}


@dataclass(frozen=True)
class Layer:
    """x [rows, T, p], g [rows, T, d]."""

    p: int
    d: int
    rows: int = 1
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.p} x {self.d}, B={self.rows}, {self.dtype}"


def table(result: dict[str, Any]) -> str:
    """What is printed of one layer at one length."""
    if "reason" in result:
        return f"\n{Layer(**result['layer'])}, T={result['tokens']}: {result['reason']}"
    lines = [
        f"\n{Layer(**result['layer'])}, T={result['tokens']}",
        f"  {'':19} {'ms':>10}  {'Opacus / it':24} {'MiB':>9}  error",
    ]
    for row in result["rows"]:
        if "seconds" not in row:
            lines.append(f"  {row['method']:19} {row.get('reason', 'not timed')}")
            continue
        ratio = row.get("times_opacus")
        ratio_text = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})" if ratio else "-"
        lines.append(
            f"  {row['method']:19} {1e3 * row['seconds']['median']:10.2f}  {ratio_text:24} "
            f"{row['peak_bytes'] / MIB:9.2f}  {row['error']:.0e}" + "  timed once" * row.get("once", False)
        )
    return "\n".join(lines)


def seeds_table(results: list[dict[str, Any]]) -> str:
    """The fork's own figures beside ours, of the first layer that was run."""
    mine: dict[int, dict[str, Any]] = {}
    for result in results:
        if result["layer"] == results[0]["layer"]:
            mine[result["tokens"]] = {row["method"]: row for row in result["rows"]}
    title = Layer(**results[0]["layer"]) if results else "nothing"
    lines = [
        f"\nThe fork's table (its README; layer and machine not stated) | here, {title}, method auto",
        f"  {'T':>6} {'Opacus ms':>10} {'fork ms':>8} {'x':>6} {'MB':>7} {'fork MB':>8} | "
        f"{'Opacus ms':>10} {'ours ms':>9} {'x':>7}",
    ]
    for tokens, (theirs, fork, times, mb, fork_mb) in SEEDS.items():
        rows = mine.get(tokens, {})
        cells = [_milliseconds(rows.get("opacus")), _milliseconds(rows.get("torch:auto"))]
        known = rows.get("torch:auto", {}).get("times_opacus")
        ratio = f"{known['median']:.2f}" if known else "-"
        lines.append(
            f"  {tokens:6} {theirs:10.1f} {fork:8.1f} {times:6.2f} {mb:7.1f} {fork_mb:8.1f} | {cells[0]:>10} "
            f"{cells[1]:>9} {ratio:>7}"
        )
    return "\n".join(lines)


def _milliseconds(row: dict[str, Any] | None) -> str:
    return f"{1e3 * row['seconds']['median']:.2f}" if row and "seconds" in row else "-"


def plot_norms(path: Path, report: dict[str, Any]) -> None:
    """Milliseconds and MiB over T, a row of axes a layer."""
    import matplotlib.pyplot as plt

    layers: dict[Layer, list[dict[str, Any]]] = {}
    for result in sorted(report["results"], key=lambda result: int(result["tokens"])):
        if any("seconds" in row for row in result["rows"]):
            layers.setdefault(Layer(**result["layer"]), []).append(result)
    if not layers:
        return
    figure, axes = plt.subplots(len(layers), 2, figsize=(11, 3.2 * len(layers) + 0.6), squeeze=False)
    for row, (layer, results) in zip(axes, layers.items(), strict=True):
        methods = list(dict.fromkeys(r["method"] for result in results for r in result["rows"]))
        for axis, unit in zip(row, ("ms", "MiB"), strict=True):
            for method in methods:
                points = [
                    (result["tokens"], 1e3 * r["seconds"]["median"] if unit == "ms" else r["peak_bytes"] / MIB)
                    for result in results
                    for r in result["rows"]
                    if r["method"] == method and "seconds" in r
                ]
                if points:
                    axis.plot(*zip(*points, strict=True), "o-", label=method, markersize=4)
            axis.set(title=f"{layer}: {unit}", xlabel="T", xscale="log", yscale="log")
    save_plot(path, figure, axes, report["conditions"])
