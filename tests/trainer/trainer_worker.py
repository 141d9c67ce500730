"""A private training by Trainer, or the same one by a loop with ``dpft.prepare``, as a launcher starts it.

    trainer_worker.py FOLDER loop|trainer|killed|resumed|pairs

Both without noise, and with the same seed of the sampler, so that their weights must be equal. ``killed`` ends itself
by SIGKILL on rank 0 in the step after the checkpoint, ``resumed`` goes on from there. ``pairs`` is one step of all
examples, each with two rows, by each strategy.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
import transformers.trainer
from torch import Tensor

import dpft
from tests import zoo
from tests.engines.on_cpu import OnCPU, make_accelerator, use_cpu
from tests.training import collate

EXAMPLES, STEPS, SAVED, RATE, SEED = 14, 4, 2, 0.05, 5
PRIVACY = dpft.PrivacyConfig(
    target_delta=1e-3, expected_batch_size=6, noise_multiplier=0.0, num_steps=STEPS, max_grad_norm=0.5
)


def examples() -> list[dict[str, Tensor]]:
    """The zoo's token batch, one dictionary each."""
    batch = zoo.token_batch(EXAMPLES, 9, seed=3)
    return [{name: value[i] for name, value in batch.items()} for i in range(EXAMPLES)]


class KilledCallback(transformers.TrainerCallback):
    """SIGKILL in the step after the checkpoint, when its release is in the ledger."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == SAVED + 1 and args.process_index == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def by_trainer(folder: Path, killed: bool, resumed: bool) -> tuple[Any, Any, dict[str, Any]]:
    """Accelerator, model, and what the Trainer says of itself."""
    use_cpu()
    setattr(transformers.trainer, "Accelerator", OnCPU)  # noqa: B010  # a class is no variable to mypy
    args = transformers.TrainingArguments(
        str(folder / "out"),
        per_device_train_batch_size=2,
        learning_rate=RATE,
        lr_scheduler_type="linear",
        optim="sgd",
        logging_steps=1,
        save_steps=SAVED,
        report_to=[],
        disable_tqdm=True,
        save_total_limit=2,
    )
    trainer = dpft.DPTrainer(
        model=zoo.LLAMA.build(),
        args=args,
        train_dataset=examples(),
        eval_dataset=examples()[:3],
        data_collator=collate,
        privacy=PRIVACY,
        privacy_options={"test_seed": SEED, "ledger_path": folder / "ledger.jsonl"},
        callbacks=[KilledCallback()] if killed else None,
    )
    done = trainer.train(resume_from_checkpoint=str(folder / "out" / f"checkpoint-{SAVED}") if resumed else None)
    trainer.save_model(str(folder / "saved"))
    facts = {
        "global step": done.global_step,
        "evaluated": trainer.evaluate()["eval_loss"],
        "logged": [row.get("epsilon") for row in trainer.state.log_history if "loss" in row],
        "rates": [row["learning_rate"] for row in trainer.state.log_history if "loss" in row],
    }
    assert trainer.private_loader is not None
    facts["ledger"] = trainer.private_loader.privacy.steps
    return trainer.accelerator, trainer.model_wrapped, facts


def by_loop(folder: Path) -> tuple[Any, Any, dict[str, Any]]:
    """The loop of the README, with the Trainer's optimiser and schedule."""
    accelerator = make_accelerator()
    model: Any = zoo.LLAMA.build()
    # Trainer's groups: an engine keeps them apart, and sums round by it
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    model, optimizer, loader = dpft.prepare(
        accelerator,
        model,
        optimizer,
        examples(),
        PRIVACY,
        collate_fn=collate,
        max_physical_batch_size=2,
        test_seed=SEED,
        ledger_path=folder / "ledger.jsonl",
    )
    scheduler = transformers.get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=STEPS)
    for batch in loader:
        model.train()
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
        if loader.is_last:
            scheduler.step()
    return accelerator, model, {"ledger": loader.privacy.steps}


def two_rows(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Each item's row, and after all of them each item's row with other tokens."""
    batch = collate(items)
    other = {**batch, "input_ids": (batch["input_ids"] + 1) % zoo.VOCAB}
    both = {name: torch.cat([value, other[name]]) for name, value in batch.items()}
    return {**both, "example_ids": torch.arange(len(items)).repeat(2)}


def by_pairs(folder: Path) -> None:
    """The weights after one step, by strategy."""
    accelerator = make_accelerator()
    for strategy in ("one_pass", "two_pass", "per_example"):
        model: Any = zoo.LLAMA.build()
        model, optimizer, loader = dpft.prepare(
            accelerator,
            model,
            torch.optim.SGD(model.parameters(), lr=1.0),
            examples(),
            replace(PRIVACY, num_steps=1, expected_batch_size=EXAMPLES),
            collate_fn=two_rows,
            max_physical_batch_size=3,
            test_seed=SEED,
            strategy=strategy,  # type: ignore[arg-type]  # mypy takes it for a str
            ledger_path=folder / f"{strategy}.jsonl",
        )
        for batch in loader:
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
        weights = accelerator.get_state_dict(model)
        if accelerator.is_main_process:
            torch.save(dict(weights), folder / f"{strategy}.pt")
        loader.privacy.close()
        accelerator.free_memory()
    accelerator.end_training()


def main() -> None:
    """Train, and write the weights and the facts of rank 0."""
    folder, way = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    if way == "pairs":
        by_pairs(folder)
        return
    if way == "loop":
        accelerator, model, facts = by_loop(folder)
    else:
        accelerator, model, facts = by_trainer(folder, way == "killed", way == "resumed")
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        torch.save(dict(weights), folder / f"{way}.pt")
        (folder / f"{way}.json").write_text(json.dumps(facts))
    accelerator.end_training()
    # Gloo's threads outlive the group while Trainer's objects refer to it; one that needs the interpreter when this
    # has ended aborts the process (seen once in some hundred launches): all is written, so end without the finalisers.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
