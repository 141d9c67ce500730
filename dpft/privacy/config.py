"""The privacy configuration: what a user declares, checked on construction."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dpft.errors import MissingPackageError, PrivacyConfigError
from dpft.privacy.accounting.accountant import check_supported, epsilon
from dpft.privacy.accounting.calibration import calibrate_noise_multiplier
from dpft.privacy.adaptive_clip import AdaptiveClip
from dpft.privacy.config_checks import ClipFunctionName, ClipGroupsSpec, MechanismName, check, in_one_form, number
from dpft.privacy.correlated.optimum import best_banded, best_blt
from dpft.privacy.correlated.strategy import Strategy
from dpft.privacy.mechanism import RATED, STRATEGY_OF, WITHOUT_N, AccountantName, Mechanism, SamplerName, UnitName
from dpft.privacy.schedule import PrivacySchedule


@dataclass(frozen=True, kw_only=True)
class PrivacyConfig:
    """Everything that changes the privacy of a training, and nothing else.

    Give exactly one of ``target_epsilon`` and ``noise_multiplier``, and one of ``num_steps`` and ``num_epochs``.

    Attributes:
        target_delta: delta, in (0, 1); should be well below 1 / number of examples.
        expected_batch_size: the constant b by which the noisy sum is divided; never the size of a drawn batch.
        target_epsilon: the budget; the noise multiplier is calibrated to it.
        noise_multiplier: sigma; noise has standard deviation sigma * ``max_grad_norm``. 0: not private, for debugging.
        num_steps: logical batches.
        num_epochs: passes over the data in expectation.
        max_grad_norm: clip norm C, over all trainable parameters together; with ``adaptive_clip`` the first one.
        clip_groups: parameters that are clipped apart, as :func:`dpft.wrap`: ``"layer"``, or a weight for each
            beginning of parameters' names. The squares of the groups' norms add up to C^2: the sensitivity stays C.
        adaptive_clip: an :class:`AdaptiveClip`: C follows a quantile of the norms, within the same epsilon.
        sample_rate: a declared constant q for the Poisson samplers; None: ``expected_batch_size / len(dataset)``,
            which treats the number of examples as public; the report says so.
        sampler: ``poisson``, ``truncated_poisson`` (with ``max_batch_size``), ``fixed_size`` (with
            ``accountant="rdp"``), ``shuffle`` (accounted without any amplification), ``balls_and_bins`` (each example
            in one random batch of every epoch); those of ``mechanism``.
        max_batch_size: cap on the logical batch of ``truncated_poisson``.
        clip_function: ``abadi``: min(1, C / norm); ``automatic``: C / (norm + ``clip_gamma``). Sensitivity C, both.
        clip_gamma: stability constant of ``automatic`` (Bu et al. 2023, arXiv 2206.07136).
        accountant: ``pld`` or ``rdp``.
        secure_rng: noise on a grid, from a cryptographic generator: no attack on its floating-point numbers.
        unit: ``example``, or ``user`` with ``examples_per_user``, an upper bound that the data must satisfy.
        examples_per_user: see ``unit``.
        item: what an example of the dataset is, in words, where it is not one record: the statement then names that
            as its unit, such as ``user (all records with one value of 'id')``. The guarantee is that of one example
            in any case; this says what one is.
        mechanism: ``dp_sgd``: independent noise. ``bandmf``, with ``bands`` and ``sampler="cyclic_poisson"``: noise
            that is correlated over the steps, amplified by sampling. ``blt``, with ``buffers`` and
            ``sampler="fixed_order"``: correlated noise without amplification.
        bands: of ``bandmf``: b >= 1; keeps b - 1 vectors of the size of the trained parameters. An example can be
            drawn at every b-th step only, with b times the probability.
        buffers: of ``blt``: vectors of the size of the trained parameters that are kept; 2 to 5 are enough.

    Raises:
        PrivacyConfigError: a value is missing, contradictory, of the wrong type or out of range.
    """

    target_delta: float
    expected_batch_size: int | float
    target_epsilon: float | None = None
    noise_multiplier: float | None = None
    num_steps: int | None = None
    num_epochs: float | None = None
    max_grad_norm: float = 1.0
    clip_groups: ClipGroupsSpec | None = None
    adaptive_clip: AdaptiveClip | None = None
    sample_rate: float | None = None
    sampler: SamplerName = "poisson"
    max_batch_size: int | None = None
    clip_function: ClipFunctionName = "abadi"
    clip_gamma: float = 0.01
    accountant: AccountantName = "pld"
    secure_rng: bool = False
    unit: UnitName = "example"
    examples_per_user: int | None = None
    item: str | None = None
    mechanism: MechanismName = "dp_sgd"
    bands: int | None = None
    buffers: int | None = None

    def __post_init__(self) -> None:
        for name, value in in_one_form(self).items():
            object.__setattr__(self, name, value)  # the dataclass is frozen
        check(self)

    # ------------------------------------------------------------------------------------------ as data
    def to_dict(self) -> dict[str, Any]:
        """Every field, JSON-serialisable; later ones, such as ``item`` or ``mechanism``, only where they are given."""
        # Without them the fingerprint is that of the versions before them.
        later = {"item": None, "mechanism": "dp_sgd", "bands": None, "buffers": None}
        later |= {"adaptive_clip": None, "clip_groups": None}
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name not in later or value != later[name]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PrivacyConfig:
        """Inverse of :meth:`to_dict`; omitted fields take their defaults.

        Raises:
            PrivacyConfigError: an unknown field, or as the constructor.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise PrivacyConfigError(f"unknown privacy settings {unknown}; expected some of {sorted(known)}.")
        if missing := sorted({"target_delta", "expected_batch_size"} - set(values)):
            raise PrivacyConfigError(f"privacy settings lack {missing}; give them.")
        values = dict(values)
        if isinstance(values.get("adaptive_clip"), Mapping):
            values["adaptive_clip"] = AdaptiveClip.from_dict(values["adaptive_clip"])
        return cls(**values)

    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of the canonical JSON of :meth:`to_dict`; the same on every machine."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    # ------------------------------------------------------------------------------------------ resolve
    def rate(self, dataset_size: int) -> float:
        """Share of the ``dataset_size`` examples in a logical batch, in expectation: the declared one, or b / N."""
        return self.sample_rate if self.sample_rate is not None else self.expected_batch_size / dataset_size

    def steps(self, dataset_size: int) -> int:
        """Logical batches of a training on ``dataset_size`` examples: ``num_steps``, or those of ``num_epochs``."""
        if self.num_steps is not None:
            return self.num_steps
        assert self.num_epochs is not None
        # The tolerance keeps 3 / 0.1 at 30 steps, where floating point may give 30.000000000000004.
        return max(1, math.ceil(self.num_epochs / self.rate(dataset_size) - 1e-9))

    def resolve(self, dataset_size: int) -> PrivacySchedule:
        """Compute what follows from this configuration on a dataset: noise multiplier, steps, epsilon.

        Deterministic; takes a few seconds where the noise is calibrated. On different machines use rank 0's schedule.

        Args:
            dataset_size: number of examples N, >= 1.

        Returns:
            The schedule; :attr:`PrivacySchedule.epsilon` is at most ``target_epsilon`` where that was given.

        Raises:
            PrivacyConfigError: the batch is larger than the dataset.
            AccountingError: no theorem covers the sampler with this accountant and unit, or no noise meets the target.
            MissingPackageError: ``target_epsilon`` is given, and the accountant's packages are not installed. If
                ``noise_multiplier`` is given instead, this warns, and reading the schedule's epsilon raises.
        """
        n = number("dataset_size", dataset_size, whole=True)
        if self.target_delta >= 1 / n:
            warnings.warn(
                f"target_delta={self.target_delta:g} is not below 1/N = {1 / n:.3g} (N={n}): publishing one "
                "random example in full would be allowed. Lower target_delta.",
                UserWarning,
                stacklevel=2,
            )
        if self.sample_rate is None and self.expected_batch_size > n:
            raise PrivacyConfigError(
                f"expected_batch_size={self.expected_batch_size:g} is larger than the {n} examples of the dataset; "
                "lower it, or declare sample_rate."
            )
        rate, steps = self.rate(n), self.steps(n)
        public_n = self._takes_n_for_public()
        rated = self.sampler in RATED
        strategy = self._strategy(n, steps)
        if self.mechanism == "bandmf" and self.bands is not None:
            rate = min(1.0, rate * self.bands)  # of the examples of one group, at its steps; 7 * (1 / 7) may exceed 1
        shape = Mechanism(
            sampler=self.sampler,
            noise_multiplier=1.0,
            sample_rate=rate if rated else None,
            batch_size=None if rated else int(self.expected_batch_size),
            max_batch_size=self.max_batch_size,
            dataset_size=None if self.sampler in WITHOUT_N else n,
            unit=self.unit,
            examples_per_user=self.examples_per_user,
            strategy=strategy,
        )
        check_supported(shape, self.accountant)
        if self.noise_multiplier is not None:
            sigma = self.noise_multiplier
        else:
            assert self.target_epsilon is not None
            sigma = calibrate_noise_multiplier(
                shape, steps, self.target_epsilon, self.target_delta, accountant=self.accountant
            )
        if self.adaptive_clip is not None:
            self.adaptive_clip.sum_noise_multiplier(sigma, self.expected_batch_size)  # raises where there is none
        spent: float | None
        try:
            spent = epsilon(shape.with_noise(sigma), steps, self.target_delta, accountant=self.accountant)
        except MissingPackageError as error:
            if self.target_epsilon is not None:
                raise
            spent = None
            warnings.warn(f"the epsilon of this training is not computed: {error}", UserWarning, stacklevel=2)
        return PrivacySchedule(
            noise_multiplier=float(sigma),
            sample_rate=rate,
            num_steps=steps,
            expected_batch_size=self.expected_batch_size,
            max_grad_norm=self.max_grad_norm,
            clip_groups=self.clip_groups,
            adaptive_clip=self.adaptive_clip,
            target_delta=self.target_delta,
            target_epsilon=self.target_epsilon,
            computed_epsilon=spent,
            sampler=self.sampler,
            max_batch_size=self.max_batch_size,
            clip_function=self.clip_function,
            clip_gamma=self.clip_gamma,
            accountant=self.accountant,
            secure_rng=self.secure_rng,
            unit=self.unit,
            examples_per_user=self.examples_per_user,
            item=self.item,
            dataset_size=n if public_n else None,
            assumptions=tuple(self._assumptions()),
            config_fingerprint=self.fingerprint(),
            strategy=strategy,
        )

    def _strategy(self, n: int, steps: int) -> Strategy | None:
        """The correlation of the noise over the steps, optimised for them."""
        if self.bands is not None:
            if self.bands * self.expected_batch_size > n:
                raise PrivacyConfigError(
                    f"bands={self.bands} with batches of {self.expected_batch_size:g} of {n} examples: a step draws "
                    f"from {n} / bands examples, fewer than its batch; expected at most "
                    f"{math.floor(n / self.expected_batch_size)} bands."
                )
            return best_banded(steps, self.bands)
        if self.buffers is not None:
            return best_blt(steps, math.ceil(n / self.expected_batch_size), self.buffers)
        return None

    def _takes_n_for_public(self) -> bool:
        return self.sample_rate is None or self.sampler != "poisson"

    def _assumptions(self) -> list[str]:
        lines = []
        if self.item is not None:
            lines.append(f"an example is one {self.item}")
        if self.sampler == "fixed_size":
            lines.append("the number of examples is public (neighbouring datasets have the same size)")
        elif self.sampler == "shuffle":
            lines.append(
                "the number of examples is public, and neighbouring datasets differ in one example whose gradient is "
                "replaced by zero; shuffling is not claimed to amplify privacy"
            )
        elif self.sampler in STRATEGY_OF:
            lines.append(
                "the number of examples is public, and neighbouring datasets differ in one example whose gradient is "
                "replaced by zero; which steps an example can be in follows from its index and that number"
            )
            lines.append("the noise of earlier steps stays secret, and so does the file that a resume draws it from")
        elif self.sampler == "balls_and_bins":
            lines.append(
                "the number of examples is public, and neighbouring datasets differ in one example whose gradient is "
                "replaced by zero; an epoch that has begun counts whole"
            )
        elif self.sampler == "truncated_poisson":
            lines.append("the number of examples is known to the accountant to within one")
        if self.sample_rate is None and self.sampler in ("poisson", "truncated_poisson"):
            lines.append(
                "the number of examples is public: the sample rate was taken from it (strictly, neighbouring datasets "
                "then differ in one example whose gradient is replaced by zero; the epsilon is the same)"
            )
        if self.adaptive_clip is not None:
            lines.append(
                "the clip norms are public: each follows from noised counts of clipped examples, which are part of "
                "the releases (where a gradient is replaced by zero, its example is not counted either)"
            )
        if self.unit == "user":
            lines.append(f"no user has more than {self.examples_per_user} examples")
        lines.append(
            "hyperparameters, tokenizer and pretrained weights do not depend on these data, or what they reveal of "
            "them is not accounted for"
        )
        lines.append("which examples were drawn, and how many, stays secret; so do the seeds")
        return lines
