"""Every planted defect is noticed by the audit, and dpft as it is passes; ``tools/audit.py`` says so by its status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dpft import DPOptimizer, GaussianNoise
from tests.fixed_draws import fixed_draws
from tools import audit
from tools.auditing import subject
from tools.auditing.catalogue import ALL_PLANTS, SUBJECTS, Subject, audited, find_plant, find_subject, nothing_in
from tools.auditing.plants import PLANTS, Plant
from tools.auditing.plants_of_mechanisms import MECHANISM_PLANTS

# The cross term and the padding rows change the clip norm by a tenth; the others are seen in a few releases. With
# these the decisive p-value was below 1e-12 in each of several audits; a plant counts as noticed below 9e-6.
STEPS = {"tied_cross_term": 240, "layer_unclipped": 120, "padding_counted": 160}


@pytest.mark.slow
@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_plant_is_noticed(plant: Plant) -> None:
    with plant.entered(), fixed_draws(0):
        found = subject.audited(STEPS.get(plant.name, 60), 8, seed=0)
    assert found.violated, found.describe()


@pytest.mark.slow
@pytest.mark.parametrize("plant", MECHANISM_PLANTS, ids=lambda plant: plant.name)
def test_plant_in_another_mechanism_is_noticed(plant: Plant) -> None:
    """Those of whole trainings and queries by a bound above the claim; those step by step by a test or the bound."""
    with fixed_draws(0):
        found = audited(plant, 0, 240, 8)
    assert found.violated, found.describe()


@pytest.mark.slow
@pytest.mark.parametrize("subject", SUBJECTS[1:], ids=lambda subject: subject.name)
def test_every_mechanism_passes(subject: Subject) -> None:
    with fixed_draws(0):
        found = audited(nothing_in(subject.name), 0, 120, 8)
    assert not found.violated, found.describe()


def test_every_mechanism_has_a_plant() -> None:
    assert {plant.subject for plant in ALL_PLANTS} == {subject.name for subject in SUBJECTS}
    assert len({plant.name for plant in ALL_PLANTS}) == len(ALL_PLANTS)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_dpft_passes(seed: int) -> None:
    with fixed_draws(seed):
        found = subject.audited(60, 8, seed)
    assert not found.violated, found.describe()


def test_a_plant_is_gone_after_it() -> None:
    """Also one that patches a module: an audit of the next must not see it."""
    before = (GaussianNoise.add_, DPOptimizer.step, DPOptimizer._release)
    for plant in ALL_PLANTS:
        with plant.entered():
            pass
    assert before == (GaussianNoise.add_, DPOptimizer.step, DPOptimizer._release)


def test_names() -> None:
    assert find_plant("half_noise") in PLANTS and len(PLANTS) == 10
    with pytest.raises(ValueError, match="expected none, all"):
        find_plant("no_such")
    with pytest.raises(ValueError, match="expected one of white_box"):
        find_subject("no_such")


@pytest.mark.slow
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--steps", "24", "--canaries", "4", "--output", str(tmp_path), "--subject", "white_box"]
    with fixed_draws(0):
        assert audit.main([*options, "--plant", "half_noise"]) == 0
        assert "VIOLATED" in capsys.readouterr().out
        assert audit.main(options) == 0
    row = json.loads((tmp_path / "audit.json").read_text())["audits"][0]
    assert row["plant"] == "none" and not row["violated"] and (tmp_path / "none.png").exists()
