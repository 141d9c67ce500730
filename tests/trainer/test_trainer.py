"""DPTrainer: what it computes, what it writes, what it refuses."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

import dpft
from dpft.errors import PrivacyConfigError
from tests import zoo
from tests.trainer import setups
from tests.training import collate, examples

COUNT = 6


def data() -> list[dict[str, Tensor]]:
    return examples(COUNT, 9)


def trainer_of(tmp_path: Path, cls: Any = None, **options: Any) -> Any:
    changes = {"privacy": setups.whole_data(COUNT), "args": {}, "model": zoo.LLAMA.build(), **options}
    changes["args"] = setups.arguments(hf.TrainingArguments, tmp_path / "out", **changes["args"])
    return (cls or dpft.DPTrainer)(train_dataset=data(), eval_dataset=data()[:3], data_collator=collate, **changes)


def rows() -> list[dict[str, Tensor]]:
    return [collate([item]) for item in data()]


@pytest.mark.parametrize("clip", [setups.CLIP, 0.5])
def test_a_step_is_the_clipped_mean(clip: float, tmp_path: Path) -> None:
    """The max_grad_norm of TrainingArguments, 1.0, does not clip their sum, nor is it averaged over tokens."""
    trainer = trainer_of(tmp_path, privacy=setups.whole_data(COUNT, max_grad_norm=clip))
    found = setups.moved(trainer.model, trainer.train)
    plain = zoo.LLAMA.build()
    expected = setups.clipped_mean(plain, [lambda row=row: plain(**row).loss for row in rows()], clip)
    total = torch.cat([COUNT * t.flatten() for t in expected]).norm()
    assert (total > trainer.args.max_grad_norm) == (clip == 0.5), "only one of the two sums would be clipped again"
    setups.assert_same(found, expected)


def smoothed(logits: Tensor, labels: Tensor) -> Tensor:
    """transformers' label smoothing of one example by 0.1, from its formula."""
    log_p = torch.log_softmax(logits[:, :-1], -1)
    kept = labels[:, 1:] != -100
    nll = -log_p.gather(-1, labels[:, 1:].clamp(min=0).unsqueeze(-1)).squeeze(-1)[kept].mean()
    return 0.9 * nll - 0.1 * log_p.mean(-1)[kept].mean()


