"""The table and the picture of docs/samplers.md: epsilon at equal noise, by the way in which batches are drawn.

python tools/sampler_tables.py            # print the table
python tools/sampler_tables.py --write    # put it into the page, and draw docs/images/samplers.png
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any, NamedTuple

import dpft

PAGE = Path(__file__).resolve().parent.parent / "docs" / "samplers.md"
PICTURE = PAGE.parent / "images" / "samplers.png"
MARKS = "<!-- table: samplers -->", "<!-- end -->"
SAMPLERS = ("poisson", "truncated_poisson", "balls_and_bins", "fixed_size", "shuffle")
_BOUND = 1 + 1e-9


class Setting(NamedTuple):
    """One training: N examples, b of them in a batch on average, whole epochs, noise and delta."""

    name: str
    examples: int
    batch: int
    epochs: int
    sigma: float
    delta: float

    @property
    def cap(self) -> int:
        """Of truncated Poisson: six standard deviations above the mean."""
        return math.ceil(self.batch + 6 * math.sqrt(self.batch))


SETTINGS = (
    Setting("small corpus", 10_000, 250, 3, 0.8, 1e-5),
    Setting("usual fine-tuning", 100_000, 1_000, 4, 0.8, 1e-6),
    Setting("one epoch", 1_000_000, 4_000, 1, 0.6, 1e-7),
    Setting("many epochs", 50_000, 1_000, 50, 1.5, 1e-6),
    Setting("very large batches", 50_000, 12_500, 20, 4.0, 1e-6),
)


def epsilon(setting: Setting, sampler: str) -> float:
    """Of the whole training, by dpft's accountant for the sampler."""
    options: dict[str, Any] = {"sampler": sampler}
    if sampler == "truncated_poisson":
        options["max_batch_size"] = setting.cap
    if sampler == "fixed_size":
        options["accountant"] = "rdp"
    config = dpft.PrivacyConfig(
        noise_multiplier=setting.sigma,
        target_delta=setting.delta,
        expected_batch_size=setting.batch,
        num_steps=setting.epochs * setting.examples // setting.batch,
        **options,
    )
    return config.resolve(setting.examples).epsilon


def results() -> dict[Setting, dict[str, float]]:
    """Every number of the page."""
    return {setting: {name: epsilon(setting, name) for name in SAMPLERS} for setting in SETTINGS}


def table(found: dict[Setting, dict[str, float]]) -> str:
    """In Markdown; epsilons rounded up."""
    lines = [
        "| setting | N | b | epochs | sigma | delta | " + " | ".join(f"`{name}`" for name in SAMPLERS) + " |",
        "|---" * (6 + len(SAMPLERS)) + "|",
    ]
    for setting, row in found.items():
        values = " | ".join(_rounded_up(row[name]) for name in SAMPLERS)
        lines.append(
            f"| {setting.name} | {setting.examples:,} | {setting.batch:,} | {setting.epochs} | {setting.sigma:g} "
            f"| {setting.delta:g} | {values} |"
        )
    return "\n".join(lines)


def with_table(page: str, found: dict[Setting, dict[str, float]]) -> str:
    """The page with the table between its marks."""
    before, mark, rest = page.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not (mark and end):
        raise ValueError(f"{PAGE.name} has no place for the table: {' and '.join(MARKS)}")
    return f"{before}{mark}\n\n{table(found)}\n\n{end}{after}"


def draw(found: dict[Setting, dict[str, float]]) -> None:
    """Write the picture: epsilon of each sampler over that of Poisson, one group for each setting."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 4.2), layout="constrained")
    width = 0.8 / len(SAMPLERS)
    for place, name in enumerate(SAMPLERS):
        ratios = [row[name] / row["poisson"] for row in found.values()]
        at = [group + (place - (len(SAMPLERS) - 1) / 2) * width for group in range(len(found))]
        bars = axis.bar(at, ratios, width, label=name)
        axis.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios], fontsize=7)
    axis.axhline(1.0, color="black", linewidth=0.8, linestyle="--")
    axis.set_xticks(range(len(found)), [setting.name for setting in found])
    axis.set(yscale="log", ylabel="epsilon over that of poisson, at equal noise")
    axis.legend(ncols=len(SAMPLERS), fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.12))
    figure.savefig(PICTURE, dpi=140, metadata={"Software": None, "Description": table(found)})
    plt.close(figure)


def drawn_table() -> str:
    """The table of the numbers that the picture shows, which is kept in it."""
    from PIL import Image

    with Image.open(PICTURE) as picture:
        return str(picture.info.get("Description"))


def _rounded_up(value: float) -> str:
    """Four digits, as dpft's statements show them."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 3)
    return f"{math.ceil(value / unit / _BOUND) * unit:.4g}"


def main() -> None:
    """Print or write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--write", action="store_true", help="put the table into docs/samplers.md and draw the picture"
    )
    write, found = parser.parse_args().write, results()
    if write:
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
        draw(found)
    else:
        print(table(found))


if __name__ == "__main__":
    main()
