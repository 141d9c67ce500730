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
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.tracking import get_available_trackers
from datasets import disable_progress_bars
from torch import nn
from transformers.utils import logging as transformers_logging

from accelerate import Accelerator
from dpft import DPFTError
from finetune import auditing, checkpoints
from finetune.data.documents import document_losses
from finetune.engine import ending_all, engine_name, from_first, make_accelerator, sequence_size, weight_dtype
from finetune.evaluation import sample_text, validation_loss
from finetune.export import export, reload_and_check
from finetune.loop import History, make_optimizer, make_scheduler, train
from finetune.options import Options
from finetune.parsing import parse
from finetune.private import LEDGER, Prepared, explain, prepare, privacy_config, statement
from finetune.report import write_report
from finetune.setup import (
    METRICS,
    Materials,
    choose_output,
    choose_physical,
    lengthen,
    load_materials,
    load_model,
    predicted_steps,
    steady_memory,
)


@contextmanager
def one_line() -> Iterator[None]:
    """End the program with one line and status 2 if the options cannot be carried out.

    For use before training: a later failure is not due to a wrong option, and needs its traceback.
    """
    try:
        yield
    except (ValueError, OSError, ImportError, DPFTError) as error:
        # most of them occur on every rank; every rank prints its own, so that one on a single rank is seen too
        words = str(error) if isinstance(error, DPFTError) else " ".join(str(error).split())
        print(f"llama_dp.py: error: {words}", file=sys.stderr)
        raise SystemExit(2) from error


def dry_run(options: Options, materials: Materials, model: nn.Module, accelerator: Accelerator) -> None:
    """Print what a run would do, without doing it."""
    schedule = privacy_config(options).resolve(len(materials.train))
    size, ranks = options.max_physical_batch_size or 1, accelerator.num_processes // sequence_size(accelerator)
    physical = schedule.expected_batch_size / ranks / size
    if options.clipping == "none" and schedule.noise_multiplier:
        raise ValueError("--clipping none bounds nothing, so that no noise makes it private; --noise-multiplier 0")
    if options.clipping == "none":
        accelerator.print("NOT PRIVATE: --clipping none")
    accelerator.print(schedule.describe())
    accelerator.print(
        f"physical batches   about {physical:.1f} of at most {size} examples "
        f"for a logical batch, on each of {accelerator.num_processes} process(es) ({accelerator.device})"
    )
    first, *others = explain(model.to(accelerator.device).train(), options)
    accelerator.print(f"execution          {first}")
    for line in others:
        accelerator.print(f"                   {line}")
    accelerator.print(f"memory             {steady_memory(model, accelerator, options)}")
    accelerator.print("a physical batch   is predicted to take")
    for line in predicted_steps(model, options, accelerator):
        accelerator.print(f"                   {line}")
    accelerator.print("dry run: nothing was trained, nothing was written")


