"""Compute the epsilon of a privacy statement again, with dp_accounting and scipy alone: nothing of dpft is used.

    pip install dp-accounting scipy
    python recompute.py privacy_report.json     # or README.md, a model card that has dpft's statement

It takes the constants of each release from the report (or from the table of the card, where they have six digits),
computes the epsilon that they give at the stated delta, and compares it with the stated one. Status 0: they agree to
1 %; 1: they do not; 2: the statement has no epsilon, or not the figures.

The theorem of each sampler, with its conditions, is in dpft/privacy/mechanism.py; what a card cannot show, such as
whether batches were really drawn so, no computation can check.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
from dp_accounting import rdp
from dp_accounting.pld import privacy_loss_distribution as pld
from scipy import fft, special, stats

TOLERANCE = 0.01
Segments = list[tuple[dict[str, Any], int]]
Law = tuple[Any, Any]  # of a mixture of Gaussians: their means, and their probabilities


# ------------------------------------------------------------------------------------------------ one mechanism
def poisson(m: dict[str, Any], steps: int, h: float, extra: int) -> Any:
    """Each example with probability q; of a user with k examples, Binomial(k, q) of them are there."""
    q, sigma, k = m["sample_rate"], m["noise_multiplier"], m.get("examples_per_user")
    if k is None or q == 1:
        std = sigma / (k or 1)
        return pld.from_gaussian_mechanism(std, value_discretization_interval=h, sampling_prob=q).self_compose(steps)
    counts = np.arange(k + 1)
    odds = stats.binom.pmf(counts, k, q)
    there = odds > 0
    sensitivities, odds = counts[there].astype(float).tolist(), (odds[there] / odds[there].sum()).tolist()
    found = pld.from_mixture_gaussian_mechanism(sigma, sensitivities, odds, value_discretization_interval=h)
    return found.self_compose(steps)


def truncated_poisson(m: dict[str, Any], steps: int, h: float, extra: int) -> Any:
    """Poisson whose batch is cut at a cap; ``extra``: of the neighbours, the one with one example more."""
    found = pld.from_truncated_subsampled_gaussian_mechanism(
        m["dataset_size"] + extra,
        m["sample_rate"],
        m["max_batch_size"],
        m["noise_multiplier"],
        value_discretization_interval=h,
    )
    return found.self_compose(steps)


def epochs(m: dict[str, Any], steps: int) -> int:
    """Epochs that have begun."""
    return math.ceil(steps / math.ceil(m["dataset_size"] / m["batch_size"]))


def shuffle(m: dict[str, Any], steps: int, h: float, extra: int) -> Any:
    """No amplification: in each epoch an example is in one batch, which is one Gaussian."""
    std = m["noise_multiplier"] / math.sqrt(epochs(m, steps))
    return pld.from_gaussian_mechanism(std, value_discretization_interval=h)


def balls_and_bins(m: dict[str, Any], steps: int, h: float, extra: int) -> Any:
    """In each epoch an example is in one of T batches, at random: N(0, sigma^2 I) against the mixture of N(e_t, ...).

    Their ratio is the mean of T independent Y = exp(z / sigma - 1 / (2 sigma^2)). Y is spread over a grid, keeping its
    mean, which is an upper bound; sums of T are formed by FFT, under both laws.
    """
    sigma, batches = m["noise_multiplier"], math.ceil(m["dataset_size"] / m["batch_size"])
    if batches == 1:
        return pld.from_gaussian_mechanism(sigma / math.sqrt(steps), value_discretization_interval=h)
    reach = 6.8  # deviations beyond which the loss counts as infinite: 5e-12
    deviation = math.sqrt(math.expm1(1 / sigma**2))
    highest = math.exp(reach / sigma + 1 / (2 * sigma**2))
    # Fine for the sum's deviation; and few batches seldom have a sum of the grid's first points.
    lowest = math.exp(float(special.ndtri(1e-10 ** (1 / batches))) / sigma - 1 / (2 * sigma**2))
    g = max(min(0.05 * deviation, lowest / 4), highest / 2**24)
    if g > lowest:
        raise ValueError(f"balls_and_bins with noise multiplier {sigma}: too little noise for a uniform grid")
    edges = g * np.arange(math.ceil(highest / g) + 1)
    with np.errstate(divide="ignore"):
        z = sigma * np.log(edges) + 1 / (2 * sigma)
    mass, mean = (-np.diff(special.ndtr(-shifted)) for shifted in (z, z - 1 / sigma))
    above = np.clip((mean - mass * edges[:-1]) / g, 0, mass)
    without = np.zeros(len(edges))
    without[:-1] += mass - above
    without[1:] += above
    with_example = without * edges  # in the batch: the density is multiplied by Y
    size = fft.next_fast_len(len(edges) + math.ceil((batches + 12 * deviation * math.sqrt(batches)) / g), real=True)
    transform = fft.rfft(without, size)
    others = transform ** (batches - 1)
    q = np.maximum(fft.irfft(others * transform, size), 0)[1:]
    p = np.maximum(fft.irfft(others * fft.rfft(with_example, size), size), 0)[1:]
    loss = np.log(g * np.arange(1, size) / batches)
    q, p = np.where(loss > 0, p * np.exp(-loss), q), np.where(loss > 0, p, q * np.exp(loss))  # the precise one of both
    bins = np.floor(loss / (h / 4)).astype(int)
    bins -= bins.min()
    upper, lower = np.bincount(bins, p), np.bincount(bins, q)
    there = np.flatnonzero((upper > 1e-18) & (lower > 1e-18))
    left = [math.log(max(1e-13, 1 - float(law[there].sum()))) for law in (upper, lower)]
    epoch = pld.from_two_probability_mass_functions(
        {**dict(zip(there.tolist(), np.log(lower[there]).tolist(), strict=True)), "added": left[1]},
        {**dict(zip(there.tolist(), np.log(upper[there]).tolist(), strict=True)), "removed": left[0]},
        value_discretization_interval=h,
        symmetric=False,
    )
    return epoch.self_compose(epochs(m, steps))


def cyclic_poisson(m: dict[str, Any], steps: int, h: float, extra: int) -> Any:
    """Banded noise: an example's steps are b apart, and no two of them touch the same rows; as Poisson's, they."""
    strategy = m["strategy"]
    if len(strategy["weights"]) > strategy["min_separation"] or steps > strategy["steps"]:
        raise ValueError("more bands than an example's steps are apart, or more steps than planned: no theorem")
    return poisson({**m, "examples_per_user": None}, math.ceil(steps / strategy["min_separation"]), h, extra)


def fixed_order(m: dict[str, Any], steps: int, h: float, extra: int) -> Any:
    """BLT: all steps are one Gaussian release."""
    return pld.from_gaussian_mechanism(_whole_training(m, steps), value_discretization_interval=h)


def _sensitivity(strategy: dict[str, Any], n: int) -> float:
    """By how much n steps of C x change: the columns of the example's steps, added up."""
    w, d = np.array(strategy["weights"]), np.array(strategy["decays"])
    column = np.concatenate([[1.0], (w * d ** np.arange(n - 1)[:, None]).sum(1)])
    if w.min() < 0 or (np.diff(column) > 1e-15).any():
        raise ValueError("the strategy's column is negative or increases: no theorem")
    starts = range(0, n, strategy["min_separation"])
    return float(np.linalg.norm(sum(np.concatenate([np.zeros(s), column[: n - s]]) for s in starts)))


