"""What a white-box audit observed, and what follows from it: estimates, tests, a lower bound of epsilon."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpft.audit.sampling import sampling_checks, turn_of
from dpft.audit.statistics import (
    CONFIDENCE,
    FALSE_ALARM,
    Check,
    Samples,
    correlation_p_value,
    gaussian_mu_lower,
    normal_p_value,
    normality_p_value,
    proportion_bounds,
    variance_p_value,
)
from dpft.privacy import PrivacySchedule, epsilon

_LAW_SAMPLES = 20_000


class Observations:
    """Sums over the observed releases, in units of the claimed noise: in each coordinate it is N(0, 1).

    Args:
        schedule: what is claimed, with the number of steps of the audit.
        examples: N.
        parameters: elements of each trainable parameter, and of what else is released, in the order of a release.
        kept: coordinates whose residuals are kept.
    """

    def __init__(
        self, schedule: PrivacySchedule, examples: int, parameters: dict[str, int], kept: npt.NDArray[np.int64]
    ) -> None:
        self.schedule, self.examples, self.parameters = schedule, examples, parameters
        self._kept = torch.from_numpy(kept)
        self.segments: list[list[set[int]]] = []
        self.step_squares: list[float] = []
        self.parameter_squares = torch.zeros(len(parameters), dtype=torch.float64)
        self.sum = torch.zeros(sum(parameters.values()), dtype=torch.float64)
        self.rows: list[Samples] = []
        self.along_signal = self.signal = 0.0
        self.score_variances: list[float] = []  # of the claimed noise
        self.members: list[float] = []
        self.others: list[float] = []
        self.vote_members: list[float] = []
        self.vote_others: list[float] = []

    @property
    def steps(self) -> int:
        """Releases observed so far."""
        return len(self.step_squares)

    def start(self) -> None:
        """The run starts, or starts again."""
        self.segments.append([])

    def add(
        self,
        drawn: set[int],
        release: Tensor,
        total: Tensor,
        directions: dict[int, Tensor],
        vote: tuple[int, float] | None = None,
    ) -> None:
        """One release.

        Args:
            drawn: the examples in it.
            release: float64 ``[d]``.
            total: float64 ``[d]``, the sum of the contributions of ``drawn``.
            directions: of each canary, float64 ``[d]``; what it contributes in its direction is 1.
            vote: a canary, a different one each time, and what it adds to the last coordinate if it is drawn.
        """
        residual = release - total
        squares = residual.square()
        self.segments[-1].append(drawn)
        self.step_squares.append(float(squares.sum()))
        parts = squares.split(list(self.parameters.values()))
        self.parameter_squares += torch.stack([part.sum() for part in parts])
        self.sum += residual
        self.rows.append(residual[self._kept].numpy())
        self.along_signal += float(residual @ total)
        self.signal += float(total @ total)
        for index, direction in directions.items():
            self.score_variances.append(float(direction @ direction))
            score = float(residual @ direction) + (index in drawn)
            (self.members if index in drawn else self.others).append(score)
        if vote is not None:
            index, adds = vote
            score = float(residual[-1]) / adds + (index in drawn)
            (self.vote_members if index in drawn else self.vote_others).append(score)


@dataclass(frozen=True)
class WhiteBoxAudit:
    """The result of :func:`dpft.audit.white_box`.

    Attributes:
        claimed: noise multiplier, clip norm, sample rate, steps, delta and epsilon of the audited releases.
        measured: the same constants as recovered from the releases, without having been told them.
        epsilon_lower: what the attack proves at 95 % confidence: no mechanism with less epsilon allows it.
        epsilon_lower_sure: the same at 99.99 %, for the verdict.
        checks: the tests, with p-values.
        members: scores of canaries in releases that they were drawn for; 1 is expected. They depend on the data.
        others: scores in the others; 0 is expected. They depend on the data.
        score_deviation: what the claimed noise adds to a score, as a root mean square over the canaries.
    """

    claimed: dict[str, float]
    measured: dict[str, float]
    epsilon_lower: float
    epsilon_lower_sure: float
    checks: tuple[Check, ...]
    members: tuple[float, ...] = field(repr=False)
    others: tuple[float, ...] = field(repr=False)
    score_deviation: float

    @property
    def failed(self) -> tuple[Check, ...]:
        """The tests that a sound mechanism passes, all of them together, but once in 10,000 audits."""
        return tuple(check for check in self.checks if check.p_value < FALSE_ALARM / len(self.checks))

    @property
    def violated(self) -> bool:
        """Whether what is claimed is refuted."""
        return bool(self.failed) or self.epsilon_lower_sure > self.claimed["epsilon"]

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        values = dataclasses.asdict(self)
        values["failed"] = [check.name for check in self.failed]
        return {"violated": self.violated, **values, "scores_depend_on_the_data": True}

    def describe(self) -> str:
        """A summary in several lines."""
        claimed, measured = self.claimed, self.measured
        lines = [
            f"claimed            epsilon {claimed['epsilon']:.4g} at delta {claimed['delta']:g} after "
            f"{claimed['steps']:g} releases",
            f"audited            epsilon at least {self.epsilon_lower:.4g} (95 % confidence), from "
            f"{len(self.members)} scores of members and {len(self.others)} of others",
        ]
        for name in ("noise_multiplier", "max_grad_norm", "sample_rate"):
            off = measured[name] / claimed[name] - 1.0
            title = name.replace("_", " ")
            lines.append(f"{title:<18} {claimed[name]:.5g} claimed, {measured[name]:.5g} measured ({off:+.2%})")
        for check in self.checks:
            verdict = "FAILED" if check in self.failed else "passed"
            lines.append(
                f"{verdict:<18} {check.name}: {check.found:.5g} found, {check.expected:.5g} expected, "
                f"p = {check.p_value:.2g}"
            )
        lines.append("VIOLATED: the mechanism is not the claimed one" if self.violated else "nothing found")
        return "\n".join(lines)


def evaluate(seen: Observations) -> WhiteBoxAudit:
    """Estimates, tests and the bound of epsilon, from what was observed."""
    schedule = seen.schedule
    steps, width = seen.steps, sum(seen.parameters.values())
    draws = sum(len(batch) for part in seen.segments for batch in part)
    scale = math.sqrt(sum(seen.step_squares) / (steps * width))
    slope = 1.0 + seen.along_signal / seen.signal if seen.signal else math.nan
    claimed = {
        "epsilon": schedule.epsilon,
        "delta": schedule.target_delta,
        "steps": float(steps),
        "noise_multiplier": schedule.noise_multiplier,
        "max_grad_norm": schedule.max_grad_norm,
        "sample_rate": schedule.sample_rate / turn_of(schedule),
    }
    measured = {
        "noise_multiplier": scale * schedule.noise_multiplier,
        "max_grad_norm": slope * schedule.max_grad_norm,
        "sample_rate": draws / (steps * seen.examples),
    }
    inside, outside = np.array(seen.members), np.array(seen.others)
    return WhiteBoxAudit(
        claimed=claimed,
        measured=measured,
        epsilon_lower=_epsilon_lower(seen, inside, outside, draws, CONFIDENCE),
        epsilon_lower_sure=_epsilon_lower(seen, inside, outside, draws, 1.0 - FALSE_ALARM),
        checks=(*_noise_checks(seen, scale), *sampling_checks(seen.segments, schedule, seen.examples)),
        members=tuple(inside.tolist()),
        others=tuple(outside.tolist()),
        score_deviation=math.sqrt(float(np.mean(seen.score_variances or [0.0]))),
    )


def _noise_checks(seen: Observations, scale: float) -> list[Check]:
    """Whether what remains of the releases is the claimed noise."""
    steps, width, sigma = seen.steps, sum(seen.parameters.values()), seen.schedule.noise_multiplier
    bound = seen.schedule.max_grad_norm
    by_step = [variance_p_value(squares, width) for squares in seen.step_squares]
    worst = int(np.argmax([abs(math.log(max(s, 1e-300) / width)) for s in seen.step_squares]))
    sizes = list(seen.parameters.values())
    by_parameter = [variance_p_value(float(s), steps * n) for s, n in zip(seen.parameter_squares, sizes, strict=True)]
    name, size, squares = min(
        zip(seen.parameters, sizes, seen.parameter_squares.tolist(), strict=True),
        key=lambda row: variance_p_value(row[2], steps * row[1]),
    )
    rows = np.stack(seen.rows)
    law = rows[:, : max(1, _LAW_SAMPLES // steps)].ravel()
    distance, law_p = normality_p_value(law)
    correlation, correlation_p = correlation_p_value(rows)
    slope = seen.along_signal / seen.signal if seen.signal else 0.0
    z = seen.along_signal / math.sqrt(seen.signal) if seen.signal else 0.0
    constant = float(seen.sum.square().sum()) / steps
    return [
        Check(
            "noise multiplier",
            "the noise has the claimed standard deviation",
            sigma,
            scale * sigma,
            variance_p_value(sum(seen.step_squares), steps * width),
        ),
        Check(
            "noise of each release",
            "the standard deviation is the same in every release",
            sigma,
            sigma * math.sqrt(seen.step_squares[worst] / width),
            min(1.0, min(by_step) * steps),
        ),
        Check(
            f"noise of each parameter ({name})",
            "the standard deviation is the same in every parameter",
            sigma,
            sigma * math.sqrt(squares / (steps * size)),
            min(1.0, min(by_parameter) * len(by_parameter)),
        ),
        Check("law of the noise", "the noise is Gaussian", 0.0, distance, law_p),
        Check("repeated noise", "the noises of two releases are independent", 0.0, correlation, correlation_p),
        Check(
            "clip norm",
            "each drawn example contributes its clipped gradient, once",
            bound,
            bound * (1.0 + slope),
            normal_p_value(z),
        ),
        Check(
            "nothing else",
            "no constant is added to the releases",
            1.0,
            math.sqrt(constant / width),
            variance_p_value(constant, width),
        ),
    ]


def _epsilon_lower(seen: Observations, inside: Samples, outside: Samples, draws: int, confidence: float) -> float:
    """Epsilon of the observed releases if one leaks as much as was seen to leak, and no more."""
    schedule, steps = seen.schedule, seen.steps
    each = 1.0 - (1.0 - confidence) / 2.0  # one half for mu, one for the sample rate
    if seen.vote_members or seen.vote_others:
        half = 1.0 - (1.0 - each) / 2.0  # whole releases, or the vote alone: whichever proves more
        votes = gaussian_mu_lower(np.array(seen.vote_others), np.array(seen.vote_members), half)
        mu = max(votes, gaussian_mu_lower(outside, inside, half))
    else:
        mu = gaussian_mu_lower(outside, inside, each)
    if schedule.sampler == "fixed_order":  # one release of all steps: an example is in several, which add up
        mu *= math.sqrt(schedule.mechanism.strategy.participations)  # type: ignore[union-attr]  # it has one
    # The accountant has no use for less noise than this; a smaller mu is a bound, too.
    mu = min(mu, max(5.0, 2.0 / schedule.noise_multiplier))
    if mu <= 0.0:
        return 0.0
    mechanism = schedule.mechanism.with_noise(1.0 / mu)
    if schedule.sampler == "poisson":
        rate = proportion_bounds(draws, steps * seen.examples, each)[0]
        mechanism = dataclasses.replace(mechanism, sample_rate=max(rate, 1e-12))
    return epsilon(mechanism, steps, schedule.target_delta, accountant=schedule.accountant)
