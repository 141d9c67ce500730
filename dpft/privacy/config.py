"""The privacy configuration: what a user declares, checked on construction."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import numbers
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from dpft.errors import MissingPackageError, PrivacyConfigError
from dpft.privacy.accountant import check_supported, epsilon
from dpft.privacy.adaptive_clip import AdaptiveClip
from dpft.privacy.calibration import calibrate_noise_multiplier
from dpft.privacy.mechanism import AccountantName, Mechanism, SamplerName, UnitName
from dpft.privacy.schedule import PrivacySchedule

ClipFunctionName = Literal["abadi", "automatic"]
ClipGroupsSpec = Literal["layer"] | Mapping[str, float] | tuple[tuple[str, float], ...]

_CHOICES: dict[str, tuple[str, ...]] = {
    "sampler": get_args(SamplerName),
    "clip_function": get_args(ClipFunctionName),
    "accountant": get_args(AccountantName),
    "unit": get_args(UnitName),
}
_REALS = (
    *("target_delta", "expected_batch_size", "target_epsilon", "noise_multiplier", "num_epochs"),
    *("max_grad_norm", "sample_rate", "clip_gamma"),
)
_WHOLE = ("num_steps", "max_batch_size", "examples_per_user")
_MAY_BE_ZERO = ("noise_multiplier",)
_SMALLEST_GAMMA = 2.0**-60  # of "automatic"; times C, the largest factor of a gradient is 2^60


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
            ``accountant="rdp"``), ``shuffle`` (accounted without any amplification).
        max_batch_size: cap on the logical batch of ``truncated_poisson``.
        clip_function: ``abadi``: min(1, C / norm); ``automatic``: C / (norm + ``clip_gamma``). Sensitivity C, both.
        clip_gamma: stability constant of ``automatic`` (Bu et al. 2023, arXiv 2206.07136).
        accountant: ``pld`` or ``rdp``.
        secure_rng: noise from a cryptographic generator, safe against floating-point attacks.
        unit: ``example``, or ``user`` with ``examples_per_user``, an upper bound that the data must satisfy.
        examples_per_user: see ``unit``.
        item: what an example of the dataset is, in words, where it is not one record: the statement then names that
            as its unit, such as ``user (all records with one value of 'id')``. The guarantee is that of one example
            in any case; this says what one is.

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

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is None and field.default is not None:
                raise PrivacyConfigError(f"{field.name}=None; give it a value ({field.type}).")
        for name in _REALS + _WHOLE:
            if getattr(self, name) is not None:
                # Normalised, so that 1 and 1.0, numpy's and Python's, give one fingerprint; the dataclass is frozen.
                object.__setattr__(self, name, _number(name, getattr(self, name), whole=name in _WHOLE))
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise PrivacyConfigError(f"{name}={getattr(self, name)!r}; expected one of {', '.join(choices)}.")
        if not isinstance(self.secure_rng, bool):
            raise PrivacyConfigError(f"secure_rng={self.secure_rng!r}; expected True or False.")
        object.__setattr__(self, "clip_groups", _clip_groups(self.clip_groups))
        if not (self.adaptive_clip is None or isinstance(self.adaptive_clip, AdaptiveClip)):
            raise PrivacyConfigError(
                f"adaptive_clip={self.adaptive_clip!r}; expected a dpft.AdaptiveClip, such as AdaptiveClip()."
            )
        self._check_ranges()
        self._check_combinations()

    def _check_ranges(self) -> None:
        if self.target_delta >= 1:
            raise PrivacyConfigError(f"target_delta={self.target_delta!r}; expected a number in (0, 1), such as 1e-6.")
        if self.clip_function == "automatic" and self.clip_gamma < max(1.0, self.max_grad_norm) * _SMALLEST_GAMMA:
            raise PrivacyConfigError(
                f"clip_gamma={self.clip_gamma!r} with max_grad_norm={self.max_grad_norm:g}; expected at least 2^-60, "
                "and max_grad_norm / 2^60: factors of small gradients would leave float32's range. Use 0.01."
            )
        if self.sample_rate is not None and self.sample_rate > 1:
            raise PrivacyConfigError(f"sample_rate={self.sample_rate!r}; expected a probability in (0, 1].")

    def _check_combinations(self) -> None:
        for one, other in (("target_epsilon", "noise_multiplier"), ("num_steps", "num_epochs")):
            a, b = getattr(self, one), getattr(self, other)
            if (a is None) == (b is None):
                came = "neither" if a is None else f"both ({a!r} and {b!r})"
                raise PrivacyConfigError(f"{one} and {other}: got {came}; give exactly one of them.")
        if (self.sampler == "truncated_poisson") != (self.max_batch_size is not None):
            raise PrivacyConfigError(
                f"sampler={self.sampler!r} with max_batch_size={self.max_batch_size!r}; max_batch_size is the cap of "
                "sampler='truncated_poisson': give both or neither."
            )
        if self.sampler in ("fixed_size", "shuffle"):
            if self.sample_rate is not None:
                raise PrivacyConfigError(
                    f"sample_rate={self.sample_rate!r} with sampler={self.sampler!r}, which has no sample rate; leave "
                    "sample_rate out, or use sampler='poisson'."
                )
            if not isinstance(self.expected_batch_size, int):
                raise PrivacyConfigError(
                    f"expected_batch_size={self.expected_batch_size!r} with sampler={self.sampler!r}, whose batches "
                    "have exactly that size; expected a whole number."
                )
        if (self.unit == "user") != (self.examples_per_user is not None):
            raise PrivacyConfigError(
                f"unit={self.unit!r} with examples_per_user={self.examples_per_user!r}; give examples_per_user (an "
                "upper bound that the data really keeps) exactly when unit='user'."
            )
        if self.adaptive_clip is not None and (
            self.unit != "example" or self.sampler == "shuffle" or self.clip_function != "abadi"
        ):
            # A user has several counts; under 'shuffle' a neighbour's gradient is zero, whose b is 1 and not nothing.
            raise PrivacyConfigError(
                f"adaptive_clip with unit={self.unit!r}, sampler={self.sampler!r}, clip_function="
                f"{self.clip_function!r}: its count is accounted for with unit 'example', every sampler but "
                "'shuffle', and the clip function 'abadi'. Use those, or leave adaptive_clip out."
            )
        if self.adaptive_clip is not None and self.clip_groups is not None:
            raise PrivacyConfigError(
                "adaptive_clip with clip_groups: one clip norm adapts, and not one for each group. Leave one out."
            )
        if self.item is not None and (type(self.item) is not str or not self.item.strip() or "\n" in self.item):
            raise PrivacyConfigError(f"item={self.item!r}; expected a few words on one line: what an example is.")
        if self.item is not None and self.unit != "example":
            raise PrivacyConfigError(
                f"item={self.item!r} with unit={self.unit!r}; item says what an example is, and the unit is another. "
                "Leave one of them out."
            )

    # ------------------------------------------------------------------------------------------ as data
    def to_dict(self) -> dict[str, Any]:
        """Every field, JSON-serialisable; ``item``, ``adaptive_clip``, ``clip_groups`` only where given."""
        values = dataclasses.asdict(self)
        for name in ("item", "adaptive_clip", "clip_groups"):
            if values[name] is None:  # without it the fingerprint is that of the versions before it
                del values[name]
        return values

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
        n = _number("dataset_size", dataset_size, whole=True)
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
        rated = self.sampler in ("poisson", "truncated_poisson")
        shape = Mechanism(
            sampler=self.sampler,
            noise_multiplier=1.0,
            sample_rate=rate if rated else None,
            batch_size=None if rated else int(self.expected_batch_size),
            max_batch_size=self.max_batch_size,
            dataset_size=None if self.sampler == "poisson" else n,
            unit=self.unit,
            examples_per_user=self.examples_per_user,
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
        )

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


def _clip_groups(groups: Any) -> Any:
    """``None``, ``"layer"``, or pairs of a beginning of names and a weight, from a mapping or a list.

    Raises:
        PrivacyConfigError: anything else.
    """
    if groups is None or groups == "layer":
        return groups
    try:
        pairs = tuple((str(name), float(weight)) for name, weight in dict(groups).items())
        if pairs and all(0 < weight < math.inf for _, weight in pairs):
            return pairs
    except (TypeError, ValueError):
        pass
    raise PrivacyConfigError(
        f"clip_groups={groups!r}; expected 'layer', or a finite weight > 0 for each beginning of parameters' names, "
        "such as {'model.embed': 1, '': 2}."
    )


def _number(name: str, value: Any, *, whole: bool) -> Any:
    """A plain Python number > 0 (or >= 0 where 0 is meaningful).

    Raises:
        PrivacyConfigError: anything else, including booleans and NaN.
    """
    zero = name in _MAY_BE_ZERO
    expected = f"a {'whole' if whole else 'finite'} number {'>=' if zero else '>'} 0"
    kind = numbers.Integral if whole else numbers.Real
    if isinstance(value, bool) or not isinstance(value, kind):
        raise PrivacyConfigError(f"{name}={value!r} ({type(value).__name__}); expected {expected}.")
    number = int(value) if isinstance(value, numbers.Integral) else float(value)
    if not math.isfinite(number) or number < 0 or (number == 0 and not zero):
        raise PrivacyConfigError(f"{name}={value!r}; expected {expected}.")
    if name == "expected_batch_size":
        return int(number) if number == int(number) else number
    return number if whole else float(number)