def _whole_training(m: dict[str, Any], steps: int) -> float:
    """Its noise multiplier: z is sigma times the sensitivity of all planned steps, and t steps have less."""
    strategy = m["strategy"]
    apart = math.ceil(m["dataset_size"] / m["batch_size"])
    if strategy["min_separation"] > apart or steps > strategy["steps"]:
        raise ValueError("the batches come round earlier than the noise was made for, or more steps than planned")
    return float(m["noise_multiplier"] * _sensitivity(strategy, strategy["steps"]) / _sensitivity(strategy, steps))


def check_scale(strategy: dict[str, Any], stated: float) -> None:
    """Refuse noise whose stated scale is not the sensitivity of what is composed: one participation, or all steps."""
    weights = strategy["weights"][: strategy["steps"]]
    own = _sensitivity(strategy, strategy["steps"]) if strategy["decays"] else float(np.linalg.norm(weights))
    if not math.isclose(stated, own, rel_tol=1e-5):
        raise ValueError(f"the noise has the scale {stated:.6g}, and the sensitivity of the strategy is {own:.6g}")


PLDS: dict[str, Callable[[dict[str, Any], int, float, int], Any]] = {
    f.__name__: f for f in (poisson, truncated_poisson, shuffle, balls_and_bins, cyclic_poisson, fixed_order)
}


