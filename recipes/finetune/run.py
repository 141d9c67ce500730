"""The run that all recipes share: from the options to an exported model with its card."""

from __future__ import annotations

from finetune.environment import set_threads  # first of all: it sets what torch reads when it is imported

# isort: split
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import disable_progress_bars
from huggingface_hub.errors import HfHubHTTPError
from torch import nn
from transformers.utils import logging as transformers_logging

from dpft import DPFTError
from finetune import auditing, checkpoints
from finetune.account import check_account
from finetune.advice import give_advice
from finetune.best import Best
from finetune.data.progress import timed
from finetune.dry_run import dry_run
from finetune.engine import ending_all, engine_name, from_first, make_accelerator, shard_blocks, weight_dtype
from finetune.export import export, reload_and_check
from finetune.loop import History, check_optimizer, make_optimizer, make_scheduler, train, validation_row
from finetune.materials import choose_physical
from finetune.model import check_vocabulary, lengthen
from finetune.output import LEDGER, METRICS, choose_output, forget_noise, no_trace
from finetune.parsing import parse
from finetune.plain import train_without_privacy
from finetune.private import Prepared, check_privacy, planned_schedule, prepare, privacy_config, statement
from finetune.publish import check_login, publish
from finetune.recipe import Finished, Recipe
from finetune.report import Report, model_card, write_report


@contextmanager
def one_line(name: str) -> Iterator[None]:
    """End the program with one line and status 2 if the options cannot be carried out.

    For use before training: a later failure is not due to a wrong option, and needs its traceback. What the libraries
    raise of a bad file or model has been made a ValueError where they were called; other errors are bugs.
    """
    try:
        yield
    except (ValueError, OSError, ImportError, DPFTError) as error:
        # most of them occur on every rank; every rank prints its own, so that one on a single rank is seen too
        words = str(error) if isinstance(error, DPFTError) else " ".join(str(error).split())
        print(f"{name}.py: error: {words}", file=sys.stderr)
        raise SystemExit(2) from error


