"""Tables of the trainings: what is interpolated, what is left out, and that the page shows what the files say."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tools.mechanisms.command import PAGE, reports
from tools.mechanisms.settings import (
    DECAYS,
    EPSILONS,
    RATES,
    SEEDS,
    TUNED_SEED,
    VARIANTS,
    Training,
    Variant,
    chosen_decay,
    chosen_rate,
    key_of,
    measured,
    tuning,
)
from tools.mechanisms.summary import (
    ABOVE,
    AVERAGED,
    BELOW,
    Losses,
    crossing,
    difference,
    equal_utility,
    losses,
    with_tables,
)


def row(variant: Variant, epsilon: float, rate: float, seed: int, loss: float) -> dict[str, Any]:
    """A result as a training writes it."""
    found = {"variant": variant.name, "epsilon": epsilon, "learning_rate": rate, "seed": seed, "loss": loss}
    found["noise_multiplier"] = 1.0
    if variant.averaged:
        found["averaged"] = {f"{decay:g}": loss - decay for decay in DECAYS}
    return found


def tuned() -> list[dict[str, Any]]:
    """Results of all tuning trainings, of which the middle rate is the best."""
    rows = []
    for training in tuning([]):
        middle = RATES[training.variant.optimizer][1]
        loss = 4.0 + abs(math.log(training.learning_rate / middle))
        rows.append(row(training.variant, training.epsilon, training.learning_rate, training.seed, loss))
    return rows


def test_an_epsilon_between_two_is_on_a_line_over_its_logarithm() -> None:
    curve = {1.0: 5.0, 4.0: 4.0, 16.0: 3.5}
    assert crossing(curve, 4.5) == pytest.approx(2.0)
    assert crossing(curve, 3.75) == pytest.approx(8.0)
    assert crossing(curve, 4.0) == pytest.approx(4.0) and crossing(curve, 5.0) == pytest.approx(1.0)
    assert crossing(curve, 5.1) == BELOW and crossing(curve, 3.4) == ABOVE
    assert crossing({1.0: 4.1, 4.0: 4.2, 16.0: 3.8}, 4.0) == pytest.approx(8.0), "also where a loss rises between"


def test_the_spread_of_both_goes_into_the_interval() -> None:
    def of(loss: float, spread: float) -> Losses:
        return Losses({seed: loss + spread * (seed - 2) for seed in range(5)})

    curve = {1.0: of(5.0, 0.0), 16.0: of(4.0, 0.0)}
    sharp = equal_utility(curve, of(4.5, 0.0))
    assert sharp.least == sharp.epsilon == sharp.most == pytest.approx(4.0)
    vague = equal_utility(curve, of(4.5, 0.1))
    # nine of ten within 1.645 errors of the mean; a nat is ln 16 of the logarithm of epsilon
    reach = 1.645 * of(4.5, 0.1).error * math.log(16)
    assert math.log(vague.most / 4) == pytest.approx(reach, rel=0.1)
    assert math.log(4 / vague.least) == pytest.approx(reach, rel=0.1)
    both = equal_utility({1.0: of(5.0, 0.1), 16.0: of(4.0, 0.1)}, of(4.5, 0.1))
    assert both.most > vague.most and both.least < vague.least
    assert equal_utility(curve, of(4.01, 0.1)).most == ABOVE
    assert equal_utility(curve, of(5.5, 0.0)).epsilon == BELOW


def test_rates_are_tuned_at_each_epsilon_until_no_end_is_the_best() -> None:
    rows = tuned()
    assert tuning(rows) == []
    assert {training.seed for training in tuning([])} == {TUNED_SEED} and TUNED_SEED not in SEEDS
    first = VARIANTS[0]
    assert chosen_rate(rows, first, 3.0) == RATES[first.optimizer][1]
    largest = max(RATES[first.optimizer])

    def at(rate: float, loss: float) -> dict[str, Any]:
        return row(first, 3.0, rate, TUNED_SEED, loss)

    best = [r for r in rows if key_of(r)[:3] != (first.name, 3.0, largest)] + [at(largest, 1.0)]
    for factor, loss in ((2, 0.5), (4, 0.4)):
        (more,) = tuning(best)
        assert more == Training(first, 3.0, factor * largest, TUNED_SEED)
        best.append(at(factor * largest, loss))
    best.append(at(8 * largest, 0.6))
    assert tuning(best) == [] and chosen_rate(best, first, 3.0) == 4 * largest
    assert chosen_rate(best, first, 1.0) == RATES[first.optimizer][1]
    assert chosen_decay(rows, next(v for v in VARIANTS if v.averaged), 1.0) == "0.9"


def test_what_is_measured_is_left_after_what_is_done() -> None:
    rows = tuned()
    wanted = measured(rows)
    assert len(wanted) == len(set(wanted)) == len(VARIANTS) * len(EPSILONS) * len(SEEDS)
    early = [training for training in wanted if not training.variant.late]
    assert wanted[: len(early)] == early and [t.seed for t in early] == sorted(t.seed for t in early)
    done = [row(t.variant, t.epsilon, t.learning_rate, t.seed, 4.0) for t in wanted[:7]]
    assert measured([*rows, *done]) == wanted[7:]
    with pytest.raises(ValueError, match="no training tunes"):
        measured([])


def test_tables_are_of_the_chosen_rate_and_of_other_seeds() -> None:
    rows, variant = tuned(), next(v for v in VARIANTS if v.averaged)
    rate = chosen_rate(rows, variant, 1.0)
    rows += [row(variant, 1.0, rate, seed, 4.0 + seed) for seed in SEEDS]
    rows.append(row(variant, 1.0, rate * 2, 0, 100.0))
    found = losses(rows)
    assert found[variant.name] == {1.0: Losses({seed: 4.0 + seed for seed in SEEDS})}
    assert found[variant.name + AVERAGED][1.0].by_seed[0] == pytest.approx(4.0 - 0.9)
    assert found[variant.name][1.0].mean == 6.0 and found[variant.name][1.0].spread == pytest.approx(2.5**0.5)
    less = difference(found[variant.name + AVERAGED][1.0], found[variant.name][1.0])
    assert less.mean == pytest.approx(-0.9) and less.spread == pytest.approx(0.0, abs=1e-9)


def test_the_page_shows_what_the_files_say() -> None:
    page = PAGE.read_text(encoding="utf-8")
    trained, exact = reports(PAGE.parent / "benchmarks")
    assert with_tables(page, trained, exact) == page, "run python tools/measure_mechanisms.py --page"
    changed = {**trained, "trainings": [{**r, "loss": r["loss"] + 1} for r in trained["trainings"]]}
    assert with_tables(page, changed, exact) != page
    with pytest.raises(ValueError, match="no place"):
        with_tables("# A page\n", trained, exact)
