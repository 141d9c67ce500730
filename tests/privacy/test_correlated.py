"""Strategy matrices against dense matrices, brute force over all participations, and published values."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from dpft.errors import AccountingError, PrivacyConfigError
from dpft.privacy.correlated.optimum import (
    best_banded,
    best_blt,
    max_error,
    noise_coefficients,
    rms_error,
    square_root_coefficients,
    squared_errors,
)
from dpft.privacy.correlated.strategy import Strategy, toeplitz_sensitivity


def banded(n: int, weights: tuple[float, ...], b: int | None = None) -> Strategy:
    return Strategy(kind="bandmf", steps=n, min_separation=b or len(weights), weights=weights)


def blt(n: int, b: int, weights: tuple[float, ...], decays: tuple[float, ...]) -> Strategy:
    return Strategy(kind="blt", steps=n, min_separation=b, weights=weights, decays=decays)


SMALL = [
    banded(7, (1.0,)),
    banded(7, (1.0, 0.6)),
    banded(7, (1.0, -0.6, 0.3)),  # bands do not overlap, whatever their signs
    banded(7, (1.0, 0.5, 0.9, 0.2), b=5),
    banded(3, (1.0, 0.5, 0.4, 0.3)),  # more bands than steps
    blt(7, 1, (0.5,), (0.9,)),
    blt(7, 2, (0.3, 0.2), (0.95, 0.4)),
    blt(7, 3, (0.1, 0.3, 0.6), (0.999, 0.7, 0.0)),  # c_1 = 1, and a buffer without memory
    blt(7, 7, (0.2,), (0.5,)),
    blt(1, 4, (0.2,), (0.5,)),
]


def dense(strategy: Strategy) -> np.ndarray:
    """C, from its definition, entry by entry."""
    n = strategy.steps
    matrix = np.zeros((n, n))
    for row, column in itertools.product(range(n), repeat=2):
        j = row - column
        if j == 0:
            matrix[row, column] = 1.0
        elif j > 0 and strategy.kind == "bandmf":
            matrix[row, column] = strategy.weights[j] if j < len(strategy.weights) else 0.0
        elif j > 0:
            pairs = zip(strategy.weights, strategy.decays, strict=True)
            matrix[row, column] = sum(weight * decay ** (j - 1) for weight, decay in pairs)
    return matrix


def participations(n: int, b: int) -> Iterator[list[int]]:
    """Every set of steps that are at least b apart."""
    for bits in itertools.product((0, 1), repeat=n):
        steps = [step for step, bit in enumerate(bits) if bit]
        if all(after - before >= b for before, after in itertools.pairwise(steps)):
            yield steps


def brute_force(matrix: np.ndarray, b: int) -> float:
    """The most by which changes of norm 1 in some steps, in one dimension, change C x."""
    return max(
        float(np.linalg.norm(matrix[:, steps] @ np.array(signs)))
        for steps in participations(len(matrix), b)
        for signs in itertools.product((1.0, -1.0), repeat=len(steps))
    )


@pytest.mark.parametrize("strategy", SMALL, ids=str)
def test_coefficients_inverse_and_errors_are_those_of_the_dense_matrix(strategy: Strategy) -> None:
    matrix, n = dense(strategy), strategy.steps
    np.testing.assert_allclose(strategy.coefficients(), matrix[:, 0], rtol=1e-13)
    inverse = np.linalg.inv(matrix)
    np.testing.assert_allclose(noise_coefficients(strategy), inverse[:, 0], atol=1e-12)
    errors = (np.linalg.norm(np.tri(n) @ inverse, axis=1) * strategy.scale) ** 2
    np.testing.assert_allclose(squared_errors(strategy), errors, rtol=1e-11)
    assert rms_error(strategy) == pytest.approx(np.sqrt(errors.mean()))
    assert max_error(strategy) == pytest.approx(np.sqrt(errors.max()))


@pytest.mark.parametrize("strategy", SMALL, ids=str)
def test_sensitivity_is_that_of_the_worst_participation(strategy: Strategy) -> None:
    matrix = dense(strategy)
    for steps in range(1, strategy.steps + 1):
        worst = brute_force(matrix[:steps, :steps], strategy.min_separation)
        assert strategy.sensitivity(steps) == pytest.approx(worst, rel=1e-12)
        assert strategy.participations_within(steps) == max(
            map(len, participations(steps, strategy.min_separation)), default=0
        )
    assert strategy.sensitivity(0) == 0.0
    assert strategy.column_norm == pytest.approx(np.linalg.norm(matrix, axis=0).max())


def test_changes_in_several_dimensions_are_no_worse_than_parallel_ones() -> None:
    """The changes are vectors; C >= 0 makes parallel ones the worst. With a negative entry they would not be."""
    rng = np.random.default_rng(1)
    strategy = SMALL[6]
    matrix, bound = dense(strategy), strategy.sensitivity()
    for steps in participations(strategy.steps, strategy.min_separation):
        for _ in range(20):
            changes = rng.normal(size=(len(steps), 3))
            changes /= np.linalg.norm(changes, axis=1, keepdims=True)
            assert np.linalg.norm(matrix[:, steps] @ changes) <= bound * (1 + 1e-12)


@pytest.mark.parametrize("coefficients", [[1.0, 0.2, 0.3], [1.0, 0.2, -0.1]])
def test_no_sensitivity_without_the_conditions_of_its_theorem(coefficients: list[float]) -> None:
    with pytest.raises(AccountingError, match="negative or increase"):
        toeplitz_sensitivity(np.array(coefficients), 2)
    assert toeplitz_sensitivity(np.array(coefficients), 3) == pytest.approx(np.linalg.norm(coefficients))


def test_conditions_are_necessary() -> None:
    """Coefficients that increase: steps 0, b, 2 b are not the worst, so the formula would be too small."""
    c = np.array([1.0, 0.0, 0.0, 1.0])
    matrix = np.array([[c[i - j] if i >= j else 0.0 for j in range(4)] for i in range(4)])
    assert np.linalg.norm(matrix[:, [0, 2]].sum(1)) == pytest.approx(3**0.5)
    assert brute_force(matrix, 2) == pytest.approx(5**0.5)  # steps 0 and 3


def test_more_steps_than_planned_are_refused() -> None:
    with pytest.raises(AccountingError, match="8 steps with correlated noise that was made for 7"):
        SMALL[5].sensitivity(8)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "tree"},
        {"steps": 0},
        {"min_separation": True},
        {"weights": (1.0, 0.5, 0.2)},  # more bands than the separation
        {"weights": (0.9,)},
        {"weights": ()},
        {"weights": (1.0, float("nan"))},
        {"decays": (0.5,)},
        {"kind": "blt", "weights": (0.5, 0.6), "decays": (0.5, 0.6)},
        {"kind": "blt", "weights": (-0.1,), "decays": (0.5,)},
        {"kind": "blt", "weights": (0.1,), "decays": (1.0,)},
        {"kind": "blt", "weights": (0.1,), "decays": (-0.1,)},
        {"kind": "blt", "weights": (0.1,), "decays": ()},
        {"kind": "blt", "weights": (), "decays": ()},
    ],
    ids=str,
)
def test_parameters_without_a_known_sensitivity_are_refused(wrong: dict[str, Any]) -> None:
    right: dict[str, Any] = {"kind": "bandmf", "steps": 4, "min_separation": 2, "weights": (1.0, 0.5)}
    with pytest.raises(PrivacyConfigError, match="expected"):
        Strategy(**{**right, **wrong})


def test_as_data() -> None:
    for strategy in SMALL:
        assert Strategy.from_dict(json.loads(json.dumps(strategy.to_dict()))) == strategy
    with pytest.raises(PrivacyConfigError, match="not a strategy"):
        Strategy.from_dict({"kind": "bandmf"})


def test_square_root() -> None:
    c = square_root_coefficients(30)
    root = np.array([[c[i - j] if i >= j else 0.0 for j in range(30)] for i in range(30)])
    np.testing.assert_allclose(root @ root, np.tri(30), atol=1e-12)


def test_banded_optimum_is_one() -> None:
    """No change of a coefficient lowers the error, and no other strategy tried has less."""
    best = best_banded(50, 5)
    for j, change in itertools.product(range(1, 5), (-0.01, 0.01)):
        weights = tuple(w + change * (i == j) for i, w in enumerate(best.weights))
        assert rms_error(banded(50, weights)) > rms_error(best)
    assert rms_error(banded(50, tuple(square_root_coefficients(5)))) > rms_error(best)
    errors = [rms_error(best_banded(50, bands)) for bands in (1, 2, 5, 10, 50)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == pytest.approx(np.sqrt(51 / 2))  # independent noise
    # No factorisation, Toeplitz or not, is below the nuclear norm of the workload over n.
    least = np.linalg.norm(np.tri(50), "nuc") / 50
    assert least < errors[-1] < 1.08 * least  # measured: 1.070
    assert errors[-1] < rms_error(banded(50, tuple(square_root_coefficients(50))))


def test_many_bands_are_optimised_without_a_warning() -> None:
    """The line search tries coefficients with which the noise overflows; warnings are errors here."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        errors = [rms_error(best_banded(1000, bands)) for bands in (50, 100, 200, 1000)]
    assert errors == sorted(errors, reverse=True)
    # With all bands, a BLT is a special case, and comes near: two optimisations that share nothing.
    assert errors[-1] < rms_error(best_blt(1000, 1000, 4)) < 1.001 * errors[-1]