def run(recipe: Recipe, options: Any) -> int:
    """Run a recipe; 0 at its end, 130 if it was interrupted."""
    began = time.perf_counter()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    with one_line(recipe.name):
        privacy_config(options)  # refuses what does not go together, before anything is loaded
        if options.push_to_hub is not None:
            check_login(options.push_to_hub)
        accelerator = make_accelerator(options)
        check_optimizer(options, accelerator)
        alone = engine_name(accelerator) + str(accelerator.num_processes) == "whole1"
        if options.compare_nonprivate and not alone:
            if not recipe.options.compare_nonprivate:  # it was asked for, and is not this recipe's demonstration
                raise ValueError("--compare-nonprivate runs in one process; leave it out, or launch one process.")
            options = replace(options, compare_nonprivate=False)
        if accelerator.device.type == "cpu":
            set_threads(options.cpu_threads, accelerator.num_processes)
        materials, asked = recipe.materials(options, accelerator), options
        options = choose_physical(options, materials, accelerator)
        model = lengthen(recipe.model(options, weight_dtype(options, accelerator)), options, accelerator)
        check_vocabulary(model, materials.tokenizer)
        if options.advise:
            give_advice(recipe.name, options, model, materials.train, accelerator)
            return 0
        with timed(accelerator, "calibrating the noise"):
            check_privacy(options, len(materials.train))
            left = check_account(options, planned_schedule(options, len(materials.train)), accelerator)
        if options.dry_run:
            dry_run(options, materials, model, accelerator, left)
            return 0
        output = choose_output(options, recipe.name, accelerator)
        with no_trace(accelerator, output):
            checkpoint = checkpoints.find(accelerator, output) if options.resume_from_checkpoint else None
            audit = auditing.begin(accelerator, options, materials, output) if options.audit else None
            best = Best(accelerator, output, strict=not options.load_in_4bit) if options.save_best else None
    with one_line(recipe.name), no_trace(accelerator, output):
        shard_blocks(accelerator, model)
        optimizer = make_optimizer(options, model)
        prepared = prepare(accelerator, model, optimizer, recipe, materials, options, output / LEDGER)
        schedule = prepared.schedule
        scheduler = make_scheduler(options, prepared.optimizer, schedule.num_steps)
        accelerator.register_for_checkpointing(scheduler)
    accelerator.project_configuration.set_directories(str(output))
    accelerator.init_trackers(recipe.name)
    history = History(output / METRICS if accelerator.is_main_process else None)
    samples: dict[str, str] = {}
    with ending_all(accelerator, recipe.name, output):
        recipe.begin(prepared.model, materials, accelerator)
        if options.sample_tokens:
            samples["before"] = recipe.sample(prepared.model, materials, options, accelerator)
    with one_line(recipe.name):
        if options.push_to_hub is not None and not prepared.private:
            raise ValueError("--push-to-hub publishes what an epsilon covers, and this training has none.")
        if checkpoint is not None:
            history.read()
            checkpoints.load(accelerator, checkpoint, strict=not options.load_in_4bit)
    with ending_all(accelerator, recipe.name, output):
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

        def evaluate(network: nn.Module) -> dict[str, float]:
            return recipe.measure(network, materials, accelerator)

        def evaluated(step: int, measures: dict[str, float]) -> None:
            if best is not None:
                best.consider(step, measures["loss"])

        # only rank 0 has the metrics of a resumed run, and an evaluation needs all ranks
        before = from_first(accelerator, history.first_measures)
        if before is None:
            before = evaluate(prepared.model)
            history.add(validation_row(0, before) | {"epsilon": 0.0 if prepared.private else None})
        accelerator.print(f"validation {in_words(before, 'before', recipe)}, {len(materials.validation)} examples")
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
            evaluated,
        )
        training_seconds = time.perf_counter() - trained_from
        if not finished:
            accelerator.print(
                f"interrupted after step {prepared.step} of {schedule.num_steps}, {spent_words(prepared)}; go on with "
                f"the same options and --resume-from-checkpoint --output-dir {output}"
            )
            prepared.close()
            accelerator.end_training()
            return 130
        after = evaluate(prepared.model)
        history.add(validation_row(prepared.step, after) | {"epsilon": prepared.epsilon()})
        evaluated(prepared.step, after)
        if best is not None and best.step not in (0, prepared.step):
            best.restore()
            after = evaluate(prepared.model)
            accelerator.print(f"the best weights are those of step {best.step}; they are exported")
        accelerator.print(f"{warning}validation {in_words(after, 'after', recipe)} (before: {before['loss']:.3f})")
        if options.sample_tokens:
            samples["after"] = recipe.sample(prepared.model, materials, options, accelerator)
            for when, text in samples.items():
                accelerator.print(f"sample {when}: {json.dumps(text)}")
        # before the model is unwrapped and saved: the statement needs the ledger and the optimiser
        notes = [*recipe.notes(options), *([audit.note] if audit else [])]
        if best is not None:
            notes.append(best.note(prepared.step))
        words = statement(prepared, recipe.tuning(options), *notes)
        spent = prepared.epsilon(exact=True)
        losses = auditing.losses(audit, accelerator, prepared.model, materials) if audit else []
        export(accelerator, prepared, recipe, materials, options, output)
        if accelerator.is_main_process and options.reload_check:
            reload_and_check(accelerator, recipe, options, materials, output, after["loss"])
        figures: dict[str, Any] = {
            **{f"validation {name}": value for name, value in named(before, "before", recipe).items()},
            **{f"validation {name}": value for name, value in named(after, "after", recipe).items()},
            "validation examples": len(materials.validation),
            "epsilon": "none: NOT PRIVATE" if spent is None else spent,
            "logical steps": prepared.step,
            **history.summary(),
            "seconds before training (imports not counted)": setup_seconds,
            "seconds of training": training_seconds,
        }
        if options.compare_nonprivate:
            plain = train_without_privacy(recipe, options, materials, accelerator, history, schedule.num_steps)
            compared = named(plain, "after as many steps without privacy", recipe)
            figures |= {f"validation {name}": value for name, value in compared.items()}
            accelerator.print(f"validation {in_words(plain, 'after as many steps without privacy', recipe)}")
        figures |= recipe.after(Finished(options, accelerator, materials, output, words, spent))
        figures["seconds in all (imports not counted)"] = time.perf_counter() - began
        if accelerator.is_main_process:
            section = ""
            if audit is not None:
                found = auditing.finish(audit, losses, spent, schedule.target_delta, output)
                accelerator.print(f"audit: {found.statement}")
                section = auditing.section(found)
            report = Report(recipe, asked, words, figures, samples, private=spent is not None, audit=section)
            write_report(output, report, schedule, history.rows)
            card = model_card(report, published=True)
        prepared.close()
        forget_noise(accelerator, output)
        accelerator.end_training()
    accelerator.print(
        f"{warning}model, card, ledger, metrics and picture: {output} ({time.perf_counter() - began:.0f} s in all)"
    )
    if options.push_to_hub is not None and accelerator.is_main_process:
        return push(recipe.name, options.push_to_hub, output, card)
    return 0


def push(name: str, repo: str, output: Path, card: str) -> int:
    """Publish the model; 0, or 1 with one line if the hub does not take it, which costs nothing of the run."""
    try:
        print(f"published, private until you change it: {publish(output, repo, card)}")
    except (OSError, HfHubHTTPError) as error:
        words = " ".join(str(error).split())
        print(f"{name}.py: error: --push-to-hub {repo}: {words}; the model is in {output}.", file=sys.stderr)
        return 1
    return 0


def named(measures: dict[str, float], when: str, recipe: Recipe) -> dict[str, float]:
    """Measures by the names that the card gives them, without "validation"."""
    return {f"{k} {when}" + (f", {recipe.loss_unit}" if k == "loss" else ""): v for k, v in measures.items()}


def in_words(measures: dict[str, float], when: str, recipe: Recipe) -> str:
    """Measures for a message, without "validation"."""
    others = [f", {name} {value:.3f}" for name, value in measures.items() if name != "loss"]
    return f"loss {when}: {measures['loss']:.3f} {recipe.loss_unit}" + "".join(others)


def spent_words(prepared: Prepared) -> str:
    """What was spent, for a message."""
    epsilon = prepared.epsilon()
    return "NOT PRIVATE" if epsilon is None else f"epsilon {epsilon:.3f} spent"


def main(recipe: Recipe, description: str, argv: Sequence[str] | None = None) -> int:
    """Read the options of a recipe and run it; ``description`` is the top of ``--help``."""
    options = parse(argv, description, recipe.options, f"{recipe.name}.py")
    try:
        return run(recipe, options)
    except KeyboardInterrupt:
        print(
            "\ninterrupted at once. If training had begun: what the ledger counts is spent, and "
            "--resume-from-checkpoint goes on from the last checkpoint.",
            file=sys.stderr,
        )
        return 130
