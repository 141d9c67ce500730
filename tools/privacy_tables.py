"""The tables of docs/privacy_officer.md: what an (epsilon, delta) lets an attacker do.

python tools/privacy_tables.py            # print them
python tools/privacy_tables.py --write    # put them into the page
"""

from __future__ import annotations

import argparse
import math
import warnings
from pathlib import Path

import numpy as np

import dpft

PAGE = Path(__file__).resolve().parent.parent / "docs" / "privacy_officer.md"
EPSILONS = (0.1, 0.5, 1.0, 2.0, 3.0, 4.0, 8.0, 10.0)
DELTA = 1e-6
RATES = (0.001, 0.01)
"""Share of the people who are not in the data, and whom an attacker accuses of being in it."""


def right_guess(epsilon: float, delta: float) -> float:
    """Largest probability of guessing a fair coin that decides whether a record is in the data.

    The bound of Kairouz, Oh and Viswanath 2015 (arXiv 1311.0776): (e^epsilon + delta) / (1 + e^epsilon).
    """
    return (math.exp(epsilon) + delta) / (1 + math.exp(epsilon))


def caught(epsilon: float, delta: float, rate: float) -> float:
    """Largest true positive rate of an attack whose false positive rate is ``rate`` (Theorem 2.1, as above)."""
    return min(math.exp(epsilon) * rate + delta, 1 - math.exp(-epsilon) * (1 - rate - delta), 1.0)


def guarantee_table() -> str:
    """Epsilon at one delta, and nothing else known of the mechanism."""
    lines = [
        "| epsilon | odds of a right guess, at most | right guesses, at most | found of those in the data, at 0.1 % "
        "false alarms | at 1 % false alarms |",
        "|---|---|---|---|---|",
    ]
    for eps in EPSILONS:
        right = right_guess(eps, DELTA)
        found = " | ".join(_percent(caught(eps, DELTA, rate)) for rate in RATES)
        lines.append(f"| {eps:g} | {_number(right / (1 - right))} : 1 | {_percent(right)} | {found} |")
    return "\n".join(lines)


def profile(target: float) -> list[tuple[float, float]]:
    """Pairs (epsilon, delta), each of which a run keeps: 400 steps on 1,024 of 100,000 records, in expectation.

    Args:
        target: its epsilon at ``DELTA``.
    """
    plan = dpft.PrivacyConfig(target_epsilon=target, target_delta=DELTA, expected_batch_size=1024, num_steps=400)
    sigma = plan.resolve(100_000).noise_multiplier
    pairs = []
    for delta in (float(x) for x in (*np.logspace(-9, -2, 15), *np.linspace(0.02, 0.5, 49))):
        same = dpft.PrivacyConfig(noise_multiplier=sigma, target_delta=delta, expected_batch_size=1024, num_steps=400)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that delta is not below 1/N: here it is a point of a curve
            pairs.append((same.resolve(100_000).epsilon, delta))
    return pairs


def run_table() -> str:
    """The same of whole runs, of which all pairs of epsilon and delta are known."""
    lines = [
        "| epsilon at delta 1e-6 | right guesses, at most | found, at 0.1 % false alarms | at 1 % false alarms |",
        "|---|---|---|---|",
    ]
    for target in (1.0, 2.0, 4.0, 8.0):
        pairs = profile(target)
        right = min(right_guess(eps, delta) for eps, delta in pairs)
        found = " | ".join(_percent(min(caught(eps, delta, rate) for eps, delta in pairs)) for rate in RATES)
        lines.append(f"| {target:g} | {_percent(right)} | {found} |")
    return "\n".join(lines)


def tables() -> dict[str, str]:
    """By the name that marks a table's place in the page."""
    return {"guarantee": guarantee_table(), "run": run_table()}


def with_tables(page: str) -> str:
    """The page with the tables between its marks ``<!-- table: NAME -->`` and ``<!-- end -->``."""
    for name, table in tables().items():
        before, mark, rest = page.partition(f"<!-- table: {name} -->")
        _, end, after = rest.partition("<!-- end -->")
        if not end:
            raise ValueError(f"the page has no place for the table {name!r}: {mark or 'its mark'} and <!-- end -->")
        page = f"{before}{mark}\n\n{table}\n\n{end}{after}"
    return page


def _percent(share: float) -> str:
    """Rounded up, since it is a bound."""
    digits = 1 if share < 0.995 else 3
    return f"{math.ceil(share * 100 * 10**digits - 1e-9) / 10**digits:.{digits}f} %"


def _number(value: float) -> str:
    """Three digits, rounded up."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return f"{math.ceil(value / unit - 1e-9) * unit:,.{max(0, -round(math.log10(unit)))}f}"


def main() -> None:
    """Print or write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/privacy_officer.md")
    if parser.parse_args().write:
        PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print("\n\n".join(tables().values()))


if __name__ == "__main__":
    main()
