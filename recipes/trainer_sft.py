"""Fine-tune a language model under differential privacy, with TRL's SFTTrainer: two lines differ from TRL's own use.

    accelerate launch recipes/trainer_sft.py
    accelerate launch recipes/trainer_sft.py --model Qwen/Qwen3-0.6B --dataset chats.jsonl --max_length 1024 --bf16

Without arguments: the small Llama kept beside this file learns from the docstrings of Python's standard library at
epsilon 8, and again without privacy, in under two minutes on two cores, no network. The records are what SFTTrainer
takes: ``text``, ``prompt`` and ``completion``, or ``messages``. Every argument of TRL's ``SFTConfig`` works, or says
what to use instead. Needs TRL: ``pip install 'dpft[trl]'``, Python 3.11 or newer.
"""

from __future__ import annotations

from finetune.environment import set_threads  # first of all: it sets what torch reads when it is imported

# isort: split
import sys
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

import dpft
from finetune.comparison import Result, report, without_privacy
from finetune.data.loading import load_texts
from finetune.options import BASE_MODEL
from finetune.privacy_options import MECHANISMS, SAMPLER_OF

try:
    from trl import SFTConfig, SFTTrainer
except ImportError as missing:
    raise SystemExit("trainer_sft.py: error: TRL is missing; pip install 'dpft[trl]', on Python 3.11+") from missing


@dataclass
class Task:
    """What is learnt, and how privately.

    Attributes:
        model: a folder or a name on the hub.
        dataset: ``docstrings``, ``tickets``, a file, or a name on the hub.
        target_epsilon: the budget, 8 if not given; or give ``noise_multiplier``.
        target_delta: delta.
        noise_multiplier: sigma.
        expected_batch_size: examples of a logical batch, in expectation.
        clip_norm: C.
        mechanism: of the noise, as ``dpft.PrivacyConfig``; with ``bands`` or ``buffers``.
        bands: of ``bandmf``.
        buffers: of ``blt``.
        sampler: if not given, the one of the mechanism.
        account: that the private training pays from.
        compare: also without privacy, to show what privacy costs.
        compare_learning_rate: of that; without noise and clipping another one is right.
    """

    model: str = field(default=str(BASE_MODEL), metadata={"help": "folder, or name on the hub"})
    dataset: str = field(default="docstrings", metadata={"help": "docstrings, tickets, a file, or a name on the hub"})
    target_epsilon: float | None = field(default=None, metadata={"help": "privacy budget epsilon; 8 if not given"})
    target_delta: float = field(default=1e-6, metadata={"help": "well below 1 / number of records"})
    noise_multiplier: float | None = field(default=None, metadata={"help": "in the place of an epsilon"})
    expected_batch_size: int = field(default=320, metadata={"help": "records of a step, in expectation"})
    clip_norm: float = field(default=1.0, metadata={"help": "largest norm of a record's gradient"})
    mechanism: str = field(default="dp_sgd", metadata={"help": "of the noise", "choices": MECHANISMS})
    bands: int | None = field(default=None, metadata={"help": "of bandmf"})
    buffers: int | None = field(default=None, metadata={"help": "of blt"})
    sampler: str | None = field(default=None, metadata={"help": "poisson; of bandmf and blt their own"})
    account: str | None = field(default=None, metadata={"help": "file of the dpft.Account that it pays from"})
    compare: bool = field(default=True, metadata={"help": "also train without privacy"})
    compare_learning_rate: float = field(default=4e-3, metadata={"help": "learning rate without privacy"})


# The demonstration's; TRL's own are in the way of two cores.
DEFAULTS = {
    "output_dir": "outputs/trainer_sft",
    "max_steps": 12,
    "max_length": 96,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "learning_rate": 8e-3,
    "adam_beta1": 0.8,
    "adam_beta2": 0.95,
    "lr_scheduler_type": "cosine",
    "logging_steps": 2,
    "save_strategy": "no",
    "gradient_checkpointing": False,
    "bf16": False,
}


def main() -> None:
    """Train with and without privacy, and say what both give."""
    parser = HfArgumentParser((Task, SFTConfig))
    parser.set_defaults(**DEFAULTS)
    task, args = parser.parse_args_into_dataclasses()
    if args.device.type == "cpu":
        set_threads(None, args.world_size)
    train, test = load_texts(task.dataset)
    test = test.select(range(min(256, len(test))))
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    given = task.target_epsilon is not None or task.noise_multiplier is not None
    privacy = dpft.PrivacyConfig(
        target_epsilon=task.target_epsilon if given else 8.0,
        noise_multiplier=task.noise_multiplier,
        target_delta=task.target_delta,
        expected_batch_size=task.expected_batch_size,
        max_grad_norm=task.clip_norm,
        num_steps=args.max_steps if args.max_steps > 0 else None,
        num_epochs=None if args.max_steps > 0 else args.num_train_epochs,
        mechanism=cast(Any, task.mechanism),
        bands=task.bands,
        buffers=task.buffers,
        sampler=cast(Any, task.sampler or SAMPLER_OF.get(task.mechanism, "poisson")),
    )

    def load() -> Any:
        dtype = torch.bfloat16 if args.bf16 else torch.float32
        return AutoModelForCausalLM.from_pretrained(task.model, dtype=dtype)

    common = {"train_dataset": train, "eval_dataset": test, "processing_class": tokenizer}
    paid = {"privacy_options": {"account": task.account}} if task.account else {}
    trainer = dpft.private_trainer(SFTTrainer)(model=load(), args=args, privacy=privacy, **paid, **common)
    results = [Result("before training", trainer.evaluate())]
    trainer.train()
    results.append(Result(f"private, epsilon {trainer.epsilon:.2f}", trainer.evaluate(), trainer.epsilon))
    trainer.save_model(args.output_dir)
    trainer.create_model_card(model_name="private")
    trainer.private_loader.privacy.close()  # the account gets back what was not spent
    if task.compare:
        plain = SFTTrainer(
            model=load(), args=without_privacy(args, task.expected_batch_size, task.compare_learning_rate), **common
        )
        plain.train()
        results.append(Result("without privacy", plain.evaluate()))
    if trainer.is_world_process_zero():
        report(args.output_dir, results, len(train), len(test))


if __name__ == "__main__":
    try:
        main()
    except (dpft.DPFTError, ValueError, FileNotFoundError) as error:
        print(f"trainer_sft.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
