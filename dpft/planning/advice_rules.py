"""The rules of :func:`dpft.advise` for batch, steps and learning rate, on figures of dpft's own accountant."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from dpft.errors import AccountingError
from dpft.planning.advice_result import Setting
from dpft.privacy.config import PrivacyConfig

__all__ = ["Cost", "Settings", "learning_rate"]

# Updates without a budget. Li et al. 2022 chose the epochs of all their tasks for about as many (E2E: 10 epochs in
# batches of 1,024 of 42,000); their published scripts have 200 to 1,200.
STEPS = 400
# Fewer updates than these are not advised, however small the budget. Of 3,072 and 6,144 docstrings in all, 12 steps
# were best or within the noise of the best, 24 and 6 up to 0.07 nats worse (docs/choosing.md).
FEWEST_STEPS = 10
# Twice the batch at twice the cost has to raise the total signal-to-noise ratio by this factor.
WORTH_ITS_COST = 1.25
# Half the batch and twice the updates, at the same cost, may lower it by this factor at most.
WORTH_THE_STEPS = 1.1
# Learning rate of AdamW times sqrt(T), full fine-tuning, up to GPT-2's size. Li et al.'s scripts: 0.04 (E2E), 0.016
# (DART), 0.007 (SST-2), 0.017 (MNLI); dpft's own recipe: 0.024.
RATE = 0.02
# At 6 to 24 steps 0.005 was better than half and twice as much (docs/choosing.md).
HIGHEST_RATE = 0.005
# LoRA's learning rate over that of full fine-tuning: the best of four in docs/choosing.md, at alpha / r = 4. The ten
# of Schulman et al. 2025, "LoRA Without Regret", which is without privacy, diverged there.
LORA_FACTOR = 2.0
# Above this size learning rates fall with the cube root of the parameters, as in Brown et al. 2020, Table 2.1.
SMALL_MODEL = 124e6


@dataclass(frozen=True)
class Cost:
    """What an example costs.

    Attributes:
        tokens: of an example.
        flops: forward and backward of an example.
        seconds: of so many examples, in physical batches; None: not known.
    """

    tokens: int
    flops: float
    seconds: Callable[[int], float] | None = None


@functools.lru_cache(maxsize=1024)
def _resolved(examples: int, epsilon: float, delta: float, batch: int, steps: int) -> tuple[float, float] | None:
    """Noise multiplier and epsilon; None where the accountant refuses the setting."""
    config = PrivacyConfig(
        target_epsilon=epsilon, target_delta=delta, expected_batch_size=batch, num_steps=steps
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            schedule = config.resolve(examples)
        except AccountingError:
            return None
    return schedule.noise_multiplier, schedule.epsilon


class Settings:
    """Batches and steps on a dataset, with their noise.

    Args:
        examples: N.
        epsilon: the budget.
        delta: its delta.
        clip_norm: C.
        trainable: d; None: not known, and then ``noise_length`` is NaN.
        cost: of an example.
        progress: called with the number of settings calibrated so far.
    """

    def __init__(
        self,
        examples: int,
        epsilon: float,
        delta: float,
        clip_norm: float,
        trainable: int | None,
        cost: Cost,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.examples, self.epsilon, self.delta = examples, epsilon, delta
        self.clip_norm, self.trainable, self.cost = clip_norm, trainable, cost
        self.progress, self._known = progress, set[tuple[int, int]]()
        whole = self._calibrated(examples, 1)
        if whole is None:
            raise AccountingError(
                f"epsilon {epsilon:g} at delta {delta:g} asks for next to no noise even in one update on all "
                f"{examples:,} examples: it protects nothing; lower target_epsilon."
            )
        self.most = examples / whole[0]

    def _calibrated(self, batch: int, steps: int) -> tuple[float, float] | None:
        found = _resolved(self.examples, self.epsilon, self.delta, batch, steps)
        if (batch, steps) not in self._known:
            self._known.add((batch, steps))
            if self.progress is not None:
                self.progress(len(self._known))
        return found

    def at(self, batch: int, steps: int) -> Setting | None:
        """One setting; None where it does not exist, or the accountant refuses it."""
        if not 1 <= batch <= self.examples or steps < 1:
            return None
        found = self._calibrated(batch, steps)
        if found is None:
            return None
        sigma, epsilon = found
        ratio = batch * math.sqrt(steps) / sigma
        seconds = self.cost.seconds
        return Setting(
            batch=batch,
            steps=steps,
            noise_multiplier=sigma,
            epsilon=epsilon,
            sample_rate=batch / self.examples,
            epochs=batch * steps / self.examples,
            noise=sigma * self.clip_norm / batch,
            noise_length=math.nan if self.trainable is None else sigma * math.sqrt(self.trainable) / batch,
            signal_to_noise=ratio,
            share=ratio / self.most,
            tokens=batch * steps * self.cost.tokens,
            flops=batch * steps * self.cost.flops,
            seconds=None if seconds is None else steps * seconds(batch),
        )

    def _gain(self, batch: int, steps: int, of: tuple[int, int]) -> float:
        """Total signal-to-noise ratio of a setting over that of another one; infinite where that is refused."""
        one, other = self.at(batch, steps), self.at(*of)
        if one is None:
            return 0.0
        return math.inf if other is None else one.signal_to_noise / other.signal_to_noise

    def unlimited(self) -> tuple[int, int]:
        """Batch and steps without a budget: the smallest batch of which twice as much is not worth its cost."""
        batch = self._largest()
        while batch > 1 and self._gain(batch, STEPS, (batch // 2, STEPS)) < WORTH_ITS_COST:
            batch //= 2
        return batch, STEPS

    def within(self, most: float) -> tuple[int, int]:
        """Batch and steps of ``most`` examples in all.

        Noise accounting favours few large batches, and optimisation many updates. So: the largest batch that leaves
        ``FEWEST_STEPS``, and from there more steps while they cost little of the signal-to-noise ratio.

        Raises:
            ValueError: not even ``FEWEST_STEPS`` of one example.
        """
        if most < FEWEST_STEPS:
            raise ValueError(
                f"the budget is of {most:.3g} examples in all; expected at least {FEWEST_STEPS}, one for each update. "
                "Raise token_budget or seconds."
            )
        batch = min(self._largest(), _power_of_two(most / FEWEST_STEPS))
        while batch > 1:
            now, half = (batch, int(most / batch)), (batch // 2, int(most / (batch // 2)))
            if self._gain(*now, half) > WORTH_THE_STEPS:
                break
            batch //= 2
        return batch, int(most / batch)

    def _largest(self) -> int:
        """Half of the examples, as a power of two."""
        return _power_of_two(self.examples / 2)


def _power_of_two(most: float) -> int:
    return 1 << max(0, math.floor(math.log2(max(1.0, most))))


def learning_rate(steps: int, parameters: int, lora: bool) -> float:
    """Peak learning rate of AdamW.

    AdamW divides an update by the root of its mean square, which is that of the noise where noise dominates. T updates
    of rate eta then move a parameter by a random walk of eta sqrt(T), and along the gradient by eta T times a
    signal-to-noise ratio that, at a given epsilon, falls as 1 / sqrt(T) where ``share`` is near 1. Both go as eta
    sqrt(T), so this is kept constant.
    """
    size = min(1.0, (SMALL_MODEL / parameters) ** (1 / 3))
    return min(HIGHEST_RATE, RATE / math.sqrt(steps)) * size * (LORA_FACTOR if lora else 1.0)