def train_without_privacy(
    options: Options, materials: Materials, accelerator: Accelerator, history: History, steps: int
) -> float:
    """Train a fresh copy for as many steps of as many examples without clipping or noise; its validation loss.

    For one process.
    """
    model = lengthen(load_model(options, weight_dtype(options, accelerator)), options, accelerator)
    model = model.to(accelerator.device).train()
    optimizer = make_optimizer(options, model)
    scheduler = make_scheduler(options, optimizer, steps)
    generator = torch.Generator().manual_seed(options.seed)
    size = min(round(options.expected_batch_size), len(materials.train))
    before = validation_loss(model, materials.validation, materials.collate)
    history.add({"step": 0, "nonprivate_validation_loss": before})
    for step in range(1, steps + 1):
        drawn = torch.randperm(len(materials.train), generator=generator)[:size].tolist()
        physical = options.max_physical_batch_size or 1
        for start in range(0, size, physical):
            part = drawn[start : start + physical]
            batch = materials.collate_train([materials.train[i] for i in part])
            batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
            ids, labels = batch.pop("example_ids", None), batch["labels"]
            out = model(**batch)
            loss = out.loss if ids is None else document_losses(out.logits, labels, ids).mean()
            (loss * (len(part) / size)).backward()
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
        accelerator = make_accelerator(options)
        if options.compare_nonprivate and engine_name(accelerator) + str(accelerator.num_processes) != "whole1":
            raise ValueError("--compare-nonprivate runs in one process; leave it out, or launch one process.")
        if accelerator.device.type == "cpu":
            set_threads(options.cpu_threads, accelerator.num_processes)
        materials, asked = load_materials(options, accelerator), options
        options = choose_physical(options, materials, accelerator)
        model = lengthen(load_model(options, weight_dtype(options, accelerator)), options, accelerator)
        if options.dry_run:
            dry_run(options, materials, model, accelerator)
            return 0
        output = choose_output(options, accelerator)
        checkpoint = checkpoints.find(accelerator, output) if options.resume_from_checkpoint else None
        audit = auditing.begin(accelerator, options, materials, output) if options.audit else None
    accelerator.project_configuration.set_directories(str(output))
    accelerator.init_trackers("llama_dp")
    history = History(output / METRICS if accelerator.is_main_process else None)

    def sample(network: Any) -> str:
        return sample_text(
            network, materials.tokenizer, options.prompt, options.sample_tokens, options.seed, accelerator
        )

    samples: dict[str, str] = {}
    accelerator.print("calibrating the noise ...")
    with one_line():
        optimizer = make_optimizer(options, model)
        prepared = prepare(
            accelerator,
            model,
            optimizer,
            materials.train,
            privacy_config(options),
            materials.collate_train,
            options,
            output / LEDGER,
        )
        schedule = prepared.schedule
        scheduler = make_scheduler(options, prepared.optimizer, schedule.num_steps)
        accelerator.register_for_checkpointing(scheduler)
    with ending_all(accelerator, output):
        if options.sample_tokens:
            samples["before"] = sample(prepared.model)
    with one_line():
        if checkpoint is not None:
            history.read()
            checkpoints.load(accelerator, checkpoint)
    with ending_all(accelerator, output):
        history.start(prepared.private)
        warning = "" if prepared.private else "NOT PRIVATE: "
        accelerator.print(schedule.describe())
        if schedule.private and not prepared.private:
            accelerator.print(f"{warning}--clipping {options.clipping}")
        if checkpoint is not None:
            history.add({"step": prepared.step, "resumed_from_step": checkpoint.step})
            accelerator.print(
                f"resumed: weights of step {checkpoint.step}, {prepared.step} steps released by the ledger, "
                f"{spent_words(prepared)}"
            )

        def evaluate(network: nn.Module) -> float:
            return validation_loss(network, materials.validation, materials.collate, accelerator)

        # only rank 0 has the metrics of a resumed run, and an evaluation needs all ranks
        known = (row["validation_loss"] for row in history.rows if "validation_loss" in row)
        before = from_first(accelerator, lambda: next(known, None))
        if before is None:
            before = evaluate(prepared.model)
            history.add({"step": 0, "validation_loss": before, "epsilon": 0.0 if prepared.private else None})
        accelerator.print(f"validation loss before: {before:.3f} nats a token, {len(materials.validation)} examples")
        if audit is not None:
            auditing.measure_before(audit, accelerator, prepared.model, materials, output)
        setup_seconds = time.perf_counter() - began

        trained_from = time.perf_counter()
        finished = train(
            accelerator,
            prepared,
            options,
            history,
            evaluate,
            scheduler,
            lambda step: checkpoints.save(accelerator, output, step),
        )
        training_seconds = time.perf_counter() - trained_from
        if not finished:
            accelerator.print(
                f"interrupted after step {prepared.step} of {schedule.num_steps}, {spent_words(prepared)}; go on with "
                f"the same options and --resume-from-checkpoint --output-dir {output}"
            )
            accelerator.end_training()
            return 130
        after = evaluate(prepared.model)
        history.add({"step": prepared.step, "validation_loss": after, "epsilon": prepared.epsilon()})
        accelerator.print(f"{warning}validation loss after: {after:.3f} nats a token (before: {before:.3f})")
        if options.sample_tokens:
            samples["after"] = sample(prepared.model)
            for when, text in samples.items():
                accelerator.print(f"sample {when}: {json.dumps(text)}")
        # before the model is unwrapped and saved: the statement needs the ledger and the optimiser
        words = statement(prepared, options, *([audit.note] if audit else []))
        spent = prepared.epsilon(exact=True)
        losses = auditing.losses(audit, accelerator, prepared.model, materials) if audit else []
        export(accelerator, prepared, materials, options, output)
        if accelerator.is_main_process and options.reload_check:
            reload_and_check(accelerator, options, materials, output, after)
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
            plain = train_without_privacy(options, materials, accelerator, history, schedule.num_steps)
            figures["validation loss after as many steps without privacy"] = plain
            accelerator.print(f"validation loss after as many steps without privacy: {plain:.3f}")
        figures["seconds in all (imports not counted)"] = time.perf_counter() - began
        if accelerator.is_main_process:
            section = ""
            if audit is not None:
                found = auditing.finish(audit, losses, spent, schedule.target_delta, output)
                accelerator.print(f"audit: {found.statement}")
                section = auditing.section(found)
            write_report(
                output,
                asked,
                schedule,
                words,
                figures,
                samples,
                history.rows,
                private=spent is not None,
                audit=section,
            )
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
