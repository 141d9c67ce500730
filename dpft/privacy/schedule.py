"""A privacy configuration resolved on a dataset: every constant, and the epsilon before the first step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpft.errors import MissingPackageError, PrivacyConfigError
from dpft.privacy.accounting.accountant import Event, discretization, epsilon, rounded_up
from dpft.privacy.accounting.epsilon_meter import EpsilonMeter
from dpft.privacy.adaptive_clip import AdaptiveClip
from dpft.privacy.correlated.optimum import rms_error
from dpft.privacy.correlated.strategy import Strategy
from dpft.privacy.mechanism import RATED, WITHOUT_N, AccountantName, Mechanism, SamplerName, UnitName


@dataclass(frozen=True, kw_only=True)
class PrivacySchedule:
    """A resolved :class:`~dpft.privacy.config.PrivacyConfig`. Create it with ``config.resolve(len(dataset))``.

    The optimiser adds noise of standard deviation ``sum_noise_multiplier * max_grad_norm`` to the clipped sum, once
    per logical batch, and divides by ``expected_batch_size``. With a ``strategy`` the noise is correlated over the
    steps: ``C^{-1} z``, with independent z of standard deviation ``noise_multiplier * max_grad_norm *
    strategy.scale``.

    Attributes:
        noise_multiplier: sigma, given or calibrated; 0 means not private.
        sample_rate: probability of each example (``cyclic_poisson``: of each one of the step's group; without a rate:
            batch size / N, for information only).
        num_steps: number of logical batches, and so of releases.
        expected_batch_size: the constant divisor b.
        max_grad_norm: the clip norm C; with ``adaptive_clip`` that of the first release.
        target_delta: delta.
        target_epsilon: the budget; None where the noise was given.
        computed_epsilon: what :attr:`epsilon` returns; None where it could not be computed when the configuration was
            resolved, because ``noise_multiplier`` was given and the accountant's packages are not installed.
        dataset_size: N where the configuration treats it as public; else None, and N is stored nowhere.
        assumptions: of the epsilon, in words.
        config_fingerprint: of the configuration that this schedule came from.
        item: what an example is, in words, where it is not one record.
        clip_groups: which parameters are clipped apart; None: all together.
        adaptive_clip: how the clip norm follows the gradients; None: it is constant.
        strategy: of correlated noise; None: the noise of each step is independent of the others.
    """

    noise_multiplier: float
    sample_rate: float
    num_steps: int
    expected_batch_size: int | float
    max_grad_norm: float
    target_delta: float
    target_epsilon: float | None
    computed_epsilon: float | None
    sampler: SamplerName
    max_batch_size: int | None
    clip_function: str
    clip_gamma: float
    accountant: AccountantName
    secure_rng: bool
    unit: UnitName
    examples_per_user: int | None
    dataset_size: int | None
    assumptions: tuple[str, ...]
    config_fingerprint: str
    item: str | None = None
    strategy: Strategy | None = None
    adaptive_clip: AdaptiveClip | None = None
    clip_groups: Any = None

    @property
    def sum_noise_multiplier(self) -> float:
        """Standard deviation of the noise on the clipped sum, over its clip norm.

        It is ``noise_multiplier``, which is what the accountant composes; or more, where a count has a part of it.
        """
        if self.adaptive_clip is None:
            return self.noise_multiplier
        return self.adaptive_clip.sum_noise_multiplier(self.noise_multiplier, self.expected_batch_size)

    @property
    def count_noise(self) -> float | None:
        """Standard deviation of the noise on the count of clipped examples; None without ``adaptive_clip``."""
        if self.adaptive_clip is None:
            return None
        return self.adaptive_clip.count_std(self.noise_multiplier, self.expected_batch_size)

    @property
    def noise_in_sums(self) -> float:
        """Root mean square, over t, of the noise in the sum of the first t releases, on one coordinate.

        In units of the clip norm (the first one, where it adapts). It is what is in the weights after t steps of plain
        SGD, and compares mechanisms; with momentum, Adam or a rate that falls it is a guide and no measure.
        """
        if self.strategy is not None:
            return self.noise_multiplier * rms_error(self.strategy)
        return float(self.sum_noise_multiplier * math.sqrt((self.num_steps + 1) / 2))

    @property
    def epsilon(self) -> float:
        """Epsilon after ``num_steps`` releases; inf without noise.

        Raises:
            MissingPackageError: it was not computed yet, and the accountant's packages are still not installed.
        """
        if self.computed_epsilon is not None:
            return self.computed_epsilon
        return epsilon(self.mechanism, self.num_steps, self.target_delta, accountant=self.accountant)

    @property
    def private(self) -> bool:
        """Whether the schedule has a finite epsilon at all. Raises MissingPackageError as :attr:`epsilon`."""
        return self.noise_multiplier > 0 and math.isfinite(self.epsilon)

    @property
    def mechanism(self) -> Mechanism:
        """One release, for the accountant and the ledger."""
        rated = self.sampler in RATED
        return Mechanism(
            sampler=self.sampler,
            noise_multiplier=self.noise_multiplier,
            sample_rate=self.sample_rate if rated else None,
            batch_size=None if rated else int(self.expected_batch_size),
            max_batch_size=self.max_batch_size,
            dataset_size=None if self.sampler in WITHOUT_N else self.dataset_size,
            unit=self.unit,
            examples_per_user=self.examples_per_user,
            strategy=self.strategy,
        )

    @property
    def accountant_label(self) -> str:
        """The accountant with its discretisation, for reports."""
        if self.accountant == "rdp":
            return "dp_accounting RDP"
        if self._known_epsilon() in (None, math.inf):
            return "dp_accounting PLD"
        return f"dp_accounting PLD (pessimistic, discretisation {discretization(self.mechanism):g})"

    def meter(self, history: Sequence[Event] = ()) -> EpsilonMeter:
        """An :class:`~dpft.privacy.accounting.epsilon_meter.EpsilonMeter` of this schedule; ``history`` as there."""
        return EpsilonMeter(
            self.mechanism, self.target_delta, self.num_steps, accountant=self.accountant, history=history
        )

    def _known_epsilon(self) -> float | None:
        try:
            return self.epsilon
        except MissingPackageError:
            return None

    def describe(self) -> str:
        """A summary in several lines, before anything runs (``--dry-run``).

        It says ``NOT COMPUTED`` where epsilon cannot be computed (see :attr:`epsilon`).
        """
        planned = self._known_epsilon()
        shown = "NOT COMPUTED (pip install dp-accounting scipy)" if planned is None else rounded_up(planned)
        target = "none given" if self.target_epsilon is None else f"{self.target_epsilon:g}"
        scale = 1.0 if self.strategy is None else self.strategy.scale
        noise, adaptive = self.sum_noise_multiplier * self.max_grad_norm * scale, self.adaptive_clip
        where = "on the clipped sum" if self.strategy is None else "of z, C x + z"
        cap = "" if self.max_batch_size is None else f", at most {self.max_batch_size}"
        unit = (
            f"user, at most {self.examples_per_user} examples each" if self.unit == "user" else self.item or "example"
        )
        lines = [
            f"epsilon            {shown} after {self.num_steps} steps (target: {target})",
            f"delta              {self.target_delta:g}",
            f"noise multiplier   {self.noise_multiplier:.6g} (standard deviation {noise:.6g} {where})",
            f"clip norm          {self.max_grad_norm:g}, clip function {self.clip_function}",
            *([] if self.clip_groups is None else [f"clip groups        {self.described_groups()}"]),
            *([] if adaptive is None else [f"adaptive clip      {self.described_adaptation()}"]),
            f"sampler            {self.sampler}, sample rate {self.sample_rate:.6g}",
            f"logical batch      {self.expected_batch_size:g} expected{cap}",
            f"adjacency          {self.mechanism.adjacency}, sensitivity {self.mechanism.sensitivity}",
            f"privacy unit       {unit}",
            f"accountant         {self.accountant_label}",
            *(f"assumed            {line}" for line in self.assumptions),
        ]
        if self.strategy is not None:
            lines.append(
                f"correlated noise   {self.strategy.kind}, participations {self.strategy.min_separation} steps apart; "
                f"keeps {self.strategy.memory} vectors of the size of the trained parameters"
            )
        if planned == math.inf:
            lines.insert(0, "NOT PRIVATE: no noise is added (noise_multiplier = 0); epsilon is infinite.")
        return "\n".join(lines)

    def described_adaptation(self) -> str:
        """In words: how the clip norm adapts, and what noise its count and the sum get."""
        assert self.adaptive_clip is not None
        return (
            f"C follows the {self.adaptive_clip.quantile:g}-quantile of the norms (learning rate "
            f"{self.adaptive_clip.learning_rate:g}); noise multiplier {self.sum_noise_multiplier:.6g} on the sum, "
            f"standard deviation {self.count_noise:.6g} on the count, together {self.noise_multiplier:.6g}"
        )

    def described_groups(self) -> str:
        """In words: how the clip norm is divided among groups of parameters."""
        if self.clip_groups == "layer":
            return "each module's parameters to C / sqrt(number of modules), so that all together are clipped to C"
        parts = ", ".join(f"{name or 'others'}: {weight:g}" for name, weight in self.clip_groups)
        return f"apart, with norms proportional to {parts}, whose squares add up to C^2"

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable. An infinite ``epsilon`` is the string ``inf`` (strict JSON has no number for it)."""
        values = dataclasses.asdict(self)
        values.pop("strategy")
        if self.strategy is not None:
            values["strategy"] = self.strategy.to_dict()
        epsilon = values.pop("computed_epsilon")
        return {**values, "assumptions": list(self.assumptions), "epsilon": "inf" if epsilon == math.inf else epsilon}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PrivacySchedule:
        """Inverse of :meth:`to_dict`.

        Raises:
            PrivacyConfigError: not the dictionary of a schedule.
        """
        try:
            rest = dict(values)
            if isinstance(rest.get("clip_groups"), list):
                rest["clip_groups"] = tuple((name, weight) for name, weight in rest["clip_groups"])
            if rest.get("adaptive_clip") is not None:
                rest["adaptive_clip"] = AdaptiveClip.from_dict(rest["adaptive_clip"])
            epsilon, assumptions = rest.pop("epsilon"), tuple(rest.pop("assumptions"))
            if rest.get("strategy") is not None:
                rest["strategy"] = Strategy.from_dict(rest["strategy"])
            return cls(**rest, computed_epsilon=None if epsilon is None else float(epsilon), assumptions=assumptions)
        except (KeyError, TypeError, ValueError) as error:
            raise PrivacyConfigError(f"not a privacy schedule: {error}; expected what to_dict gave.") from error