def test_banded_gradient_is_followed_to_the_optimum_that_a_search_without_it_finds() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    found = optimize.minimize(
        lambda free: rms_error(banded(20, (1.0, *map(float, free)))), [0.5, 0.4], method="Nelder-Mead"
    )
    assert rms_error(best_banded(20, 3)) == pytest.approx(found.fun, rel=1e-6)


@pytest.mark.parametrize(("n", "buffers", "above"), [(10, 1, 1.04), (100, 2, 1.03), (1000, 3, 1.03)])
def test_blt_is_as_near_to_the_lower_bound_as_published(n: int, buffers: int, above: float) -> None:
    """The limits are those of jax_privacy's tests, above 1 + ln(n) / pi (arXiv 2404.16706, Equation 2.8)."""
    assert max_error(best_blt(n, n, buffers, "max")) <= above * (1 + np.log(n) / np.pi)


def test_blt_error_of_published_parameters() -> None:
    """jax_privacy's golden optimum for n = 100,000, one participation, two buffers: no neighbour has less error."""
    weights, decays = (0.0122853238, 0.1878393665), (0.9999528892, 0.9857068667)
    golden = max_error(blt(100_000, 100_000, weights, decays))
    for at, change in itertools.product(range(4), (0.99, 1.01)):
        moved = [*weights, *(1 - decay for decay in decays)]
        moved[at] *= change
        assert max_error(blt(100_000, 100_000, tuple(moved[:2]), tuple(1 - m for m in moved[2:]))) > golden


