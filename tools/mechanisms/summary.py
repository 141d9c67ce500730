"""What the trainings say: loss at equal epsilon, epsilon at equal loss. Needs the standard library alone."""

from __future__ import annotations

import itertools
import math
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping
from statistics import mean, stdev
from typing import Any, NamedTuple

from tools.mechanisms.settings import EPSILONS, VARIANTS, Rows, chosen_decay, chosen_rate, key_of, tunes

DRAWS = 2000
BELOW, ABOVE = 0.0, math.inf  # in place of an epsilon outside of the measured range
AVERAGED = " averaged"  # of the weights of a variant: a variant of its own


class Losses(NamedTuple):
    """Of one variant at one epsilon, by seed."""

    by_seed: dict[int, float]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return mean(self.by_seed.values())

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds; 0 of one."""
        return stdev(self.by_seed.values()) if len(self.by_seed) > 1 else 0.0

    @property
    def error(self) -> float:
        """Of the mean."""
        return self.spread / math.sqrt(len(self.by_seed))


def losses(rows: Rows) -> dict[str, dict[float, Losses]]:
    """By variant and epsilon: of the chosen learning rates, without the trainings that chose them.

    A moving average of the weights, with the decay that was chosen, is a variant of its own: :data:`AVERAGED`.
    """
    rows = [dict(row) for row in rows]
    found: dict[str, dict[float, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for variant, epsilon in itertools.product(VARIANTS, EPSILONS):
        chosen = variant.name, epsilon, chosen_rate(rows, variant, epsilon)
        decay = chosen_decay(rows, variant, epsilon) if variant.averaged else ""
        for row in rows:
            if tunes(row) or key_of(row)[:3] != chosen:
                continue
            found[variant.name][epsilon][row["seed"]] = row["loss"]
            if variant.averaged:
                found[variant.name + AVERAGED][epsilon][row["seed"]] = row["averaged"][decay]
    return {name: {e: Losses(by_seed) for e, by_seed in sorted(of.items())} for name, of in found.items()}


def crossing(curve: Mapping[float, float], target: float) -> float:
    """The epsilon at which a loss is reached, between measured points by a line over the logarithm of epsilon.

    Args:
        curve: loss by epsilon.
        target: loss.

    Returns:
        The least such epsilon; :data:`BELOW` where the loss at the least epsilon is lower already, :data:`ABOVE` where
        no point reaches it.
    """
    points = sorted(curve.items())
    if points[0][1] < target:
        return BELOW
    for (left, high), (right, low) in itertools.pairwise(points):
        if low <= target <= high:
            share = (high - target) / (high - low) if high > low else 0.0
            return math.exp(math.log(left) + share * math.log(right / left))
    return points[0][0] if points[0][1] == target else ABOVE


class Equal(NamedTuple):
    """The epsilon of equal loss, with the interval in which nine of ten lie when each mean is drawn anew."""

    epsilon: float
    least: float
    most: float


def equal_utility(curve: Mapping[float, Losses], reference: Losses) -> Equal:
    """At which epsilon a variant has the reference's loss.

    Every mean is drawn from the normal distribution with its error: the reference's, too.
    """
    draw = random.Random(0).gauss
    points = [(epsilon, found.mean, found.error) for epsilon, found in curve.items()]
    target, error = reference.mean, reference.error
    best = crossing({epsilon: middle for epsilon, middle, _ in points}, target)
    drawn = sorted(
        crossing({epsilon: draw(middle, of_mean) for epsilon, middle, of_mean in points}, draw(target, error))
        for _ in range(DRAWS)
    )
    return Equal(best, drawn[DRAWS // 20], drawn[DRAWS - 1 - DRAWS // 20])


def difference(of: Losses, reference: Losses) -> Losses:
    """Seed by seed: the same sampling, and the same noise where both add it alike."""
    shared = of.by_seed.keys() & reference.by_seed.keys()
    return Losses({seed: of.by_seed[seed] - reference.by_seed[seed] for seed in sorted(shared)})


def results(rows: Rows) -> list[dict[str, Any]]:
    """A row for each variant and epsilon, for the page of benchmarks."""
    rows = [dict(row) for row in rows]
    noise = {(row["variant"], row["epsilon"]): row["noise_multiplier"] for row in rows if not tunes(row)}
    variants = {variant.name: variant for variant in VARIANTS}
    shown = []
    for name, curve in losses(rows).items():
        variant = variants[name.removesuffix(AVERAGED)]
        for epsilon, found in curve.items():
            decay = f", decay {chosen_decay(rows, variant, epsilon)}" if name.endswith(AVERAGED) else ""
            shown.append(
                {
                    "variant": name + decay,
                    "epsilon": epsilon,
                    "learning_rate": chosen_rate(rows, variant, epsilon),
                    "noise_multiplier": noise[variant.name, epsilon],
                    "loss": found.mean,
                    "standard_deviation": found.spread,
                    "seeds": len(found.by_seed),
                }
            )
    return shown


# ---------------------------------------------------------------------------------------------------------------------
# Tables in Markdown

NAMES = {
    "dp_sgd": "DP-SGD",
    "bandmf": "BandMF",
    "blt": "BLT, 4 buffers",
    "balls_and_bins": "DP-SGD, balls and bins",
}
OPTIMIZERS = {  # the beginning of a variant's name, and its end
    ("sgd", ""): ("SGD", "cosine"),
    ("sgd", " constant"): ("SGD", "constant"),
    ("adamw", ""): ("AdamW", "cosine"),
    ("adamw", " constant"): ("AdamW", "constant"),
}
AFTER = {
    "AdamW": "adamw dp_sgd",
    "average of its weights": "adamw dp_sgd" + AVERAGED,
    "AdamW, constant learning rate": "adamw dp_sgd constant",
    "average of its weights, constant learning rate": "adamw dp_sgd constant" + AVERAGED,
    "`AdamWBC`, floor 0.1": "adamw_bc dp_sgd floor 0.1",
    "`AdamWBC`, floor 1": "adamw_bc dp_sgd floor 1",
    "`AdamWBC`, floor 1, constant learning rate": "adamw_bc dp_sgd floor 1 constant",
}


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """In Markdown."""
    head = list(head)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def loss(found: Losses | None) -> str:
    """Mean and spread."""
    return "" if found is None else f"{found.mean:.3f} ± {found.spread:.3f}"


def utility_table(rows: Rows) -> str:
    """Loss at equal epsilon."""
    found, lines = losses(rows), []
    for (optimizer, schedule), words in OPTIMIZERS.items():
        for mechanism, name in NAMES.items():
            curve = found[f"{optimizer} {mechanism}{schedule}"]
            lines.append([*words, name, *(loss(curve.get(epsilon)) for epsilon in EPSILONS)])
    return table(["optimiser", "schedule", "mechanism", *(f"epsilon {epsilon:g}" for epsilon in EPSILONS)], lines)


def epsilon_table(rows: Rows) -> str:
    """Epsilon at equal loss."""
    found, lines = losses(rows), []
    for (optimizer, schedule), words in OPTIMIZERS.items():
        for target, reference in found[f"{optimizer} dp_sgd{schedule}"].items():
            cells = []
            for mechanism in [name for name in NAMES if name != "dp_sgd"]:
                equal = equal_utility(found[f"{optimizer} {mechanism}{schedule}"], reference)
                interval = " to ".join(dict.fromkeys((_epsilon(equal.least), _epsilon(equal.most))))
                cells.append(f"{_epsilon(equal.epsilon)} ({interval})")
            lines.append([*words, f"{target:g}", f"{reference.mean:.3f}", *cells])
    others = [name for mechanism, name in NAMES.items() if mechanism != "dp_sgd"]
    return table(("optimiser", "schedule", "epsilon of DP-SGD", "its loss", *others), lines)


def _epsilon(value: float) -> str:
    if value == BELOW:
        return f"below {EPSILONS[0]:g}"
    return f"above {EPSILONS[-1]:g}" if value == ABOVE else f"{value:.2f}"


def release_table(rows: Rows) -> str:
    """What is done after the release, against AdamW seed by seed."""
    rows = list(rows)
    found = losses(rows)
    reference = found[AFTER["AdamW"]]
    lines = []
    for words, name in AFTER.items():
        variant = next(v for v in VARIANTS if v.name == name.removesuffix(AVERAGED))
        rates = ", ".join(f"{chosen_rate(rows, variant, epsilon):g}" for epsilon in EPSILONS)
        decays = ", ".join(chosen_decay(rows, variant, epsilon) for epsilon in EPSILONS if name.endswith(AVERAGED))
        cells = []
        for epsilon in EPSILONS:
            of = found.get(name, {}).get(epsilon)
            cells.append(loss(of))
            if of is not None and of != reference[epsilon]:
                less = difference(of, reference[epsilon])
                cells[-1] += f" ({less.mean:+.3f} ± {less.spread:.3f})"
        lines.append([words, rates, decays, *cells])
    return table(["", "learning rates", "decays", *(f"epsilon {epsilon:g}" for epsilon in EPSILONS)], lines)


def corpus_table(rows: Rows, corpus: Rows) -> str:
    """Whether the trainings agree with the exact noise: noise over DP-SGD's, and loss minus DP-SGD's."""
    found, lines = losses(rows), []
    for row in corpus:
        for mechanism in [name for name in NAMES if name in row and name != "dp_sgd"]:
            cells = [f"{row[mechanism]:.2f}", f"{row[mechanism + '_last']:.2f}"]
            for optimizer, schedule in OPTIMIZERS:
                curve, reference = (found[f"{optimizer} {name}{schedule}"] for name in (mechanism, "dp_sgd"))
                cells.append(_gain(curve.get(row["epsilon"]), reference.get(row["epsilon"])))
            name = f"BandMF, {row['bands']} bands" if mechanism == "bandmf" else NAMES[mechanism]
            lines.append([f"{row['epsilon']:g}", name, *cells])
    head = [f"loss, {optimizer}, {schedule}" for optimizer, schedule in OPTIMIZERS.values()]
    return table(("epsilon", "mechanism", "noise in the sums", "in the last weights", *head), lines)


def _gain(of: Losses | None, reference: Losses | None) -> str:
    if of is None or reference is None:
        return ""
    error = math.hypot(of.error, reference.error)
    return f"{of.mean - reference.mean:+.3f} ± {error:.3f}"


def grid_table(exact: Rows) -> str:
    """Noise in the sums over DP-SGD's, by share of the examples in a batch, epochs and epsilon."""
    by_setting: dict[tuple[float, int], dict[float, Mapping[str, Any]]] = defaultdict(dict)
    for row in exact:
        by_setting[row["rate"], row["epochs"]][row["epsilon"]] = row
    lines = []
    for (rate, epochs), of in by_setting.items():
        cells = []
        for epsilon in EPSILONS:
            row = of[epsilon]
            cells += [f"{_bold(row['bandmf'])} ({row['bands']})", _bold(row["blt"])]
        lines.append([f"{rate:g}", str(epochs), str(next(iter(of.values()))["steps"]), *cells])
    named = [f"epsilon {epsilon:g}: {what}" for epsilon in EPSILONS for what in ("BandMF (bands)", "BLT")]
    return table(["b / N", "epochs", "steps", *named], lines)


