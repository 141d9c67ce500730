"""TRL's Trainers, private: each example's loss is what TRL computes for it alone; TRL's own example commands run."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig

import dpft
from dpft.errors import PrivacyConfigError
from tests.trainer import setups

# trl re-exports its names in a way that mypy takes for private.
trl: Any = pytest.importorskip("trl", reason="TRL needs Python 3.11")
PAIRS = 6


def llama(folder: Path, cls: Any = hf.LlamaForCausalLM) -> Any:
    if not folder.exists():
        setups.saved_llama(folder, cls)
    return cls.from_pretrained(folder)


def alone(plain: Any) -> list[Any]:
    """TRL's loss of each example, of its own Trainer, in batches of one."""
    batches = [plain._prepare_inputs(plain.data_collator([plain.train_dataset[i]])) for i in range(PAIRS)]
    plain.model.train()
    return [lambda batch=batch: plain.compute_loss(plain.model, dict(batch)) for batch in batches]


def compared(private: Any, plain: Any) -> None:
    """One step of the private Trainer against the clipped gradients of TRL's losses."""
    found = setups.moved(private.model, private.train)
    setups.assert_same(found, setups.clipped_mean(plain.model, alone(plain)))


def options(tmp_path: Path, name: str, config: Any, model: Any, dataset: Any, **changes: Any) -> dict[str, Any]:
    args = setups.arguments(config, tmp_path / name, max_length=32, gradient_checkpointing=False, **changes)
    return {"model": model, "args": args, "train_dataset": dataset, "processing_class": setups.tokenizer()}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sft(checkpointing: bool, tmp_path: Path) -> None:
    made = [
        options(tmp_path, name, trl.SFTConfig, llama(tmp_path / "base"), setups.completions(PAIRS))
        for name in ("private", "plain")
    ]
    made[0]["args"].gradient_checkpointing = checkpointing
    private = dpft.private_trainer(trl.SFTTrainer)(**made[0], privacy=setups.whole_data(PAIRS))
    compared(private, trl.SFTTrainer(**made[1]))


@pytest.mark.parametrize("way", ["sigmoid", "ipo", "sigmoid and sft", "weighted", "adapters", "precomputed"])
def test_dpo(way: str, tmp_path: Path) -> None:
    """With a frozen reference, with adapters that are switched off for it, and with its values in the data."""
    changes: dict[str, Any] = {
        "ipo": {"loss_type": ["ipo"]},
        "sigmoid and sft": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        "weighted": {"use_weighting": True},
        "precomputed": {"precompute_ref_log_probs": True},
    }.get(way, {})
    trainers = []
    for name in ("private", "plain"):
        made = options(
            tmp_path, name, trl.DPOConfig, llama(tmp_path / "base"), setups.pairs(PAIRS), beta=0.1, **changes
        )
        if way == "adapters":
            made["peft_config"] = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        if name == "private":
            trainers.append(dpft.private_trainer(trl.DPOTrainer)(**made, privacy=setups.whole_data(PAIRS)))
        else:
            trainers.append(trl.DPOTrainer(**made))
    private, plain = trainers
    generator = torch.Generator().manual_seed(0)
    values = {
        k: v + (0.2 if "lora" in k else 0.02) * torch.randn(v.shape, generator=generator)
        for k, v in plain.model.state_dict().items()
    }
    for model in (private.model, plain.model):  # off the reference, where all losses are log 2
        model.load_state_dict({k: v.clone() for k, v in values.items()})
    compared(private, plain)


@pytest.mark.parametrize("centred", [None, 0.1])
def test_reward(centred: float | None, tmp_path: Path) -> None:
    trainers = []
    for name in ("private", "plain"):
        model = llama(tmp_path / "base", hf.LlamaForSequenceClassification)
        made = options(
            tmp_path, name, trl.RewardConfig, model, setups.pairs(PAIRS), center_rewards_coefficient=centred
        )
        private = {"privacy": setups.whole_data(PAIRS)} if name == "private" else {}
        cls = dpft.private_trainer(trl.RewardTrainer) if private else trl.RewardTrainer
        trainers.append(cls(**made, **private))
    compared(*trainers)


