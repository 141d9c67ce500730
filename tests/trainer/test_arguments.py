"""Every field of TrainingArguments works, is set with a line that says so, or is refused with what to use instead."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

import dpft
from dpft.errors import PrivacyConfigError
from dpft.trainer.arguments import RULES, WORKS, apply_rules
from tests.trainer.setups import whole_data

REFUSED = {
    "max_grad_norm": (0.3, "PrivacyConfig.max_grad_norm"),
    "gradient_accumulation_steps": (8, "expected_batch_size"),
    "fp16": (True, "bf16"),
    "torch_compile": (True, "Leave it out"),
    "use_liger_kernel": (True, "dpft computes the head"),
    "neftune_noise_alpha": (5.0, "not be isolated"),
    "auto_find_batch_size": (True, "dpft.plan"),
    "include_num_input_tokens_seen": ("all", "number of drawn tokens"),
    "dataloader_drop_last": (True, "every drawn example"),
    "train_sampling_strategy": ("sequential", "PrivacyConfig.sampler"),
    "debug": ("underflow_overflow", "activations"),
}
OPTIMISERS = {
    "lomo": "within the backward",
    "adalomo": "within the backward",
    "galore_adamw_layerwise": "within the backward",
    "apollo_adamw_layerwise": "within the backward",
    "schedule_free_adamw": "switched between",
}


def made(tmp_path: Path, **changes: Any) -> hf.TrainingArguments:
    return hf.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], **changes)


def test_every_field_is_sorted() -> None:
    fields = {field.name for field in dataclasses.fields(hf.TrainingArguments)}
    assert fields <= WORKS | RULES.keys(), f"new fields: {sorted(fields - WORKS - RULES.keys())}"
    assert not WORKS & RULES.keys()
    assert RULES.keys() == REFUSED.keys() | {
        *("max_steps", "num_train_epochs", "optim", "ignore_data_skip", "average_tokens_across_devices"),
        *("hub_strategy", "report_to"),
    }


def test_the_defaults_pass(tmp_path: Path) -> None:
    apply_rules(made(tmp_path), whole_data(6))


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path) -> None:
    value, instead = REFUSED[name]
    args = made(tmp_path)
    setattr(args, name, value)
    with pytest.raises(PrivacyConfigError, match=f"{name}={value!r}.*{instead}"):
        apply_rules(args, whole_data(6))


@pytest.mark.parametrize("name", OPTIMISERS)
def test_optimisers_that_do_not_step_on_a_sum_are_refused(name: str, tmp_path: Path) -> None:
    args = made(tmp_path)
    args.optim = hf.training_args.OptimizerNames(name)
    with pytest.raises(PrivacyConfigError, match=OPTIMISERS[name]):
        apply_rules(args, whole_data(6))


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_what_would_publish_losses_is_refused(strategy: str, tmp_path: Path) -> None:
    args = made(tmp_path)
    args.push_to_hub, args.hub_strategy = True, hf.trainer_utils.HubStrategy(strategy)
    with pytest.raises(PrivacyConfigError, match=r"trainer_state\.json"):
        apply_rules(args, whole_data(6))
    args.hub_strategy, args.report_to = hf.trainer_utils.HubStrategy.END, ["tensorboard"]
    with pytest.raises(PrivacyConfigError, match="tensorboard"):
        apply_rules(args, whole_data(6))


def test_what_is_set_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    args = made(tmp_path)
    with caplog.at_level(logging.INFO, logger="dpft"):
        apply_rules(args, whole_data(6))
    assert args.ignore_data_skip and not args.average_tokens_across_devices
    assert "ignore_data_skip set to True" in caplog.text and "average_tokens_across_devices set" in caplog.text


def test_losses_that_leave_the_machine_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    args = made(tmp_path)
    for trackers, said in ((["tensorboard"], False), (["tensorboard", "wandb"], True)):
        args.report_to = trackers
        caplog.clear()
        apply_rules(args, whole_data(6))
        assert ("['wandb'] sends training losses" in caplog.text) == said


@pytest.mark.parametrize(
    ("steps", "privacy", "message"),
    [(5, {"num_steps": 4}, "Give both the same"), (5, {"num_steps": None, "num_epochs": 2.0}, "calibrated for one")],
)
def test_two_numbers_of_steps_are_refused(steps: int, privacy: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(PrivacyConfigError, match=message):
        apply_rules(made(tmp_path, max_steps=steps), whole_data(6, **privacy))


def test_privacy_of_the_arguments(tmp_path: Path) -> None:
    args = dpft.DPTrainingArguments(
        str(tmp_path), use_cpu=True, noise_multiplier=1.5, target_delta=1e-5, expected_batch_size=3, max_grad_norm=0.7
    )
    privacy = args.privacy()
    assert (privacy.noise_multiplier, privacy.max_grad_norm, privacy.num_epochs) == (1.5, 0.7, 3.0)
    apply_rules(args, privacy)
    args.max_steps = 7
    assert args.privacy().num_steps == 7 and args.privacy().num_epochs is None
