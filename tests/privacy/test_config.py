"""The configuration refuses what makes no sense, and resolves to constants that keep the budget."""

from __future__ import annotations

import json
import math
import warnings
from typing import Any

import numpy as np
import pytest

from dpft.errors import AccountingError, PrivacyConfigError
from dpft.privacy import Mechanism, PrivacyConfig, PrivacySchedule, calibrate_noise_multiplier, epsilon

GOOD: dict[str, Any] = {
    "target_delta": 1e-6,
    "noise_multiplier": 1.0,
    "num_steps": 100,
    "expected_batch_size": 64,
}
FIXED = {"sampler": "fixed_size", "accountant": "rdp"}


def make(**changes: Any) -> PrivacyConfig:
    return PrivacyConfig(**{**GOOD, **changes})


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"target_delta": 0}, "target_delta"),
        ({"target_delta": 1}, "target_delta"),
        ({"target_delta": -1e-6}, "target_delta"),
        ({"target_delta": math.nan}, "target_delta"),
        ({"target_delta": None}, "target_delta"),
        ({"target_delta": "1e-6"}, "target_delta"),
        ({"max_grad_norm": 0}, "max_grad_norm"),
        ({"max_grad_norm": math.inf}, "max_grad_norm"),
        ({"max_grad_norm": math.nan}, "max_grad_norm"),
        ({"max_grad_norm": True}, "max_grad_norm"),
        ({"max_grad_norm": None}, "max_grad_norm"),
        ({"expected_batch_size": 0}, "expected_batch_size"),
        ({"expected_batch_size": -1}, "expected_batch_size"),
        ({"expected_batch_size": math.nan}, "expected_batch_size"),
        ({"expected_batch_size": True}, "expected_batch_size"),
        ({"noise_multiplier": -0.1}, "noise_multiplier"),
        ({"noise_multiplier": math.nan}, "noise_multiplier"),
        ({"noise_multiplier": math.inf}, "noise_multiplier"),
        ({"noise_multiplier": False}, "noise_multiplier"),
        ({"noise_multiplier": None}, "target_epsilon and noise_multiplier: got neither"),
        ({"target_epsilon": 8.0}, "target_epsilon and noise_multiplier: got both"),
        ({"noise_multiplier": None, "target_epsilon": 0}, "target_epsilon"),
        ({"noise_multiplier": None, "target_epsilon": math.inf}, "target_epsilon"),
        ({"num_steps": None}, "num_steps and num_epochs: got neither"),
        ({"num_epochs": 3}, "num_steps and num_epochs: got both"),
        ({"num_steps": 0}, "num_steps"),
        ({"num_steps": 10.0}, "num_steps"),
        ({"num_steps": True}, "num_steps"),
        ({"num_steps": None, "num_epochs": 0}, "num_epochs"),
        ({"num_steps": None, "num_epochs": math.nan}, "num_epochs"),
        ({"sample_rate": 0}, "sample_rate"),
        ({"sample_rate": 1.01}, "sample_rate"),
        ({"sample_rate": math.nan}, "sample_rate"),
        ({"sample_rate": True}, "sample_rate"),
        ({"sampler": "uniform"}, "sampler"),
        ({"sampler": None}, "sampler"),
        ({"sampler": "truncated_poisson"}, "max_batch_size"),
        ({"max_batch_size": 100}, "max_batch_size"),
        ({"sampler": "truncated_poisson", "max_batch_size": 0}, "max_batch_size"),
        ({"sampler": "truncated_poisson", "max_batch_size": 99.5}, "max_batch_size"),
        ({**FIXED, "sample_rate": 0.1}, "sample_rate"),
        ({**FIXED, "expected_batch_size": 64.5}, "expected_batch_size"),
        ({"sampler": "shuffle", "sample_rate": 0.1}, "sample_rate"),
        ({"clip_function": "none"}, "clip_function"),
        ({"clip_gamma": 0}, "clip_gamma"),
        ({"accountant": "prv"}, "accountant"),
        ({"secure_rng": 1}, "secure_rng"),
        ({"item": " "}, "item"),
        ({"item": "a\nb"}, "one line"),
        ({"item": "user", "unit": "user", "examples_per_user": 2}, "Leave one of them out"),
        ({"unit": "person"}, "unit"),
        ({"unit": "user"}, "examples_per_user"),
        ({"examples_per_user": 4}, "examples_per_user"),
        ({"unit": "user", "examples_per_user": 0}, "examples_per_user"),
    ],
)
def test_refused_when_made(changes: dict[str, Any], names: str) -> None:
    with pytest.raises(PrivacyConfigError, match=names):
        make(**changes)


def test_good_values_pass() -> None:
    make(noise_multiplier=0)
    make(sample_rate=1)
    make(unit="user", examples_per_user=8)
    make(sampler="truncated_poisson", max_batch_size=128)


def test_dict_round_trip_and_unknown_fields() -> None:
    config = make(sampler="truncated_poisson", max_batch_size=128)
    assert PrivacyConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(PrivacyConfigError, match="noise_multiplyer"):
        PrivacyConfig.from_dict({**GOOD, "noise_multiplyer": 1})
    with pytest.raises(PrivacyConfigError, match="target_delta"):
        PrivacyConfig.from_dict({"expected_batch_size": 64})