@pytest.mark.parametrize(
    ("cls", "config", "changes", "message"),
    [
        (trl.SFTTrainer, trl.SFTConfig, {"packing": True}, "packing=True puts several examples"),
        (trl.SFTTrainer, trl.SFTConfig, {"loss_type": "dft"}, "loss_type='dft'"),
        (trl.DPOTrainer, trl.DPOConfig, {"loss_type": ["bco_pair"]}, "compares the pairs"),
        (trl.KTOTrainer, trl.KTOConfig, {}, r"KTOTrainer\.compute_loss"),
    ],
)
def test_refused(cls: Any, config: Any, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    data = setups.completions(PAIRS) if cls is trl.SFTTrainer else setups.pairs(PAIRS)
    made = options(tmp_path, "out", config, llama(tmp_path / "base"), data, **changes)
    with pytest.raises(PrivacyConfigError, match=message):
        dpft.private_trainer(cls)(**made, privacy=setups.whole_data(PAIRS))


def commands(module: Any) -> list[list[str]]:
    """The options of the commands in a script's docstring."""
    found = re.findall(r"python trl/scripts/\w+\.py(.*?)```", module.__doc__, re.DOTALL)
    return [command.replace("\\\n", " ").replace("'", "").split() for command in found]


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1], ids=["full", "lora"])
@pytest.mark.parametrize("script", ["sft", "dpo"])
def test_the_commands_of_trl(script: str, number: int, tmp_path: Path) -> None:
    """As they stand, but for the model and data, which need a network; what is refused is taken out by its message."""
    module = importlib.import_module(f"trl.scripts.{script}")
    config, cls = (trl.SFTConfig, trl.SFTTrainer) if script == "sft" else (trl.DPOConfig, trl.DPOTrainer)
    words = commands(module)[number]
    parser = trl.TrlParser((trl.ScriptArguments, config, trl.ModelConfig))
    words = [w for w in words if w != "--push_to_hub"] + ["--use_cpu", "--bf16", "false", "--report_to", "none"]
    words[words.index("--eos_token") + 1 if "--eos_token" in words else -1] = (
        "<eos>" if "--eos_token" in words else "none"
    )
    _, args, model_args = parser.parse_args_and_config(args=words)
    args.output_dir = str(tmp_path / "out")
    setups.saved_llama(tmp_path / "base")
    data = setups.completions(12) if script == "sft" else setups.pairs(12)
    args.max_length, args.eval_steps, args.logging_steps, args.disable_tqdm = 32, 1, 1, True
    args.max_steps = 2 if args.max_steps > 0 else args.max_steps
    steps = {"num_steps": 2} if args.max_steps > 0 else {"num_steps": None, "num_epochs": args.num_train_epochs}
    privacy = setups.whole_data(6, noise_multiplier=1.0, **steps)

    def make() -> Any:
        return dpft.private_trainer(cls)(
            model=hf.LlamaForCausalLM.from_pretrained(tmp_path / "base"),
            args=args,
            train_dataset=data,
            eval_dataset=data.select(range(3)),
            processing_class=setups.tokenizer(),
            peft_config=trl.get_peft_config(model_args),
            privacy=privacy,
        )

    for name, plain in (("gradient_accumulation_steps", 1), ("packing", False)):
        if getattr(args, name, plain) != plain:
            with pytest.raises(PrivacyConfigError, match=name):
                make()
            setattr(args, name, plain)
    trainer = make()
    done = trainer.train()
    assert done.global_step == 2 and trainer.epsilon > 0
    assert trainer.evaluate()["eval_loss"] > 0
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "privacy_report.json").exists()
