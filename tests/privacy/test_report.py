"""The statement says what was spent, and says NOT PRIVATE where nothing holds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from dpft.errors import AccountingError
from dpft.privacy import (
    Ledger,
    Mechanism,
    PrivacyConfig,
    PrivacySchedule,
    compose_epsilon,
    privacy_report,
    privacy_statement_markdown,
)


def schedule_of(**changes: Any) -> PrivacySchedule:
    values = {"target_delta": 1e-6, "noise_multiplier": 1.0, "num_steps": 100, "expected_batch_size": 64, **changes}
    return PrivacyConfig(**values).resolve(10_000)


def test_spent_is_what_the_ledger_counts(tmp_path: Path) -> None:
    schedule = schedule_of()
    with Ledger.open(tmp_path / "l", "new", mechanism=schedule.mechanism) as ledger:
        for _ in range(40):
            ledger.record()
        report = privacy_report(schedule, ledger, clipping="flash")
    assert report == privacy_report(schedule, Ledger.read(tmp_path / "l"), clipping="flash")
    spent = compose_epsilon([(schedule.mechanism, 40)], 1e-6)
    assert (report["epsilon_spent"], report["steps_released"]) == (spent, 40)
    assert report["epsilon_spent"] < report["epsilon_planned"] == schedule.epsilon
    assert report["private"] and report["run_id"] == ledger.run_id
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    text = privacy_statement_markdown(report)
    assert "NOT PRIVATE" not in text and "No ledger" not in text
    for piece in ("add_or_remove_one", "poisson", "0.0064", "1e-06", "40 / 100", "flash", "not accounted for", "PLD"):
        assert piece in text
    for name in ("dpft", "torch", "dp-accounting"):
        assert name in report["versions"]


def test_more_releases_than_planned_are_stated() -> None:
    schedule = schedule_of()
    report = privacy_report(schedule, 150)
    assert report["epsilon_spent"] > report["epsilon_planned"]


def test_a_resume_with_other_noise_is_composed(tmp_path: Path) -> None:
    schedule = schedule_of()
    quieter = schedule.mechanism.with_noise(0.7)
    for mode, mechanism in (("new", quieter), ("resume", schedule.mechanism)):
        with Ledger.open(tmp_path / "l", mode, mechanism=mechanism) as ledger:  # type: ignore[arg-type]  # mypy takes the loop variable for a str
            for _ in range(20):
                ledger.record()
    report = privacy_report(schedule, Ledger.read(tmp_path / "l"))
    assert report["epsilon_spent"] == compose_epsilon([(quieter, 20), (schedule.mechanism, 20)], 1e-6)
    assert "noise_multiplier 0.7" in privacy_statement_markdown(report)


@pytest.mark.parametrize(
    ("changes", "options", "reason"),
    [
        ({"noise_multiplier": 0}, {}, "noise multiplier 0"),
        ({}, {"clipping": "none"}, "not clipped"),
        ({}, {"noise_seed_known": True}, "NOT PRIVATE: noise seed known"),
        ({}, {"sampling_seed_known": True}, "sampling seed known"),
    ],
)
def test_not_private_is_loud(changes: Any, options: Any, reason: str) -> None:
    report = privacy_report(schedule_of(**changes), 10, **options)
    assert not report["private"] and report["epsilon_spent"] == report["epsilon_planned"] == "inf"
    json.dumps(report, allow_nan=False)
    text = privacy_statement_markdown(report)
    assert text.split("\n")[2].startswith("**NOT PRIVATE: ") and reason in text
    assert "differential privacy" not in text
    assert math.isinf(float(report["epsilon_spent"]))


def test_one_release_without_noise_in_an_old_segment_is_enough(tmp_path: Path) -> None:
    schedule = schedule_of()
    with Ledger.open(tmp_path / "l", "new", mechanism=schedule.mechanism.with_noise(0.0)) as ledger:
        ledger.record()
    with Ledger.open(tmp_path / "l", "resume", mechanism=schedule.mechanism) as ledger:
        assert not privacy_report(schedule, ledger)["private"]


def test_without_a_ledger_nothing_is_claimed() -> None:
    report = privacy_report(schedule_of(), None)
    assert report["epsilon_spent"] is None
    text = privacy_statement_markdown(report)
    assert "No ledger was kept" in text and "differential privacy" not in text


def test_the_number_of_examples_is_said_only_where_it_is_public() -> None:
    assert privacy_report(schedule_of(), 1)["dataset_size"] == 10_000
    secret = privacy_report(schedule_of(sample_rate=0.01), 1)
    assert secret["dataset_size"] is None and "10000" not in json.dumps(secret)
    assert "not disclosed" in privacy_statement_markdown(secret)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"unit": "user", "examples_per_user": 2}, "user (at most 2 examples each)"),
        ({"sampler": "shuffle"}, "no amplification claimed"),
        ({"sampler": "fixed_size", "accountant": "rdp"}, "replaced by another"),
        ({"clip_function": "automatic"}, "automatic, gamma 0.01"),
        ({"sampler": "truncated_poisson", "max_batch_size": 128}, "capped at 128"),
        ({"secure_rng": True}, "cryptographic"),
        ({"item": "user (by 'id')"}, "| Privacy unit | user (by 'id') |"),
        ({"item": "user (by 'id')"}, "in which one user (by 'id') is added or removed"),
        ({"item": "user (by 'id')"}, "- an example is one user (by 'id')"),
    ],
)
def test_what_is_particular_is_said(changes: Any, words: str) -> None:
    assert words in privacy_statement_markdown(privacy_report(schedule_of(**changes), 10))


def test_naming_the_item_changes_no_number() -> None:
    plain, named = (privacy_report(schedule_of(**more), 10) for more in ({}, {"item": "user (by 'id')"}))
    words = {"item", "neighbours", "assumptions", "config_fingerprint"}
    assert {key for key in plain if plain[key] != named[key]} == words
    assert "one example is added" in plain["neighbours"] and plain["item"] is None


def test_notes_are_assumptions_and_mixed_units_are_refused(tmp_path: Path) -> None:
    report = privacy_report(schedule_of(), 1, notes=("documents were packed",), tuning="none was done")
    text = privacy_statement_markdown(report)
    assert "- documents were packed" in text and "none was done" in text
    user = Mechanism(sampler="poisson", noise_multiplier=1.0, sample_rate=0.01, unit="user", examples_per_user=2)
    with Ledger.open(tmp_path / "l", "new", mechanism=user) as ledger:
        ledger.record()
    with Ledger.open(tmp_path / "l", "resume", mechanism=schedule_of().mechanism) as ledger:
        ledger.record()
        with pytest.raises(AccountingError, match="units"):
            privacy_report(schedule_of(), ledger)


def test_no_statement_of_another_guarantee_than_that_of_the_releases(tmp_path: Path) -> None:
    """The schedule names unit, adjacency and noise; the releases may be those of an earlier configuration."""
    schedule = schedule_of()

    def ledger_of(mechanism: Mechanism) -> Ledger:
        return Ledger.open(tmp_path / f"{mechanism.sampler}{mechanism.unit}", "new", mechanism=mechanism)

    shuffled = schedule_of(sampler="shuffle").mechanism
    with ledger_of(shuffled) as ledger:
        ledger.record()
        report = privacy_report(schedule, ledger)
        text = privacy_statement_markdown(report)
    assert report["adjacency"] == "zero_out" and "replaced by zero" in report["neighbours"]
    assert "- 1: sampler shuffle, noise_multiplier 1.0" in text
    for planned in (
        schedule_of(unit="user", examples_per_user=2),
        schedule_of(sampler="fixed_size", accountant="rdp"),
    ):
        with ledger_of(schedule.mechanism) as ledger:
            ledger.record()
            with pytest.raises(AccountingError, match=r"units|adjacencies"):
                privacy_report(planned, ledger)
            (tmp_path / "poissonexample").unlink()
