"""Clip groups in a private run: sensitivity C, and so the noise, the epsilon and the statement of a clip norm C."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

import dpft
from tests import oracle
from tests.clipping.test_clip_groups import clipped_apart
from tests.oracle import relative_error
from tests.training import Training, collate, config, examples, tiny_llama, values

NAMES = {"": 1.0, "model.embed_tokens": 2.0}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger"


@pytest.mark.parametrize("groups", ["layer", NAMES], ids=["layer", "names"])
def test_a_release_without_noise_is_the_sum_of_its_groups(path: Path, groups: Any) -> None:
    changes = {"noise_multiplier": 0, "sample_rate": 1.0, "num_steps": 1, "clip_groups": groups, "max_grad_norm": 0.3}
    before = {n: p.detach().double() for n, p in tiny_llama().named_parameters()}
    exact = oracle.oracle(copy.deepcopy(tiny_llama()), collate(examples()))
    training = Training(path, changes=changes).train()
    moved = {n: (before[n] - p.detach().double()) * 6 for n, p in training.model.named_parameters()}
    assert relative_error(moved, clipped_apart(exact, groups, 0.3)) <= 1e-5


def test_every_group_gets_the_noise_of_c(path: Path) -> None:
    """No example is drawn: what moves a parameter is N(0, (sigma C / b)^2), in every group."""
    changes = {"sample_rate": 1e-9, "noise_multiplier": 2.0, "max_grad_norm": 1.5, "clip_groups": "layer"}
    model = tiny_llama()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    Training(path, model=model, changes=changes).train(1)
    for name, p in model.named_parameters():
        move = (p.detach() - before[name]).double()
        assert abs(move.square().mean().sqrt() / (2.0 * 1.5 / 6) - 1) < 5 / math.sqrt(2 * move.numel()), name


def test_epsilon_statement_and_files() -> None:
    plain, grouped = (config(clip_groups=groups, num_steps=9).resolve(60) for groups in (None, "layer"))
    assert plain.epsilon == grouped.epsilon and plain.mechanism == grouped.mechanism
    assert "sqrt(number of modules)" in grouped.describe() and "clip groups" not in plain.describe()
    named = config(clip_groups=NAMES)
    assert named == dpft.PrivacyConfig.from_dict(json.loads(json.dumps(named.to_dict())))
    assert "clip_groups" not in config().to_dict() and named.fingerprint() != config().fingerprint()
    schedule = named.resolve(60)
    assert dpft.PrivacySchedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule
    text = dpft.privacy_statement_markdown(dpft.privacy_report(schedule, 3))
    assert "others: 1, model.embed_tokens: 2, whose squares add up to C^2" in text
    assert "arXiv 1710.06963" in text and "(sensitivity C)" in text


@pytest.mark.parametrize("groups", ["module", {}, {"": 0}, {"": math.nan}, {"": "x"}, 3])
def test_other_groups_are_refused(groups: Any) -> None:
    with pytest.raises(dpft.PrivacyConfigError, match="expected 'layer', or a finite weight"):
        config(clip_groups=groups)


def test_not_with_an_adaptive_norm() -> None:
    with pytest.raises(dpft.PrivacyConfigError, match="one clip norm adapts, and not one for each group"):
        config(clip_groups="layer", adaptive_clip=dpft.AdaptiveClip())


def test_not_with_tokens_spread_over_ranks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dpft.prepare.__globals__, "sequence_size", lambda accelerator: 2)
    for changes, error in (
        ({"clip_groups": "layer"}, dpft.EngineError),
        ({"adaptive_clip": dpft.AdaptiveClip()}, ValueError),
    ):
        with pytest.raises(error, match="sp_size=2"):
            Training(path, changes=changes, max_physical_batch_size=1)


def test_a_model_that_lacks_a_group_is_left_as_it_was(path: Path) -> None:
    model = tiny_llama()
    before = values(model)
    with pytest.raises(ValueError, match="no trainable parameter begins with"):
        Training(path, model=model, changes={"clip_groups": {"": 1, "encoder": 1}})
    assert (values(model) == before).all() and "_dpft_state" not in model.__dict__
