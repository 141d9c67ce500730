"""Ways to train by Trainer: bf16, checkpointing, adapters, seq2seq with generation, optimisers, columns, callbacks."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model

import dpft
from dpft.errors import PrivacyConfigError
from tests import zoo
from tests.trainer import setups
from tests.trainer.test_trainer import COUNT, data, trainer_of
from tests.training import collate


@pytest.mark.parametrize(
    "args",
    [
        {"bf16": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"optim": "adamw_torch", "weight_decay": 0.1, "warmup_steps": 1, "lr_scheduler_type": "cosine"},
        {"optim": "adafactor"},
        {"optim": "rmsprop"},
        {"torch_empty_cache_steps": 1, "logging_first_step": True, "eval_on_start": True},
    ],
    ids=lambda args: " ".join(args),
)
def test_it_trains(args: dict[str, Any], tmp_path: Path) -> None:
    privacy = setups.whole_data(COUNT, noise_multiplier=1.0, num_steps=2)
    trainer = trainer_of(tmp_path, privacy=privacy, args={"learning_rate": 1e-2, **args})
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    moved = [not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True)]
    assert all(moved), "each parameter gets noise"
    assert trainer.private_loader.privacy.steps == 2


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "lion_8bit"])
def test_optimisers_of_8_bits(optim: str, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, args={"optim": optim, "learning_rate": 1e-3})
    trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_adapters(tmp_path: Path) -> None:
    """The checkpoint and what is saved are PEFT's; only adapters move."""
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(zoo.LLAMA.build(), config)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    args = {"save_strategy": "steps", "save_steps": 1}
    trainer = trainer_of(tmp_path, model=model, args=args, privacy=setups.whole_data(COUNT, num_steps=2))
    trainer.train()
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())
    saved = PeftModel.from_pretrained(zoo.LLAMA.build(), tmp_path / "out" / "checkpoint-2")
    for name, value in saved.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_seq2seq_with_generation(tmp_path: Path) -> None:
    """Exact by example, and predictions are generated."""
    torch.manual_seed(0)
    config = hf.BartConfig(
        vocab_size=zoo.VOCAB,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=32,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    model = hf.BartForConditionalGeneration(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5.0)
    plain = hf.BartForConditionalGeneration(config)
    plain.load_state_dict(model.state_dict())
    args = setups.arguments(
        hf.Seq2SeqTrainingArguments, tmp_path / "out", predict_with_generate=True, generation_max_length=6
    )
    rows = [{k: v for k, v in row.items() if k in ("input_ids", "attention_mask", "labels")} for row in data()]
    trainer: Any = dpft.private_trainer(hf.Seq2SeqTrainer)(
        model=model, args=args, train_dataset=rows, data_collator=collate, privacy=setups.whole_data(COUNT)
    )
    found = setups.moved(model, trainer.train)
    losses = [lambda row=row: plain(**collate([row])).loss for row in rows]
    setups.assert_same(found, setups.clipped_mean(plain, losses))
    assert trainer.predict(rows[:2]).predictions.shape[0] == 2


def test_columns_that_the_model_does_not_take_are_left_out(tmp_path: Path) -> None:
    """As Trainer does: also a ``label``, of which the collator makes ``labels``."""
    records = [
        {"input_ids": row["input_ids"].tolist(), "name": f"record {i}", "label": i % 2} for i, row in enumerate(data())
    ]
    model = hf.BertForSequenceClassification(
        hf.BertConfig(
            vocab_size=zoo.VOCAB,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=32,
        )
    )
    for dataset in (Dataset.from_list(records), records):
        trainer = dpft.DPTrainer(
            model=model,
            args=setups.arguments(hf.TrainingArguments, tmp_path / type(dataset).__name__, learning_rate=1e-3),
            train_dataset=dataset,
            processing_class=setups.tokenizer(),
            privacy=setups.whole_data(COUNT),
        )
        trainer.train()
        assert trainer.private_loader is not None
        trainer.private_loader.privacy.close()
        dpft.unwrap(model)


class Counting(hf.TrainerCallback):
    """How often each event was."""

    def __init__(self) -> None:
        self.steps = self.saves = self.epochs = self.logs = 0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps += 1

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self.saves += 1

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.epochs += 1

    def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
        self.logs += "loss" in logs


def test_callbacks_are_called_by_steps_and_epochs(tmp_path: Path) -> None:
    """Three epochs of two steps each, whatever the number of physical batches in a step."""
    counting = Counting()
    privacy = setups.whole_data(COUNT, expected_batch_size=3, num_steps=None, num_epochs=3.0)
    args = {"logging_steps": 2, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 1}
    trainer = trainer_of(tmp_path, privacy=privacy, args=args, callbacks=[counting])
    trainer.train()
    assert (counting.steps, counting.logs, counting.saves, counting.epochs) == (6, 3, 2, 3)
    names = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))
    assert names == ["checkpoint-3", "checkpoint-6"]


