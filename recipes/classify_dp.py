"""Fine-tune a text classifier under differential privacy, with Hugging Face's Trainer.

    accelerate launch recipes/classify_dp.py
    accelerate launch recipes/classify_dp.py --model distilbert-base-uncased --dataset mails.csv --label_column folder

Without arguments: the small BERT kept beside this file learns to which package of Python's standard library a
docstring belongs, at epsilon 8, and again without privacy, in under two minutes on two cores, no network. Every
argument of ``transformers.TrainingArguments`` works, or says what to use instead.
"""

from __future__ import annotations

from finetune.environment import set_threads  # first of all: it sets what torch reads when it is imported

# isort: split
import sys
from dataclasses import dataclass, field

from transformers import AutoTokenizer, DataCollatorWithPadding, HfArgumentParser, Trainer

import dpft
from finetune.comparison import Result, report, without_privacy
from finetune.data.labelled import ENCODER, labelled, load_classifier, measure, tokenised


@dataclass
class Task:
    """What is learnt.

    Attributes:
        model: a folder or a name on the hub.
        dataset: ``docstrings``, a CSV, JSON, JSON-lines or parquet file, or a name on the hub.
        text_column: of the texts.
        label_column: of the labels, whole numbers or words.
        train: all parameters, the last layer with the head, or the head.
        seq_len: tokens of a text; what is longer is cut.
        compare: also without privacy, to show what privacy costs.
        compare_learning_rate: of that; without noise and clipping another one is right.
    """

    model: str = field(default=str(ENCODER), metadata={"help": "folder, or name on the hub"})
    dataset: str = field(default="docstrings", metadata={"help": "docstrings, a file, or a name on the hub"})
    text_column: str = field(default="text", metadata={"help": "column of the texts"})
    label_column: str = field(default="label", metadata={"help": "column of the labels"})
    train: str = field(default="top", metadata={"help": "all, top (last layer and head) or head"})
    seq_len: int = field(default=64, metadata={"help": "tokens of a text"})
    compare: bool = field(default=True, metadata={"help": "also train without privacy"})
    compare_learning_rate: float = field(default=3e-3, metadata={"help": "learning rate without privacy"})


# The demonstration's.
DEFAULTS = {
    "output_dir": "outputs/classify_dp",
    "target_delta": 1e-5,
    "expected_batch_size": 256,
    "max_steps": 60,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "learning_rate": 0.02,
    "lr_scheduler_type": "cosine",
    "adam_beta1": 0.8,
    "adam_beta2": 0.95,
    "logging_steps": 10,
    "save_strategy": "no",
}
EPSILON = 8.0  # where neither an epsilon nor a noise multiplier is given


def main() -> None:
    """Train with and without privacy, and say what both give."""
    parser = HfArgumentParser((Task, dpft.DPTrainingArguments))
    parser.set_defaults(**DEFAULTS)
    task, args = parser.parse_args_into_dataclasses()
    if args.target_epsilon is None and args.noise_multiplier is None:
        args.target_epsilon = EPSILON
    if args.device.type == "cpu":
        set_threads(None, args.world_size)
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    train, test, names = labelled(task.dataset, task.text_column, task.label_column)
    data = [tokenised(part, tokenizer, task.seq_len) for part in (train, test)]
    common = {"train_dataset": data[0], "eval_dataset": data[1], "data_collator": DataCollatorWithPadding(tokenizer)}
    results = []

    trainer = dpft.DPTrainer(
        model=load_classifier(task.model, names, task.train), args=args, compute_metrics=measure, **common
    )
    before = trainer.evaluate()
    results.append(Result("before training", before))
    trainer.train()
    results.append(Result(f"private, epsilon {trainer.epsilon:.2f}", trainer.evaluate(), trainer.epsilon))
    trainer.save_model(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    trainer.create_model_card(model_name="classifier")
    if task.compare:
        plain = Trainer(
            model=load_classifier(task.model, names, task.train),
            args=without_privacy(args, args.expected_batch_size, task.compare_learning_rate),
            compute_metrics=measure,
            **common,
        )
        plain.train()
        results.append(Result("without privacy", plain.evaluate()))
    if trainer.is_world_process_zero():
        report(args.output_dir, results, len(train), len(test), names)


if __name__ == "__main__":
    try:
        main()
    except (dpft.DPFTError, ValueError, FileNotFoundError) as error:
        print(f"classify_dp.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
