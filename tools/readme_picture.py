"""Draw the README's picture, docs/images/overview.png, from the results that are kept in docs/benchmarks.

    python tools/readme_picture.py            # draws it
    python tools/readme_picture.py --check    # status 1 if the picture was drawn from other results

Time and memory of a step beside plain training: steps_short_cpu.json and steps_2048_cpu.json, the first shape of each.
Loss over epsilon: loss_over_epsilon_cpu.json (python tools/measure_advice.py --curve), or else advice_cpu.json. Of
several settings it shows the one that was trained at most values of epsilon, of these the one with the lowest loss.
Without either file this panel is left out, and a line says so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

DOCS = Path(__file__).resolve().parents[1] / "docs"
PICTURE = "images/overview.png"
STEPS = ("steps_short_cpu.json", "steps_2048_cpu.json")
LOSSES = ("loss_over_epsilon_cpu.json", "advice_cpu.json")
SETTING = ("batch", "steps", "learning_rate", "clip_norm", "lora_r")
METHODS = {
    "one_pass": ("dpft, one-pass", "#0969da"),
    "opacus_ghost": ("Opacus, ghost clipping", "#bf8700"),
    "opacus_fast": ("Opacus, fast gradient clipping", "#cf6a2b"),
    "opacus_hooks": ("Opacus, per-sample gradients", "#a40e26"),
}
# The same on a light and on a dark page: a plate of its own, and dark text on it.
PLATE, INK, FAINT = "#f6f8fa", "#1f2328", "#8c959f"
_BEHIND = {"facecolor": PLATE, "edgecolor": "none", "pad": 1}  # so that no line crosses a text


class Bar(NamedTuple):
    """A method's step, relative to plain training."""

    shape: str
    method: str
    time: float
    least: float
    most: float
    memory: float


class Losses(NamedTuple):
    """Validation losses of one setting."""

    setting: dict[str, float]
    before: float
    by_epsilon: dict[float, float]


def bars(docs: Path = DOCS) -> list[Bar]:
    """What the two panels of ratios show."""
    found = []
    for name in STEPS:
        result = _read(docs, name)["results"][0]
        rows, tokens = result["shape"]["rows"], result["shape"]["tokens"]
        shape = f"{rows} text{'s' * (rows > 1)} of {tokens:,} tokens"
        by_method = {row["method"]: row for row in result["rows"] if "time_ratio" in row}
        for method in METHODS.keys() & by_method.keys():
            row, time = by_method[method], by_method[method]["time_ratio"]
            found.append(Bar(shape, method, time["median"], time["min"], time["max"], row["memory_ratio"]))
    return sorted(found, key=lambda bar: (bar.shape, list(METHODS).index(bar.method)))


def about(docs: Path = DOCS) -> str:
    """Model and machine of the ratios, in a line."""
    reports = [_read(docs, name) for name in STEPS]
    lines = []
    for report in reports:
        shape, found = report["results"][0]["shape"], report["conditions"]
        model = f"{shape['architecture'].capitalize()} {shape['width']} x {shape['layers']}, {shape['dtype']}"
        place = found.get("gpu") or f"{found['threads']} CPU threads"
        lines.append(f"{model}, {place}, torch {found['versions']['torch']}, Opacus {found['versions']['opacus']}")
    return "; ".join(dict.fromkeys(lines))


