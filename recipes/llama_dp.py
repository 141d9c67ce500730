"""Fine-tune a causal language model under differential privacy.

    accelerate launch recipes/llama_dp.py
    accelerate launch recipes/llama_dp.py --config recipes/configs/llama_3.2_1b_16k.yaml --dataset my_records.jsonl

Without arguments: the small Llama kept beside this file, the docstrings of Python's standard library as private
records, epsilon 8, a few minutes on two cores, no network. --dry-run says what a run would do and stops.
"""

from __future__ import annotations

from finetune.environment import set_threads  # first of all: it sets what torch reads when it is imported

# isort: split
import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from datasets import disable_progress_bars
from finetune.evaluation import sample_text, validation_loss
from finetune.loop import History, make_optimizer, make_scheduler, train
from finetune.options import Options, parse
from finetune.private import LEDGER, Prepared, explain, prepare, privacy_config, statement, unwrap
from finetune.report import write_report
from finetune.setup import CHECKPOINTS, METRICS, Materials, choose_output, load_materials, load_model, steady_memory
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from dpft import DPFTError

RELOAD_TOLERANCE = 1e-3  # nats; reading back the same numbers differs at most by the order of the sums
KEPT_CHECKPOINTS = 2


@contextmanager
def one_line() -> Iterator[None]:
    """End the program with one line and status 2 where what a person asked for cannot be done.

    For the time before training: what fails later is no wrong option, and shows where.
    """
    try:
        yield
    except (ValueError, OSError, ImportError, DPFTError) as error:
        words = str(error) if isinstance(error, DPFTError) else " ".join(str(error).split())
        print(f"llama_dp.py: error: {words}", file=sys.stderr)
        raise SystemExit(2) from error


def dry_run(options: Options, materials: Materials, model: nn.Module, accelerator: Accelerator) -> None:
    """Say what a run would do, and do nothing."""
    plan = privacy_config(options).resolve(len(materials.train))
    physical = plan.expected_batch_size / accelerator.num_processes / options.max_physical_batch_size
    if options.clipping == "none" and plan.noise_multiplier:
        raise ValueError("--clipping none bounds nothing, so that no noise makes it private; --noise-multiplier 0")
    if options.clipping == "none":
        accelerator.print("NOT PRIVATE: --clipping none")
    accelerator.print(plan.describe())
    accelerator.print(
        f"physical batches   about {physical:.1f} of at most {options.max_physical_batch_size} examples "
        f"for a logical batch, on each of {accelerator.num_processes} process(es) ({accelerator.device})"
    )
    first, *others = explain(model.to(accelerator.device).train(), options)
    accelerator.print(f"execution          {first}")
    for line in others:
        accelerator.print(f"                   {line}")
    accelerator.print(f"memory             {steady_memory(model)}")
    accelerator.print("dry run: nothing was trained, nothing was written")


def latest_checkpoint(output: Path) -> Path | None:
    """The checkpoint with the highest step, or None. One that was not written to its end has another name."""
    return max(_checkpoints(output), key=_step, default=None)


