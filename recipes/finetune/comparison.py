"""What a private training gives, beside the same without privacy: a table and a file."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

import dpft

# Not taken over: objects that the arguments have made of what was given, by an engine's launcher.
_MADE = ("deepspeed", "fsdp", "fsdp_config", "accelerator_config", "parallelism_config")
NOTE = "metrics of an evaluation: computed from records without noise, and covered by no epsilon"


@dataclass
class Result:
    """One model's metrics.

    Attributes:
        name: which model.
        metrics: of an evaluation.
        epsilon: spent on it; None where nothing was private.
    """

    name: str
    metrics: dict[str, float] = field(default_factory=dict)
    epsilon: float | None = None


def report(folder: str, results: list[Result], train: int, test: int) -> None:
    """Print a line for each result, and write ``comparison.json``."""
    width = max(len(result.name) for result in results)
    print(f"\n{train} records to train on, {test} to evaluate with")
    print(" " * width + "       loss")
    for result in results:
        print(f"{result.name:<{width}}  {result.metrics['eval_loss']:9.3f}")
    content: dict[str, Any] = {"note": NOTE, "results": [asdict(result) for result in results]}
    Path(folder, "comparison.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    print(f"\nmodel, privacy statement and ledger: {folder}")


def without_privacy(args: Any, batch_size: int, learning_rate: float) -> Any:
    """Arguments of the same training without privacy: batches of as many examples, as many steps, the same optimiser.

    Args:
        args: of the private training; ``DPTrainingArguments`` become ``TrainingArguments``.
        batch_size: examples of a step.
        learning_rate: the best one without clipping and noise is another.
    """
    cls = TrainingArguments if isinstance(args, dpft.DPTrainingArguments) else type(args)
    same = {f.name: getattr(args, f.name) for f in dataclasses.fields(cls) if f.init and f.name not in _MADE}
    each = args.per_device_train_batch_size * args.world_size
    changed = {
        "learning_rate": learning_rate,
        "gradient_accumulation_steps": max(1, round(batch_size / each)),
        "average_tokens_across_devices": True,
        "ignore_data_skip": False,
        "output_dir": str(Path(args.output_dir) / "without_privacy"),
    }
    return cls(**{**same, **changed})