def mixture_of(m: dict[str, Any]) -> tuple[Law, Law]:
    """What a release is at most, with a unit and without: of a user, Binomial(k, q) examples; else one or none."""
    k = m.get("examples_per_user") or 1
    counts = np.arange(k + 1)
    return (counts, stats.binom.pmf(counts, k, m["sample_rate"])), (np.zeros(1), np.ones(1))


def log_moment(upper: Law, lower: Law, sigma: float, order: float) -> float:
    """Logarithm of the integral of P^order Q^(1 - order), for mixtures P, Q of Gaussians; by the trapezoidal rule."""
    means = np.concatenate([upper[0], lower[0]])
    span = float(np.ptp(means))
    reach = order * span + 40 * sigma
    x = np.arange(means.min() - reach, means.max() + reach, min(sigma / 5, math.pi * sigma**2 / span / 10))
    p, q = (special.logsumexp(stats.norm.logpdf(x[:, None], a, sigma), axis=1, b=w) for a, w in (upper, lower))
    return max(0.0, float(special.logsumexp(order * p + (1 - order) * q) + math.log(x[1] - x[0])))


def rdp_of_mixtures(m: dict[str, Any], steps: int, order: float) -> float:
    """RDP where dp_accounting has none: users, and batches that are cut; of the pairs of which it composes PLDs."""
    one, none = mixture_of(m)
    sigma = m["noise_multiplier"]
    added = max(log_moment(one, none, sigma, order), log_moment(none, one, sigma, order))
    if m["sampler"] == "poisson":
        return steps * added / (order - 1)
    q, cap, found = m["sample_rate"], m["max_batch_size"], [added]
    for n in (m["dataset_size"], m["dataset_size"] + 1):
        cut = float(stats.binom.sf(cap - 1, n - 1, q))  # the batch is cut, if the example is drawn
        if cut > 0:  # then the example replaces another
            drawn = float(stats.binom.sf(cap, n, q)) * cap / cut / n
            weights = np.array([1 - drawn, drawn])
            replaced = log_moment((np.array([0, 2]), weights), (np.array([0, -2]), weights), sigma, order)
            found.append(float(special.logsumexp([replaced, added], b=[cut, 1 - cut])))
    return steps * max(found) / (order - 1)


def rdp_event(m: dict[str, Any], steps: int) -> tuple[Any, int]:
    """For RDP: an event of dp_accounting, and how often it happens."""
    sigma, sampler = m["noise_multiplier"], m["sampler"]
    if sampler == "fixed_size":  # one example replaces another: the sum changes by 2 C
        gaussian = dp_accounting.GaussianDpEvent(sigma / 2)
        return dp_accounting.SampledWithoutReplacementDpEvent(m["dataset_size"], m["batch_size"], gaussian), steps
    if sampler == "shuffle":
        return dp_accounting.GaussianDpEvent(sigma / math.sqrt(epochs(m, steps))), 1
    if sampler == "fixed_order":
        return dp_accounting.GaussianDpEvent(_whole_training(m, steps)), 1
    if sampler == "cyclic_poisson":
        steps = math.ceil(steps / m["strategy"]["min_separation"])
    elif sampler != "poisson" or m.get("examples_per_user"):
        raise ValueError(f"{sampler} has no RDP here")
    return dp_accounting.PoissonSampledDpEvent(m["sample_rate"], dp_accounting.GaussianDpEvent(sigma)), steps


