"""What is checked of a privacy configuration when it is made: types, ranges, and what goes together."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any, Literal, get_args

from dpft.errors import PrivacyConfigError
from dpft.privacy.adaptive_clip import AdaptiveClip
from dpft.privacy.mechanism import STRATEGY_OF, AccountantName, SamplerName, UnitName, check_unit

ClipFunctionName = Literal["abadi", "automatic"]
MechanismName = Literal["dp_sgd", "bandmf", "blt"]
ClipGroupsSpec = Literal["layer"] | Mapping[str, float] | tuple[tuple[str, float], ...]

_CHOICES: dict[str, tuple[str, ...]] = {
    "sampler": get_args(SamplerName),
    "clip_function": get_args(ClipFunctionName),
    "accountant": get_args(AccountantName),
    "unit": get_args(UnitName),
    "mechanism": get_args(MechanismName),
}
_REALS = (
    *("target_delta", "expected_batch_size", "target_epsilon", "noise_multiplier", "num_epochs"),
    *("max_grad_norm", "sample_rate", "clip_gamma"),
)
_WHOLE = ("num_steps", "max_batch_size", "examples_per_user", "bands", "buffers")
_MAY_BE_ZERO = ("noise_multiplier",)
_SMALLEST_BOUND = 2.0**-40  # of a clip norm: dpft/clipping/factors.py
_SMALLEST_GAMMA = 2.0**-60  # of "automatic"; times C, the largest factor of a gradient is 2^60
# Samplers with the count of adaptive_clip. A user has several counts; and where a neighbour's gradient is zero, not
# absent, it still counts as one below the clip norm.
_COUNTED = ("poisson", "truncated_poisson", "fixed_size")


def in_one_form(config: Any) -> dict[str, Any]:
    """Numbers and clip groups so that 1 and 1.0, numpy's and Python's, give one fingerprint.

    Raises:
        PrivacyConfigError: a setting is None that must not be, or is not a number in its range.
    """
    for field in dataclasses.fields(config):
        if getattr(config, field.name) is None and field.default is not None:
            raise PrivacyConfigError(f"{field.name}=None; give it a value ({field.type}).")
    given = {name: getattr(config, name) for name in _REALS + _WHOLE if getattr(config, name) is not None}
    numbers = {name: number(name, value, whole=name in _WHOLE) for name, value in given.items()}
    return numbers | {"clip_groups": clip_groups(config.clip_groups)}


def check(config: Any) -> None:
    """Refuse what is out of range, or does not go together.

    Raises:
        PrivacyConfigError: saying what came, what was expected, and what to do.
    """
    for name, choices in _CHOICES.items():
        if getattr(config, name) not in choices:
            raise PrivacyConfigError(f"{name}={getattr(config, name)!r}; expected one of {', '.join(choices)}.")
    if not isinstance(config.secure_rng, bool):
        raise PrivacyConfigError(f"secure_rng={config.secure_rng!r}; expected True or False.")
    if not (config.adaptive_clip is None or isinstance(config.adaptive_clip, AdaptiveClip)):
        raise PrivacyConfigError(
            f"adaptive_clip={config.adaptive_clip!r}; expected a dpft.AdaptiveClip, such as AdaptiveClip()."
        )
    _check_ranges(config)
    _check_combinations(config)


def _check_ranges(config: Any) -> None:
    if config.target_delta >= 1:
        raise PrivacyConfigError(f"target_delta={config.target_delta!r}; expected a number in (0, 1), such as 1e-6.")
    if config.max_grad_norm < _SMALLEST_BOUND:
        raise PrivacyConfigError(
            f"max_grad_norm={config.max_grad_norm!r}; expected at least 2^-40: squares of such small gradients leave "
            "float32's range. Multiply each example's loss and max_grad_norm by one large number."
        )
    if config.clip_function == "automatic" and config.clip_gamma < max(1.0, config.max_grad_norm) * _SMALLEST_GAMMA:
        raise PrivacyConfigError(
            f"clip_gamma={config.clip_gamma!r} with max_grad_norm={config.max_grad_norm:g}; expected at least 2^-60, "
            "and max_grad_norm / 2^60: factors of small gradients would leave float32's range. Use 0.01."
        )
    if config.sample_rate is not None and config.sample_rate > 1:
        raise PrivacyConfigError(f"sample_rate={config.sample_rate!r}; expected a probability in (0, 1].")


def _check_combinations(config: Any) -> None:
    for one, other in (("target_epsilon", "noise_multiplier"), ("num_steps", "num_epochs")):
        a, b = getattr(config, one), getattr(config, other)
        if (a is None) == (b is None):
            came = "neither" if a is None else f"both ({a!r} and {b!r})"
            raise PrivacyConfigError(f"{one} and {other}: got {came}; give exactly one of them.")
    if (config.sampler == "truncated_poisson") != (config.max_batch_size is not None):
        raise PrivacyConfigError(
            f"sampler={config.sampler!r} with max_batch_size={config.max_batch_size!r}; max_batch_size is the cap of "
            "sampler='truncated_poisson': give both or neither."
        )
    _check_mechanism(config)
    if config.sampler not in ("poisson", "truncated_poisson", "cyclic_poisson"):
        if config.sample_rate is not None:
            raise PrivacyConfigError(
                f"sample_rate={config.sample_rate!r} with sampler={config.sampler!r}, which has no sample rate; leave "
                "sample_rate out, or use sampler='poisson'."
            )
        if not isinstance(config.expected_batch_size, int):
            raise PrivacyConfigError(
                f"expected_batch_size={config.expected_batch_size!r} with sampler={config.sampler!r}, whose batches "
                "have that size, or have it on average; expected a whole number."
            )
    check_unit(config.unit, config.examples_per_user)
    if config.adaptive_clip is not None and (
        config.unit != "example" or config.sampler not in _COUNTED or config.clip_function != "abadi"
    ):
        raise PrivacyConfigError(
            f"adaptive_clip with unit={config.unit!r}, sampler={config.sampler!r}, clip_function="
            f"{config.clip_function!r}: its count is accounted for with unit 'example', sampler {_COUNTED}, and the "
            "clip function 'abadi'. Use those, or leave adaptive_clip out."
        )
    if config.adaptive_clip is not None and config.clip_groups is not None:
        raise PrivacyConfigError(
            "adaptive_clip with clip_groups: one clip norm adapts, and not one for each group. Leave one out."
        )
    if config.item is not None and (type(config.item) is not str or not config.item.strip() or "\n" in config.item):
        raise PrivacyConfigError(f"item={config.item!r}; expected a few words on one line: what an example is.")
    if config.item is not None and config.unit != "example":
        raise PrivacyConfigError(
            f"item={config.item!r} with unit={config.unit!r}; item says what an example is, and the unit is another. "
            "Leave one of them out."
        )


def _check_mechanism(config: Any) -> None:
    for name, mechanism, usual in (("bands", "bandmf", 8), ("buffers", "blt", 4)):
        if (getattr(config, name) is not None) != (config.mechanism == mechanism):
            raise PrivacyConfigError(
                f"mechanism={config.mechanism!r} with {name}={getattr(config, name)!r}; give {name} exactly with "
                f"mechanism={mechanism!r}, such as {name}={usual}."
            )
    needs = {kind: sampler for sampler, kind in STRATEGY_OF.items()}.get(config.mechanism)
    if config.sampler != needs and (needs is not None or config.sampler in STRATEGY_OF):
        raise PrivacyConfigError(
            f"mechanism={config.mechanism!r} with sampler={config.sampler!r}: no theorem is implemented for them "
            "together; expected bandmf with cyclic_poisson, blt with fixed_order, dp_sgd with another sampler."
        )
    if needs is None:
        return
    if config.sample_rate is not None:
        raise PrivacyConfigError(
            f"sample_rate={config.sample_rate!r} with mechanism={config.mechanism!r}, which takes the number of "
            "examples for public: which steps an example can be in follows from it. Leave sample_rate out."
        )
    if config.secure_rng:
        raise PrivacyConfigError(
            f"secure_rng=True with mechanism={config.mechanism!r}: a resume draws the earlier noise again, from a "
            "secret that is kept beside the ledger, which secure_rng has none of. Leave one of them out."
        )


def clip_groups(groups: Any) -> Any:
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


def number(name: str, value: Any, *, whole: bool) -> Any:
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