def squared(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A loss of the user's."""
    assert num_items_in_batch is None
    return (outputs.logits.float().logsumexp(-1) * (labels != -100)).square().mean()


@pytest.mark.parametrize("way", ["label smoothing", "compute_loss_func"])
def test_losses_of_outputs(way: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"args": {"label_smoothing_factor": 0.1}}
    if way == "compute_loss_func":
        options = {"compute_loss_func": squared}
    trainer = trainer_of(tmp_path, **options)
    found = setups.moved(trainer.model, trainer.train)
    plain = zoo.LLAMA.build()

    def loss(row: dict[str, Tensor]) -> Tensor:
        out = plain(input_ids=row["input_ids"], attention_mask=row["attention_mask"])
        return smoothed(out.logits, row["labels"]) if way == "label smoothing" else squared(out, row["labels"])

    setups.assert_same(found, setups.clipped_mean(plain, [lambda row=row: loss(row) for row in rows()]))


class OwnLoss(hf.Trainer):
    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        out = model(**inputs)
        return (2 * out.loss, out) if return_outputs else 2 * out.loss


class OwnLosses(OwnLoss):
    def per_example_losses(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        logits = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits
        each = F.cross_entropy(logits.mT.float(), inputs["labels"], reduction="none", ignore_index=-100)
        return each.square().sum(1)


def test_losses_of_a_subclass(tmp_path: Path) -> None:
    with pytest.raises(PrivacyConfigError, match=r"OwnLoss\.compute_loss.*Define per_example_losses"):
        trainer_of(tmp_path, dpft.private_trainer(OwnLoss))
    trainer = trainer_of(tmp_path, dpft.private_trainer(OwnLosses))
    found = setups.moved(trainer.model, trainer.train)
    plain = zoo.LLAMA.build()
    host = OwnLosses(model=plain, args=setups.arguments(hf.TrainingArguments, tmp_path / "plain"))
    losses = [lambda row=row: host.per_example_losses(plain, row)[0] for row in rows()]
    setups.assert_same(found, setups.clipped_mean(plain, losses))


class OwnStep(hf.Trainer):
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        return super().training_step(*args, **kwargs)


def test_a_loop_of_its_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PrivacyConfigError, match=r"OwnStep\.training_step"):
        trainer_of(tmp_path, dpft.private_trainer(OwnStep))
    with pytest.raises(PrivacyConfigError, match=r"expected transformers\.Trainer"):
        dpft.private_trainer(nn.Linear)


def test_what_is_written(tmp_path: Path) -> None:
    """Epsilon in logs and state; card and report without what no epsilon covers; weights that transformers loads."""
    privacy = setups.whole_data(COUNT, noise_multiplier=1.0, num_steps=None, num_epochs=1.5, expected_batch_size=3)
    trainer = trainer_of(
        tmp_path, privacy=privacy, args={"save_strategy": "steps", "save_steps": 1, "eval_strategy": "epoch"}
    )
    assert trainer.epsilon == 0.0
    done = trainer.train()
    run = trainer.private_loader.privacy
    assert done.global_step == run.steps == 3 and trainer.state.epoch == pytest.approx(1.5)
    history = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    steps = [row for row in history if "loss" in row]
    assert [row["epsilon"] for row in steps] == pytest.approx([run._meter.at(i) for i in (1, 2, 3)])
    assert (
        done.metrics["epsilon"]
        == trainer.epsilon
        == run.epsilon(exact=True)
        == trainer.privacy_report()["epsilon_spent"]
    )
    assert [row["epoch"] for row in history if "eval_loss" in row] == pytest.approx([1.0])
    trainer.save_model(str(tmp_path / "saved"))
    report = json.loads((tmp_path / "saved" / "privacy_report.json").read_text())
    assert any("not for publication" in line for line in report["assumptions"])
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for a, b in zip(loaded.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(a, b)
    trainer.create_model_card(model_name="x")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## Privacy statement" in card and f"{trainer.epsilon:.4g}" in card
    assert not any(f"{row['loss']:.4f}" in card for row in steps) and "eval_loss" not in card
    assert len(trainer.predict(data()[:3]).predictions) == 3


def test_metrics_are_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[bool] = []
    monkeypatch.setattr(hf.Trainer, "push_to_hub", lambda self, *args, **kwargs: pushed.append(True))
    trainer = trainer_of(tmp_path)
    trainer.train()
    trainer.push_to_hub()
    trainer.save_state()
    trainer.save_metrics("eval", {"eval_loss": 1.0})
    with pytest.raises(PrivacyConfigError, match=r"all_results\.json.*eval_results\.json.*trainer_state\.json"):
        trainer.push_to_hub()
    assert pushed == [True]


def test_a_best_model_is_in_the_statement(tmp_path: Path) -> None:
    args = {
        **{"save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1},
        **{"load_best_model_at_end": True, "metric_for_best_model": "loss"},
    }
    trainer = trainer_of(tmp_path, privacy=setups.whole_data(COUNT, num_steps=2), args=args)
    trainer.train()
    assert any("load_best_model_at_end" in line for line in trainer.privacy_report()["assumptions"])


def test_a_second_training_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    with pytest.raises(PrivacyConfigError, match="before training"):
        trainer.privacy_report()
    trainer.train()
    with pytest.raises(PrivacyConfigError, match="has trained"):
        trainer.train()
    with pytest.raises(PrivacyConfigError, match="trains once for each trial"):
        trainer.hyperparameter_search()
    trainer.private_loader.privacy.close()
    with pytest.raises(dpft.LedgerError, match="releases of an earlier run"):
        trainer_of(tmp_path).train()


def test_a_checkpoint_of_another_kind_is_refused(tmp_path: Path) -> None:
    plain = hf.Trainer(
        model=zoo.LLAMA.build(),
        args=setups.arguments(
            hf.TrainingArguments, tmp_path / "plain", max_steps=1, save_strategy="steps", save_steps=1
        ),
        train_dataset=data(),
        data_collator=collate,
    )
    plain.train()
    with pytest.raises(PrivacyConfigError, match="not one of a private training"):
        trainer_of(tmp_path).train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-1"))


def test_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(PrivacyConfigError, match="got no privacy"):
        trainer_of(tmp_path, privacy=None)
    args = setups.arguments(hf.TrainingArguments, tmp_path / "out", max_steps=1)
    with pytest.raises(PrivacyConfigError, match="without len"):
        dpft.DPTrainer(
            model=zoo.LLAMA.build(), args=args, train_dataset=iter(data()), privacy=setups.whole_data(COUNT)
        )
    declares = setups.arguments(dpft.DPTrainingArguments, tmp_path / "out", max_steps=1, target_epsilon=1.0)
    with pytest.raises(PrivacyConfigError, match="fields declare it too"):  # which epsilon would it be?
        dpft.DPTrainer(model=zoo.LLAMA.build(), args=declares, train_dataset=data(), privacy=setups.whole_data(COUNT))


def test_steps_are_set_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="dpft"):
        trainer = trainer_of(tmp_path, privacy=setups.whole_data(COUNT, num_steps=5))
    assert trainer.args.max_steps == 5 and "max_steps set to 5" in caplog.text