# ------------------------------------------------------------------------------------------------ composition
def joined(segments: Segments) -> Segments:
    """The starts of a run: correlated noise goes on over them, everything else is composed."""
    found: Segments = []
    for mechanism, count in segments:
        same = next((i for i, (m, _) in enumerate(found) if m == mechanism and "strategy" in m), None)
        if same is None:
            found.append((mechanism, count))
        else:
            found[same] = mechanism, found[same][1] + count
    return [(m, count) for m, count in found if count]


def epsilon(segments: Segments, delta: float, accountant: str, h: float = 1e-4) -> float:
    """Of all releases together.

    Args:
        segments: mechanisms with their numbers of releases, as in the report.
        delta: > 0.
        accountant: ``pld`` or ``rdp``.
        h: interval to which PLD rounds privacy losses up.
    """
    segments = joined(segments)
    if any(m["noise_multiplier"] == 0 for m, _ in segments):
        return math.inf
    if not segments:
        return 0.0
    if accountant == "rdp" and all(
        m["sampler"] == "truncated_poisson" or m.get("examples_per_user") for m, _ in segments
    ):
        orders = rdp.rdp_privacy_accountant.DEFAULT_RDP_ORDERS
        total = [sum(rdp_of_mixtures(m, count, order) for m, count in segments) for order in orders]
        return float(rdp.compute_epsilon(orders, total, delta)[0])
    if accountant == "rdp":
        fixed = segments[0][0]["sampler"] == "fixed_size"
        relation = dp_accounting.NeighboringRelation.REPLACE_ONE if fixed else None
        account = rdp.RdpAccountant(**({"neighboring_relation": relation} if relation else {}))
        for mechanism, count in segments:
            account.compose(*rdp_event(mechanism, count))
        return float(account.get_epsilon(delta))
    if any(m["sampler"] == "balls_and_bins" for m, _ in segments):
        h /= 10  # losses are rounded up to multiples of h here, and not spread over two of them
    found = []
    for extra in (0, 1) if any(m["sampler"] == "truncated_poisson" for m, _ in segments) else (0,):
        total = pld.identity(value_discretization_interval=h)
        for mechanism, count in segments:
            total = total.compose(PLDS[mechanism["sampler"]](mechanism, count, h, extra))
        found.append(float(total.get_epsilon_for_delta(delta)))
    return max(found)


# ------------------------------------------------------------------------------------------------ statements
def of_report(report: dict[str, Any]) -> tuple[float, float]:
    """The stated epsilon of a privacy_report.json, and the recomputed one."""
    if report.get("epsilon_spent") in (None, "inf"):
        raise ValueError("the report states no finite epsilon that was spent")
    segments = [(segment["mechanism"], segment["releases"]) for segment in report["segments"]]
    if report.get("strategy"):
        check_scale(report["strategy"], float(report["sensitivity"].split()[0]))
    interval = report.get("discretization") or 1e-4
    return float(report["epsilon_spent"]), epsilon(segments, report["delta"], report["accountant"], interval)