class Ends(hf.TrainerCallback):
    """At which steps epochs ended; stops after three steps if asked to, as if the training had been interrupted."""

    def __init__(self, stop: int | None = None) -> None:
        self.at: list[int] = []
        self.stop = stop

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.at.append(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = control.should_training_stop or state.global_step == self.stop


def test_a_resumed_epoch_ends_where_it_would_have(tmp_path: Path) -> None:
    """Epochs of two steps; resumed after the third step."""
    privacy = setups.whole_data(COUNT, expected_batch_size=3, num_steps=None, num_epochs=3.0)
    args = {"save_strategy": "steps", "save_steps": 1}
    first, second = Ends(stop=3), Ends()
    trainer = trainer_of(tmp_path, privacy=privacy, args=args, callbacks=[first])
    trainer.train()
    trainer.private_loader.privacy.close()
    assert first.at == [2, 3]
    resumed = trainer_of(tmp_path, privacy=privacy, args=args, callbacks=[second])
    done = resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert second.at == [4, 6] and done.global_step == 6 and resumed.private_loader.privacy.steps == 6


def ragged() -> list[dict[str, Any]]:
    """The examples without padding, of different numbers of tokens."""
    return [{k: v[: 4 + (5 * i) % COUNT].tolist() for k, v in item.items()} for i, item in enumerate(data())]


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        (lambda: ragged(), [9, 8, 7, 6, 5, 4]),
        (lambda: Dataset.from_list(ragged()).with_format("torch"), [9, 8, 7, 6, 5, 4]),
        (lambda: Dataset.from_list([{**x, "length": -len(x["labels"]) + 9} for x in ragged()]), [4, 5, 6, 7, 8, 9]),
        (lambda: Dataset.from_list([{**x, "size": -len(x["labels"]) + 9} for x in ragged()]), [4, 5, 6, 7, 8, 9]),
    ],
    ids=["a list", "Arrow", "a column", "a named column"],
)
def test_group_by_length_sorts_within_the_logical_batch(dataset: Any, expected: list[int], tmp_path: Path) -> None:
    """Longest first, as Trainer finds lengths; and the update is that without it."""
    examples, found = dataset(), {}
    named = {"length_column_name": "size"} if "size" in getattr(examples, "column_names", ()) else {}
    for strategy in ("random", "group_by_length"):
        order: list[int] = []

        def collate_noting(items: list[Any], order: list[int] = order) -> dict[str, torch.Tensor]:
            order += [len(item["labels"]) for item in items]
            return collate([{k: torch.as_tensor(v) for k, v in item.items()} for item in items])

        args = {"per_device_train_batch_size": 1, "train_sampling_strategy": strategy, **named}
        trainer = dpft.DPTrainer(
            model=zoo.LLAMA.build(),
            args=setups.arguments(hf.TrainingArguments, tmp_path / strategy, **args),
            train_dataset=examples,
            data_collator=collate_noting,
            privacy=setups.whole_data(COUNT),
        )
        found[strategy] = setups.moved(trainer.model, trainer.train), order
    setups.assert_same(found["group_by_length"][0], found["random"][0])
    assert found["group_by_length"][1] == expected != found["random"][1]


def test_group_by_length_needs_lengths(tmp_path: Path) -> None:
    args = setups.arguments(hf.TrainingArguments, tmp_path, train_sampling_strategy="group_by_length")
    options: dict[str, Any] = {"model": zoo.LLAMA.build(), "args": args, "privacy": setups.whole_data(COUNT)}
    trainer = dpft.DPTrainer(train_dataset=[{"pixels": 1}] * COUNT, **options)
    with pytest.raises(PrivacyConfigError, match=r"needs 'input_ids'.*column 'length'.*got \['pixels'\]"):
        trainer.train()