@pytest.mark.slow
def test_blt_optimum_is_the_published_one() -> None:
    best = best_blt(100_000, 100_000, 2, "max")
    np.testing.assert_allclose(best.weights, [0.0122853238, 0.1878393665], rtol=1e-3)
    np.testing.assert_allclose(1 - np.array(best.decays), [1 - 0.9999528892, 1 - 0.9857068667], rtol=1e-3)


def test_blt_of_several_participations() -> None:
    best = best_blt(200, 20, 2)
    independent = np.sqrt(best.participations * 201 / 2)
    assert rms_error(best) < 0.5 * independent
    assert best.sensitivity() == pytest.approx(np.linalg.norm(dense(best)[:, ::20].sum(1)))
    alone = best_blt(200, 200, 2)  # made for one participation, and used with ten
    assert rms_error(best) < 0.9 * rms_error(blt(200, 20, alone.weights, alone.decays))


def test_blt_where_an_example_may_be_in_every_step_is_independent_noise() -> None:
    """jax_privacy's hard case: nothing is better than the identity there, and nothing as good is far from it."""
    assert rms_error(best_blt(16, 1, 2)) == pytest.approx(np.sqrt(16 * 17 / 2), rel=1e-4)


@pytest.mark.parametrize(("find", "numbers"), [(best_banded, (40, 5)), (best_blt, (60, 20, 3))])
def test_noise_in_float32_is_that_of_the_accounted_matrix(find: Any, numbers: tuple[int, ...]) -> None:
    """Not of its rounding: a decay rounded up, over 10,000 steps, is a larger sensitivity than the accounted one."""
    best = find(*numbers)
    for value in (*best.weights, *best.decays):
        assert float(np.float32(value)) == value
    assert all(decay < 1 for decay in best.decays)


def test_what_is_asked_for_is_possible() -> None:
    for bands in (0, 11):
        with pytest.raises(PrivacyConfigError, match="bands="):
            best_banded(10, bands)
    for buffers in (0, 11):
        with pytest.raises(PrivacyConfigError, match="buffers="):
            best_blt(10, 2, buffers)