def of_card(text: str) -> tuple[float, float]:
    """The stated epsilon of a model card, and the one that the figures of its table give."""
    rows = dict(re.findall(r"^\| ([^|]+?) \| (.+?) \|$", text, re.MULTILINE))
    if not re.fullmatch(r"[\d.e+-]+", rows.get("Epsilon spent", "")):
        raise ValueError("the card states no finite epsilon that was spent, or has no statement of dpft")

    def number(name: str, pattern: str = r"[\d.e+-]*\d") -> float:
        match = re.search(pattern, rows[name].replace(",", " "))
        if match is None:
            raise ValueError(f"the card's row {name!r} has no number: {rows[name]}")
        return float(match[match.lastindex or 0])

    sampler = rows["Sampler"].partition(",")[0]
    mechanism: dict[str, Any] = {"sampler": sampler, "noise_multiplier": number("Noise multiplier")}
    if "sample rate" in rows["Sampler"]:
        mechanism["sample_rate"] = number("Sampler", r"sample rate ([\d.e+-]*\d)")
    else:
        mechanism["batch_size"] = int(number("Expected logical batch"))
    if sampler in ("truncated_poisson", "fixed_size", "shuffle", "balls_and_bins", "fixed_order"):
        mechanism["dataset_size"] = int(number("Number of examples"))
    if "capped at" in rows["Expected logical batch"]:
        mechanism["max_batch_size"] = int(number("Expected logical batch", r"capped at (\d+)"))
    if re.match(r"user \(at most \d+ examples", rows["Privacy unit"]):  # and not a user as one example, with all rows
        mechanism["examples_per_user"] = int(number("Privacy unit", r"at most (\d+)"))
    if "Strategy matrix C" in rows:
        mechanism["strategy"] = strategy_of(rows["Strategy matrix C"], rows["Participation"])
        check_scale(mechanism["strategy"], number("Strategy matrix C", r"noise multiplier x ([\d.e+-]*\d)"))
    segments = [(mechanism, int(number("Steps released / planned")))]
    if "Releases, over all starts of the run:" in text and "strategy" not in mechanism:
        listed = re.findall(r"^- (\d+): (sampler .+)$", text, re.MULTILINE)
        segments = [(dict(map(constant, constants.split(", "))), int(count)) for count, constants in listed]
    interval = re.search(r"discretisation ([\d.e+-]*\d)", rows["Accountant"])
    accountant = "rdp" if "RDP" in rows["Accountant"] else "pld"
    found = epsilon(segments, number("Delta"), accountant, float(interval[1]) if interval else 1e-4)
    return number("Epsilon spent"), found


def constant(words: str) -> tuple[str, Any]:
    """``name value`` in a list of releases."""
    name, _, value = words.partition(" ")
    return name, value if re.search("[^-+.e0-9]", value) else int(value) if value.isdigit() else float(value)


def strategy_of(matrix: str, participation: str) -> dict[str, Any]:
    """The strategy matrix of correlated noise, from the card's sentences."""
    number = r"-?[\d.]+(?:e-?\d+)?"
    listed = rf"({number}(?:, {number})*)"
    found: dict[str, Any] = {"steps": int(matrix.split()[0]), "decays": []}
    found["min_separation"] = int(re.findall(r"one of (\d+) steps", participation)[0])
    names = [("weights", rf"w = {listed}"), ("decays", rf"d = {listed}")] if "w = " in matrix else []
    for name, pattern in names or [("weights", rf"first column {listed}")]:
        found[name] = [float(value) for value in re.findall(pattern, matrix)[0].split(", ")]
    return found


def main(path: Path) -> int:
    """Print both epsilons; the exit status."""
    text = path.read_text(encoding="utf-8")
    try:
        stated, found = of_report(json.loads(text)) if path.suffix == ".json" else of_card(text)
    except (KeyError, ValueError) as error:
        print(f"{path}: {error}")
        return 2
    agree = abs(found - stated) <= TOLERANCE * stated
    print(f"stated epsilon {stated:.6g}, computed again {found:.6g}: {'they agree' if agree else 'THEY DIFFER'}")
    return 0 if agree else 1


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python recompute.py privacy_report.json | README.md")
    sys.exit(main(Path(sys.argv[1])))