def losses(docs: Path = DOCS) -> Losses | None:
    """What the panel of losses shows: the mean of equal trainings; None if no setting has two values of epsilon."""
    name = next((name for name in LOSSES if (docs / "benchmarks" / name).exists()), None)
    if name is None:
        return None
    settings: dict[tuple[float, ...], dict[float, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in _read(docs, name)["results"]:
        settings[tuple(row[field] for field in SETTING)][float(row["epsilon"])].append(row)
    means = {
        setting: {epsilon: mean(row["loss_after"] for row in rows) for epsilon, rows in sorted(found.items())}
        for setting, found in settings.items()
    }
    best = max(means, key=lambda setting: (len(means[setting]), -min(means[setting].values())))
    if len(means[best]) < 2:
        return None
    before = mean(row["loss_before"] for rows in settings[best].values() for row in rows)
    return Losses(dict(zip(SETTING, best, strict=True)), before, means[best])


def mark(docs: Path = DOCS) -> str:
    """A digest of what the picture shows, which is kept in it."""
    return hashlib.sha256(repr((bars(docs), about(docs), losses(docs))).encode()).hexdigest()


def draw(docs: Path = DOCS) -> bool:
    """Write the picture; whether it has the panel of losses."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown, curve = bars(docs), losses(docs)
    style = {"font.size": 11, "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK}
    style |= {"axes.edgecolor": FAINT, "axes.facecolor": PLATE, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        panels = 2 if curve is None else 3
        figure, axes = plt.subplots(
            1, panels, figsize=(4.2 * panels + 0.6, 4.1), facecolor=PLATE, layout="constrained"
        )
        for axis, title in zip(axes, ("Time of a step", "Memory of a step"), strict=False):
            _ratios(axis, shown, title)
        if curve is not None:
            _curve(axes[2], curve)
        figure.suptitle(about(docs), fontsize=9.5)
        handles = [plt.Rectangle((0, 0), 1, 1, color=METHODS[m][1]) for m in METHODS]
        figure.legend(handles, [METHODS[m][0] for m in METHODS], loc="outside lower center", ncols=2, frameon=False)
        path = docs / PICTURE
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=140, metadata={"Software": None, "Description": mark(docs)})
        plt.close(figure)
    return curve is not None


def _ratios(axis: Any, shown: list[Bar], title: str) -> None:
    of_time = title.startswith("Time")
    shapes = list(dict.fromkeys(bar.shape for bar in shown))
    place, labels, farthest = 0.0, [], 1.0
    for shape in shapes:
        group = [bar for bar in shown if bar.shape == shape]
        labels.append((place - 0.85, shape))
        for bar in group:
            value = bar.time if of_time else bar.memory
            spread = [[bar.time - bar.least], [bar.most - bar.time]] if of_time else None
            axis.barh(place, value, 0.8, color=METHODS[bar.method][1], xerr=spread, error_kw={"ecolor": INK})
            end = bar.most if of_time else value
            axis.text(end + 0.06, place, f"{value:.2f} x", va="center", fontsize=10, bbox=_BEHIND)
            farthest, place = max(farthest, end), place + 1
        place += 1.2
    for height, text in labels:
        axis.text(0.0, height, text, va="center", fontsize=10.5, fontweight="bold", bbox=_BEHIND)
    axis.axvline(1.0, color=INK, linewidth=1, linestyle="--", zorder=0.5)
    axis.set(
        xlim=(0, farthest * 1.25), ylim=(place - 1.5, -1.5), yticks=[], xlabel="relative to plain training (line: 1)"
    )
    axis.set_title(f"{title} (less is better)", fontsize=12)


def _curve(axis: Any, curve: Losses) -> None:
    epsilons = list(curve.by_epsilon)
    axis.plot(epsilons, list(curve.by_epsilon.values()), "o-", color=METHODS["one_pass"][1], label="private (dpft)")
    axis.axhline(curve.before, color=FAINT, linestyle=":", label="before training")
    setting = f"batch {curve.setting['batch']:g}, {curve.setting['steps']:g} steps"
    axis.set(xscale="log", xlabel=f"epsilon (less is more private); {setting}", ylabel="validation loss")
    axis.set_xticks(epsilons, [f"{epsilon:g}" for epsilon in epsilons])
    axis.minorticks_off()
    axis.set_title("Loss over epsilon (less is better)", fontsize=12)
    axis.legend(fontsize=9, frameon=False)


def _read(docs: Path, name: str) -> Any:
    return json.loads((docs / "benchmarks" / name).read_text(encoding="utf-8"))


def is_current(docs: Path = DOCS) -> bool:
    """Whether the picture was drawn from the results that are kept now."""
    from PIL import Image

    path = docs / PICTURE
    if not path.exists():
        return False
    with Image.open(path) as picture:
        return bool(picture.info.get("Description") == mark(docs))


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and do what it says; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="draw nothing")
    args = parser.parse_args(arguments)
    if args.check:
        current = is_current()
        print(f"docs/{PICTURE} is " + ("current" if current else "old: run python tools/readme_picture.py"))
        return int(not current)
    if not draw():
        print(f"no loss over epsilon: none of {', '.join(LOSSES)} in docs/benchmarks has two values of it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