def _bold(ratio: float) -> str:
    return f"**{ratio:.2f}**" if ratio < 0.995 else f"{ratio:.2f}"


def tables(trained: Mapping[str, Any], exact: Mapping[str, Any]) -> dict[str, str]:
    """By the name that marks a table's place in docs/mechanisms.md.

    Args:
        trained: of mechanisms_cpu.json.
        exact: of mechanisms_exact.json.
    """
    rows = trained["trainings"]
    return {
        "utility": utility_table(rows),
        "epsilon": epsilon_table(rows),
        "release": release_table(rows),
        "corpus": corpus_table(rows, exact["corpus"]),
        "grid": grid_table(exact["results"]),
    }


def with_tables(page: str, trained: Mapping[str, Any], exact: Mapping[str, Any]) -> str:
    """The page with the tables between its marks ``<!-- table: NAME -->`` and ``<!-- end -->``.

    Raises:
        ValueError: a table has no place.
    """
    for name, text in tables(trained, exact).items():
        before, mark, rest = page.partition(f"<!-- table: {name} -->")
        _, end, after = rest.partition("<!-- end -->")
        if not (mark and end):
            raise ValueError(f"the page has no place for the table {name!r}: its mark and <!-- end -->")
        page = f"{before}{mark}\n\n{text}\n\n{end}{after}"
    return page
