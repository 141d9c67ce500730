"""Exact, without training: the noise that each mechanism leaves in the sum of its releases, at equal epsilon.

After t steps of plain SGD the weights have minus the learning rate times the sum of t releases. Of two mechanisms with
the same batches and steps, the better one has less noise in these sums.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

import dpft
from dpft.privacy import PrivacySchedule, Strategy, rms_error

Vector = npt.NDArray[np.float64]

EXAMPLES, DELTA = 100_000, 1e-6
RATES, EPOCHS, EPSILONS = (0.002, 0.01, 0.05, 0.25), (1, 4, 16), (1.0, 3.0, 8.0)
BANDS, BUFFERS = (2, 4, 8, 16, 32, 64), 4
INDEPENDENT = "dp_sgd"


def cosine(steps: int) -> Vector:
    """Learning rates of a cosine to 0, the first of which is 1, float64 ``[steps]``."""
    return np.asarray(0.5 * (1 + np.cos(np.pi * np.arange(steps) / steps)))


def last_error(strategy: Strategy | None, rates: Vector) -> float:
    """Standard deviation of the noise in the last weights of plain SGD, by learning rates.

    Args:
        strategy: of correlated noise; None: independent.
        rates: of the steps, float64 ``[steps]``.

    Returns:
        In units of noise multiplier times clip norm, and of the learning rate that is 1.
    """
    if strategy is None:
        return float(np.linalg.norm(rates))
    # The noise is C^{-1} z, so that the sum of rates times noise is (C^{-T} rates) z.
    steps, c = len(rates), strategy.coefficients()
    factors = np.zeros(steps)
    for t in reversed(range(steps)):
        factors[t] = rates[t] - c[1 : steps - t] @ factors[t + 1 :]
    return float(np.linalg.norm(factors) * strategy.scale)


def noise(schedule: PrivacySchedule) -> tuple[float, float]:
    """In the sums of the releases, root mean square over the steps, and in the last weights under a cosine."""
    steps, strategy = schedule.num_steps, schedule.strategy
    error = math.sqrt((steps + 1) / 2) if strategy is None else rms_error(strategy)
    sigma = schedule.noise_multiplier
    return sigma * error, sigma * last_error(strategy, cosine(steps))


@functools.cache
def of_mechanism(
    examples: int, batch: int, steps: int, epsilon: float, mechanism: str, number: int | None = None
) -> tuple[float, float]:
    """:func:`noise` of a mechanism that spends ``epsilon``.

    Args:
        examples: N.
        batch: b.
        steps: of the training.
        epsilon: at delta 1e-6.
        mechanism: ``dp_sgd``, ``balls_and_bins``, ``bandmf`` or ``blt``.
        number: of bands or buffers.
    """
    chosen: dict[str, Any] = {
        INDEPENDENT: {},
        "balls_and_bins": {"sampler": "balls_and_bins"},
        "bandmf": {"mechanism": "bandmf", "bands": number, "sampler": "cyclic_poisson"},
        "blt": {"mechanism": "blt", "buffers": number, "sampler": "fixed_order"},
    }[mechanism]
    config = dpft.PrivacyConfig(
        target_epsilon=epsilon, target_delta=DELTA, expected_batch_size=batch, num_steps=steps, **chosen
    )
    return noise(config.resolve(examples))


def compared(examples: int, batch: int, steps: int, epsilon: float, bands: Sequence[int]) -> dict[str, Any]:
    """Noise of each mechanism over that of DP-SGD; below 1 it has less.

    Args:
        examples: N.
        batch: b.
        steps: of the training.
        epsilon: at delta 1e-6.
        bands: that are tried for ``bandmf``; those above N / b or the number of steps are left out.
    """
    in_sums, in_last = of_mechanism(examples, batch, steps, epsilon, INDEPENDENT)
    row: dict[str, Any] = {"epsilon": epsilon, "dp_sgd_in_sums": in_sums, "dp_sgd_in_last": in_last}
    possible = [count for count in bands if count <= min(steps, examples // batch)]
    tried = {count: of_mechanism(examples, batch, steps, epsilon, "bandmf", count) for count in possible}
    row["bandmf"] = [
        {"bands": count, "in_sums": sums / in_sums, "in_last": last / in_last} for count, (sums, last) in tried.items()
    ]
    for mechanism, number in (("blt", BUFFERS), ("balls_and_bins", None)):
        sums, last = of_mechanism(examples, batch, steps, epsilon, mechanism, number)
        row[mechanism] = {"in_sums": sums / in_sums, "in_last": last / in_last}
    return row


def grid() -> Iterator[dict[str, Any]]:
    """By share of the examples in a batch, epochs and epsilon."""
    for rate in RATES:
        batch = round(rate * EXAMPLES)
        for epochs in EPOCHS:
            steps = round(epochs / rate)
            for epsilon in EPSILONS:
                found = compared(EXAMPLES, batch, steps, epsilon, BANDS)
                yield {"rate": rate, "epochs": epochs, "steps": steps, **found}
