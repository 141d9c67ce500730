"""Exact, without training: the noise that each mechanism leaves in the sum of its releases, at equal epsilon.

After t steps of plain SGD the weights have minus the learning rate times the sum of t releases. Of two mechanisms with
the same batches and steps, the better one has less noise in these sums.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

import dpft
from dpft.privacy import PrivacySchedule, Strategy, rms_error
from tools.mechanisms.settings import BANDS as OF_CORPUS
from tools.mechanisms.settings import BATCH, DELTA, EPSILONS, STEPS

Vector = npt.NDArray[np.float64]

EXAMPLES = 100_000
RATES, EPOCHS = (0.002, 0.01, 0.05, 0.25), (1, 4, 16)
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
    options: dict[str, dict[str, Any]] = {
        INDEPENDENT: {},
        "balls_and_bins": {"sampler": "balls_and_bins"},
        "bandmf": {"mechanism": "bandmf", "bands": number, "sampler": "cyclic_poisson"},
        "blt": {"mechanism": "blt", "buffers": number, "sampler": "fixed_order"},
    }
    config = dpft.PrivacyConfig(
        target_epsilon=epsilon,
        target_delta=DELTA,
        expected_batch_size=batch,
        num_steps=steps,
        **options[mechanism],
    )
    return noise(config.resolve(examples))


def compared(examples: int, batch: int, steps: int, epsilon: float, bands: Sequence[int]) -> dict[str, Any]:
    """Noise of each mechanism over that of DP-SGD: below 1 it has less.

    Args:
        examples: N.
        batch: b.
        steps: of the training.
        epsilon: at delta 1e-6.
        bands: that are tried for ``bandmf``, ascending, as long as the noise in the sums falls; those above N / b or
            the number of steps are left out.

    Returns:
        ``dp_sgd`` in units of the clip norm, the number of bands, and the ratios in the sums and in the last weights.
    """
    found = functools.partial(of_mechanism, examples, batch, steps, epsilon)
    in_sums, in_last = found(INDEPENDENT)
    best: tuple[int, float, float] | None = None
    for count in bands:
        if count > min(steps, examples // batch):
            break
        sums, last = found("bandmf", count)
        if best is not None and sums >= best[1]:
            break
        best = count, sums, last
    assert best is not None  # 2 bands are always possible here
    count, sums, last = best
    row: dict[str, Any] = {"epsilon": epsilon, "dp_sgd": in_sums, "bands": count}
    row |= {"bandmf": sums / in_sums, "bandmf_last": last / in_last}
    for mechanism, number in (("blt", BUFFERS), ("balls_and_bins", None)):
        sums, last = found(mechanism, number)
        row |= {mechanism: sums / in_sums, f"{mechanism}_last": last / in_last}
    return row


def grid() -> Iterator[tuple[float, int, float]]:
    """Share of the examples in a batch, epochs, epsilon."""
    return itertools.product(RATES, EPOCHS, EPSILONS)


def of_grid(rate: float, epochs: int, epsilon: float) -> dict[str, Any]:
    """One row of the grid."""
    steps = round(epochs / rate)
    found = compared(EXAMPLES, round(rate * EXAMPLES), steps, epsilon, BANDS)
    return {"rate": rate, "epochs": epochs, "steps": steps, **found}


def of_corpus(examples: int) -> list[dict[str, Any]]:
    """Of the setting that is trained, for each epsilon."""
    return [compared(examples, BATCH, STEPS, epsilon, (bands,)) for epsilon, bands in OF_CORPUS.items()]