def save_checkpoint(accelerator: Accelerator, output: Path, step: int) -> None:
    """Save the state after a step: under another name until it is whole, since the process may die meanwhile."""
    folder = output / CHECKPOINTS / f"step_{step}"
    partial = folder.with_name(f"partial_step_{step}")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        for old in sorted(_checkpoints(output), key=_step)[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def _checkpoints(output: Path) -> list[Path]:
    return [p for p in (output / CHECKPOINTS).glob("step_*") if p.name.removeprefix("step_").isdigit()]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def save_and_check(
    accelerator: Accelerator, prepared: Prepared, materials: Materials, output: Path, after: float
) -> None:
    """Save the model so that transformers loads it, and check that it does, with the same validation loss.

    Raises:
        RuntimeError: the model that was read back has another loss.
    """
    state = accelerator.get_state_dict(prepared.model)
    bare = unwrap(accelerator, prepared.model)
    if hasattr(bare, "merge_and_unload"):  # LoRA: keep the adapter, and save the whole model, which needs no peft
        bare.save_pretrained(output / "adapter", is_main_process=accelerator.is_main_process, state_dict=state)
        bare = bare.merge_and_unload()
        state = bare.state_dict()
    bare.config.use_cache = True
    bare.save_pretrained(output, is_main_process=accelerator.is_main_process, state_dict=state)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return
    materials.tokenizer.save_pretrained(output)
    dtype = next(bare.parameters()).dtype
    again = AutoModelForCausalLM.from_pretrained(output, dtype=dtype).to(accelerator.device)
    reloaded = validation_loss(again, materials.validation, materials.collate)
    # bfloat16 weights that an adapter was merged into were rounded once more
    tolerance = RELOAD_TOLERANCE if dtype == torch.float32 else 2e-2
    if not abs(reloaded - after) <= tolerance:
        raise RuntimeError(
            f"the model saved in {str(output)!r} has a validation loss of {reloaded:.4f}, expected {after:.4f} as "
            "before saving. Do not use it; the last checkpoint is intact."
        )


def train_without_privacy(
    options: Options, materials: Materials, accelerator: Accelerator, history: History, steps: int
) -> float:
    """Train a fresh copy for as many steps of as many examples without clipping or noise; its validation loss.

    Raises:
        ValueError: there are several processes.
    """
    if accelerator.num_processes > 1:
        raise ValueError("--compare-nonprivate runs in one process; leave it out, or launch one process.")
    model = load_model(options).to(accelerator.device).train()
    optimizer = make_optimizer(options, model)
    scheduler = make_scheduler(options, optimizer, steps)
    generator = torch.Generator().manual_seed(options.seed)
    size = min(round(options.expected_batch_size), len(materials.train))
    before = validation_loss(model, materials.validation, materials.collate)
    history.add({"step": 0, "nonprivate_validation_loss": before})
    for step in range(1, steps + 1):
        drawn = torch.randperm(len(materials.train), generator=generator)[:size].tolist()
        for start in range(0, size, options.max_physical_batch_size):
            part = drawn[start : start + options.max_physical_batch_size]
            batch = materials.collate([materials.train[i] for i in part])
            batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
            (model(**batch).loss * (len(part) / size)).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if accelerator.is_main_process and step % 10 == 0:
            accelerator.print(f"without privacy: step {step} of {steps}")
    after = validation_loss(model, materials.validation, materials.collate)
    history.add({"step": steps, "nonprivate_validation_loss": after})
    return after


def run(options: Options) -> int:
    """Run the recipe; 0 at its end, 130 if it was interrupted."""
    began = time.perf_counter()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    with one_line():
        if options.with_tracking and not get_available_trackers():
            raise ImportError("--with-tracking: no tracker is installed: pip install tensorboard (or another).")
        accelerator = Accelerator(
            log_with="all" if options.with_tracking and not options.dry_run else None, project_dir="."
        )
        if accelerator.device.type == "cpu":
            set_threads(options.cpu_threads, accelerator.num_processes)
        materials = load_materials(options, accelerator)
        model = load_model(options)
        if options.dry_run:
            dry_run(options, materials, model, accelerator)
            return 0
        output = choose_output(options, accelerator)
    accelerator.project_configuration.set_directories(str(output))
    accelerator.init_trackers("llama_dp")
    history = History(output / METRICS if accelerator.is_main_process else None)

    def evaluate(network: nn.Module) -> float:
        return validation_loss(network, materials.validation, materials.collate, accelerator)

    def sample(network: Any) -> str:
        return sample_text(network, materials.tokenizer, options.prompt, options.sample_tokens, options.seed)

    samples: dict[str, str] = {}
    if options.sample_tokens:
        samples["before"] = sample(model)
    accelerator.print("calibrating the noise ...")
    with one_line():
        checkpoint = latest_checkpoint(output) if options.resume_from_checkpoint else None
        if options.resume_from_checkpoint and checkpoint is None:
            raise FileNotFoundError(
                f"--resume-from-checkpoint: no checkpoint in {str(output / CHECKPOINTS)!r}; expected one, as "
                "--checkpoint-every or Ctrl-C writes it. Start anew: another --output-dir, or --overwrite-output-dir."
            )
        optimizer = make_optimizer(options, model)
        prepared = prepare(
            accelerator,
            model,
            optimizer,
            materials.train,
            privacy_config(options),
            materials.collate,
            options,
            output / LEDGER,
        )
        plan = prepared.plan
        scheduler = make_scheduler(options, prepared.optimizer, plan.num_steps)
        accelerator.register_for_checkpointing(scheduler)
        if checkpoint is not None:
            history.read()
            accelerator.load_state(str(checkpoint))
    history.start(prepared.private)
    warning = "" if prepared.private else "NOT PRIVATE: "
    accelerator.print(plan.describe())
    if plan.private and not prepared.private:
        accelerator.print(f"{warning}--clipping {options.clipping}")
    if checkpoint is not None:
        history.add({"step": prepared.step, "resumed_from_step": _step(checkpoint)})
        accelerator.print(
            f"resumed: weights of step {_step(checkpoint)}, {prepared.step} steps released by the ledger, "
            f"{spent_words(prepared)}"
        )
    before = next((row["validation_loss"] for row in history.rows if "validation_loss" in row), None)
    if before is None:
        before = evaluate(prepared.model)
        history.add({"step": 0, "validation_loss": before, "epsilon": 0.0 if prepared.private else None})
    accelerator.print(f"validation loss before: {before:.3f} nats a token, {len(materials.validation)} examples")
    setup_seconds = time.perf_counter() - began

    trained_from = time.perf_counter()
    finished = train(
        accelerator,
        prepared,
        options,
        history,
        evaluate,
        scheduler,
        lambda step: save_checkpoint(accelerator, output, step),
    )
    training_seconds = time.perf_counter() - trained_from
    if not finished:
        accelerator.print(
            f"interrupted after step {prepared.step} of {plan.num_steps}, {spent_words(prepared)}; go on with the "
            f"same options and --resume-from-checkpoint --output-dir {output}"
        )
        accelerator.end_training()
        return 130
    after = evaluate(prepared.model)
    history.add({"step": prepared.step, "validation_loss": after, "epsilon": prepared.epsilon()})
    accelerator.print(f"{warning}validation loss after: {after:.3f} nats a token (before: {before:.3f})")
    # asked for before the model is unwrapped and saved: it needs the ledger and the optimiser
    words = statement(prepared, options)
    spent = prepared.epsilon(exact=True)
    save_and_check(accelerator, prepared, materials, output, after)
    if options.sample_tokens and accelerator.is_main_process:
        samples["after"] = sample(AutoModelForCausalLM.from_pretrained(output).to(accelerator.device))
        for when, text in samples.items():
            accelerator.print(f"sample {when}: {json.dumps(text)}")
    figures: dict[str, Any] = {
        "validation loss before, nats a token": before,
        "validation loss after, nats a token": after,
        "validation examples": len(materials.validation),
        "epsilon": "none: NOT PRIVATE" if spent is None else spent,
        "logical steps": prepared.step,
        **history.summary(),
        "seconds before training (imports not counted)": setup_seconds,
        "seconds of training": training_seconds,
    }
    if options.compare_nonprivate:
        plain = train_without_privacy(options, materials, accelerator, history, plan.num_steps)
        figures["validation loss after as many steps without privacy"] = plain
        accelerator.print(f"validation loss after as many steps without privacy: {plain:.3f}")
    figures["seconds in all (imports not counted)"] = time.perf_counter() - began
    if accelerator.is_main_process:
        write_report(output, options, plan, words, figures, samples, history.rows, private=spent is not None)
    accelerator.end_training()
    accelerator.print(
        f"{warning}model, card, ledger, metrics and picture: {output} ({time.perf_counter() - began:.0f} s in all)"
    )
    return 0


def spent_words(prepared: Prepared) -> str:
    """What was spent, for a message."""
    epsilon = prepared.epsilon()
    return "NOT PRIVATE" if epsilon is None else f"epsilon {epsilon:.3f} spent"


def main(argv: list[str] | None = None) -> int:
    """Read the options and run."""
    options = parse(argv, __doc__ or "")
    try:
        return run(options)
    except KeyboardInterrupt:
        print(
            "\ninterrupted at once. If training had begun: what the ledger counts is spent, and "
            "--resume-from-checkpoint goes on from the last checkpoint.",
            file=sys.stderr,
        )
        return 130


if __name__ == "__main__":
    sys.exit(main())