def test_fingerprint_is_stable_and_sees_every_field() -> None:
    # Written down: a change would make every ledger out there look like another configuration's.
    assert make().fingerprint() == "5868ca8ab4a27e1392ad237d33c5ed8df43cce1065d291b04b58cd6ce3c18e67"
    assert make(expected_batch_size=64.0, max_grad_norm=1).fingerprint() == make().fingerprint()
    assert make(expected_batch_size=np.int64(64), noise_multiplier=np.float64(1)).fingerprint() == make().fingerprint()
    others = [
        make(target_delta=1e-5),
        make(noise_multiplier=1.1),
        make(num_steps=101),
        make(expected_batch_size=65),
        make(max_grad_norm=2),
        make(sample_rate=0.1),
        make(sampler="shuffle"),
        make(sampler="balls_and_bins"),
        make(sampler="truncated_poisson", max_batch_size=99),
        make(clip_function="automatic"),
        make(clip_gamma=0.1),
        make(accountant="rdp"),
        make(secure_rng=True),
        make(unit="user", examples_per_user=2),
        make(item="user"),
        make(),
    ]
    assert len({config.fingerprint() for config in others}) == len(others)


def test_resolve_gives_the_constants() -> None:
    assert "privacy unit       user\n" in make(item="user").resolve(10_000).describe()
    schedule = make().resolve(10_000)
    assert (schedule.sample_rate, schedule.num_steps, schedule.noise_multiplier) == (0.0064, 100, 1.0)
    assert schedule.private and schedule.dataset_size == 10_000
    assert schedule.epsilon == epsilon(schedule.mechanism, 100, 1e-6)
    assert any("number of examples is public" in line for line in schedule.assumptions)
    assert PrivacySchedule.from_dict(json.loads(json.dumps(schedule.to_dict(), allow_nan=False))) == schedule


def test_a_declared_rate_keeps_the_number_of_examples_secret() -> None:
    config = make(sample_rate=0.01)
    schedule, neighbour = config.resolve(10_000), config.resolve(10_001)
    assert schedule == neighbour
    assert "10000" not in json.dumps(schedule.to_dict()) + schedule.describe()
    assert not any("number of examples" in line for line in schedule.assumptions)


@pytest.mark.parametrize(
    ("changes", "n", "steps"),
    [
        ({"num_epochs": 3}, 6_400, 300),
        ({"num_epochs": 3}, 6_401, 301),
        ({"num_epochs": 0.5}, 6_400, 50),
        ({"num_epochs": 3, "sample_rate": 0.1}, 6_400, 30),
        ({"num_epochs": 1e-9}, 6_400, 1),
    ],
)
def test_epochs_become_steps(changes: dict[str, Any], n: int, steps: int) -> None:
    assert make(num_steps=None, **changes).resolve(n).num_steps == steps


def test_calibrated_plan_is_within_the_budget_and_not_far_below() -> None:
    config = PrivacyConfig(target_epsilon=3.0, target_delta=1e-5, expected_batch_size=64, num_steps=50)
    schedule = config.resolve(4_000)
    assert 2.98 < schedule.epsilon <= 3.0
    shape = Mechanism(sampler="poisson", noise_multiplier=1.0, sample_rate=64 / 4_000)
    assert schedule.noise_multiplier == calibrate_noise_multiplier(shape, 50, 3.0, 1e-5)


def test_no_noise_is_not_private_everywhere() -> None:
    for changes in ({}, FIXED, {"sampler": "shuffle"}, {"sampler": "balls_and_bins"}):
        schedule = make(noise_multiplier=0, **changes).resolve(10_000)
        assert schedule.epsilon == math.inf and not schedule.private
        assert schedule.describe().startswith("NOT PRIVATE")
        assert not PrivacySchedule.from_dict(json.loads(json.dumps(schedule.to_dict(), allow_nan=False))).private


def test_large_delta_warns_and_small_does_not() -> None:
    with pytest.warns(UserWarning, match="target_delta"):
        make(target_delta=1e-4).resolve(10_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(target_delta=0.99e-4).resolve(10_000)


def test_refused_when_resolved() -> None:
    with pytest.raises(PrivacyConfigError, match="larger than the 32 examples"):
        make(target_delta=1e-3).resolve(32)
    with pytest.raises(PrivacyConfigError, match="dataset_size"):
        make().resolve(0)
    with pytest.raises(AccountingError, match="accountant='rdp'"):
        make(sampler="fixed_size").resolve(10_000)
    with pytest.raises(AccountingError, match="pld"):
        make(sampler="balls_and_bins", accountant="rdp").resolve(10_000)
    with pytest.raises(AccountingError, match="user"):
        make(sampler="shuffle", unit="user", examples_per_user=2).resolve(10_000)


def test_describe_has_what_a_dry_run_must_say() -> None:
    text = make(sampler="truncated_poisson", max_batch_size=128, max_grad_norm=0.5).resolve(10_000).describe()
    for piece in ("truncated_poisson", "at most 128", "0.0064", "100 steps", "1e-06", "noise multiplier   1", "0.5"):
        assert piece in text
