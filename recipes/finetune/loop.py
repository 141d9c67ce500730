"""The training loop: an ordinary Accelerate loop, with a progress bar, checks and a clean stop on Ctrl-C."""

from __future__ import annotations

import json
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import Trainer, get_scheduler
from transformers.training_args import OptimizerNames

from accelerate import Accelerator
from finetune.engine import WHOLE, engine_name, sequence_size
from finetune.options import Options
from finetune.private import Prepared, corrected_adamw
from finetune.watch import RunWatch


class StaleWeightsError(RuntimeError):
    """An optimiser step changed no weight, though it should have."""


class Interrupt:
    """Turns the first Ctrl-C into a request to stop after the logical batch; the second one stops at once."""

    def __init__(self) -> None:
        self.asked = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        tqdm.write("stopping after this logical batch (Ctrl-C again: at once)")

    @contextmanager
    def listening(self) -> Iterator[Interrupt]:
        """Handle the signals while the body runs, then restore the previous handlers."""
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class WeightWatch:
    """Detects an optimiser that trains nothing, such as one whose parameters were replaced after it was made.

    Keeps some elements of every trainable tensor, not a second copy of the model.
    """

    def __init__(self, model: nn.Module, elements: int = 256) -> None:
        self.model, self.elements = model, elements
        self.before = self._look()

    def _look(self) -> dict[str, torch.Tensor]:
        seen = {}
        for name, parameter in self.model.named_parameters():
            local = getattr(parameter, "ds_tensor", parameter).detach()  # ZeRO-3's shard, where there is one
            local = (local.to_local() if hasattr(local, "to_local") else local).reshape(-1)
            if parameter.requires_grad and local.numel():  # a sharded engine may hold nothing of it here
                seen[name] = local[:: max(1, local.numel() // self.elements)].cpu().clone()
        return seen

    def unchanged(self) -> float:
        """The share of the elements that are as they were when this was last asked, or at the start; 0 of none."""
        now, before = self._look(), self.before
        self.before = now
        pairs = [(now[name], old) for name, old in before.items() if name in now]
        total = sum(old.numel() for _, old in pairs)
        # FSDP2 may hold another part of a tensor after an evaluation than after a step
        same = sum(int((new == old).sum()) for new, old in pairs if new.shape == old.shape)
        return same / total if total else 0.0

    def check(self) -> None:
        """Compare with what was kept.

        Raises:
            StaleWeightsError: no tensor moved.
        """
        if self.unchanged() == 1:
            raise StaleWeightsError(
                f"the first optimiser step moved none of {len(self.before)} trainable tensors, expected all to "
                "move. Does the optimiser hold this model's parameters (move the model and add adapters before making "
                "it), and is the learning rate large enough for their dtype?"
            )


NOT_FOR_PUBLICATION = (
    "loss, validation_loss, clipped_share, median_norm, tokens_per_second, and warnings that are not_for_publication: "
    "computed from private records without noise, and covered by no epsilon. Not for publication."
)


@dataclass
class History:
    """The metrics of a run, kept and appended to a JSON-lines file; the first line says what they reveal."""

    path: Path | None
    private: bool = True
    rows: list[dict[str, Any]] = field(default_factory=list)

    def start(self, private: bool) -> None:
        """Write the line that says what the others reveal. ``private`` is then in every row."""
        self.private = private
        if not self.rows:
            self.add({"step": 0, "note": NOT_FOR_PUBLICATION if private else "NOT PRIVATE. " + NOT_FOR_PUBLICATION})

    def add(self, row: dict[str, Any]) -> None:
        """Add one row, and write it at once, so that a killed run has its metrics."""
        row["private"] = self.private
        self.rows.append(row)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def read(self) -> None:
        """Read the rows of an interrupted run."""
        if self.path is not None and self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            self.rows = [json.loads(line) for line in lines if line.endswith("}")]
            # a run killed while writing leaves half a line, to which the next row must not be appended
            self.path.write_text("".join(line + "\n" for line in lines if line.endswith("}")), encoding="utf-8")

    def first_measures(self) -> dict[str, float] | None:
        """The measures before training, where an earlier start has them."""
        for row in self.rows:
            if "validation_loss" in row:
                return {k.removeprefix("validation_"): v for k, v in row.items() if k.startswith("validation_")}
        return None

    def summary(self) -> dict[str, float]:
        """Figures over the whole run, for the card."""
        found = {}
        for key, name in (
            ("tokens_per_second", "tokens a second, median of the steps"),
            ("clipped_share", "share of examples clipped, median of the steps"),
            ("median_norm", "gradient norm, median of the steps' medians"),
        ):
            values = [row[key] for row in self.rows if row.get(key) is not None]
            if values:
                found[name] = float(statistics.median(values))
        return found


def train(
    accelerator: Accelerator,
    prepared: Prepared,
    options: Options,
    history: History,
    evaluate: Callable[[nn.Module], dict[str, float]],
    scheduler: Any,
    checkpoint: Callable[[int], None],
    evaluated: Callable[[int, dict[str, float]], None],
) -> bool:
    """Train until the schedule's last logical batch.

    Args:
        accelerator: of the run.
        prepared: model, optimiser, loader.
        options: of the run.
        history: receives a row for each logical batch.
        evaluate: measures of a model on the held-out examples, ``loss`` among them.
        scheduler: of the learning rate; stepped once for each logical batch.
        checkpoint: saves the state after a logical step.
        evaluated: told of the measures after a logical step.

    Returns:
        True if the run finished; False if it was interrupted, and then a checkpoint was written.

    Raises:
        StaleWeightsError: the first step changed nothing.
    """
    schedule, model, optimizer = prepared.schedule, prepared.model, prepared.optimizer
    target = options.target_epsilon if options.target_epsilon is not None else schedule.epsilon
    watch: WeightWatch | None = WeightWatch(model)
    rounds = rounds_updates(accelerator, options, model)
    run_watch, moved = RunWatch(options.max_grad_norm, options.learning_rate), False
    bar = tqdm(
        total=schedule.num_steps,
        initial=prepared.step,
        desc="private" if prepared.private else "NOT PRIVATE",
        unit="step",
        disable=not accelerator.is_main_process,
        dynamic_ncols=True,
        delay=0,  # whatever TQDM_DELAY is
    )
    # loss, tokens, clipped examples, examples; of one logical batch, on this rank
    sums, began = torch.zeros(4, dtype=torch.float64), time.perf_counter()
    norms: list[torch.Tensor] = []
    model.train()
    with Interrupt().listening() as interrupt, bar:
        for batch in prepared.loader:
            loss = prepared.loss(batch)
            accelerator.backward(loss)
            clipped, examples, norms_B = prepared.clipped(batch)
            norms.append(norms_B)
            weight = batch["example_weight"]
            if "example_ids" in batch:
                weight = weight[batch["example_ids"].to(weight.device)]
            # the ranks of a sequence were given the same examples
            tokens = float((batch["attention_mask"] * weight[:, None]).sum()) / sequence_size(accelerator)
            sums += torch.tensor([loss.item() * examples, tokens, clipped, examples], dtype=torch.float64)
            last = prepared.ends_logical_batch
            rate, clip_norm = optimizer.param_groups[0]["lr"], prepared.clip_norm
            optimizer.step()
            optimizer.zero_grad()
            if not last:
                continue
            scheduler.step()
            unchanged = None
            if watch is not None and rate > 0:  # a warm-up begins with a learning rate of zero
                if not moved:
                    watch.check()
                elif rounds:
                    unchanged = watch.unchanged()
                moved, watch = True, watch if rounds else None
            step = prepared.step
            stop = torch.tensor([float(interrupt.asked)], dtype=torch.float64)
            totals = torch.cat([sums, stop])
            if accelerator.num_processes > 1:
                totals = accelerator.reduce(totals.float().to(accelerator.device), reduction="sum").double().cpu()
            loss_sum, tokens, clipped, examples, asked = totals.tolist()
            now = time.perf_counter()
            row = {
                "step": step,
                "loss": loss_sum / examples if examples else None,
                "tokens_per_second": tokens / (now - began),
                "epsilon": prepared.epsilon(),
                "clipped_share": clipped / examples if examples and options.clipping != "none" else None,
                "median_norm": _median(torch.cat(norms)),  # of this rank
                "learning_rate": rate,
                **({} if options.adaptive_clip is None else {"clip_norm": clip_norm}),
                **({"unchanged_share": unchanged} if rounds else {}),
            }
            finished = step >= schedule.num_steps
            if options.eval_every and step % options.eval_every == 0 and not finished:
                measures = evaluate(model)
                row.update(validation_row(step, measures))
                evaluated(step, measures)
            if accelerator.is_main_process:
                history.add(row)
                for finding in run_watch.look(row):
                    tqdm.write(str(finding))
                    history.add(finding.row(step))
            accelerator.log({key: value for key, value in row.items() if value is not None}, step=step)
            bar.set_postfix_str(describe(row, target))
            bar.update(1)
            # the last step too: a run that dies while it saves the model has no budget left to train it again
            if asked or _due(step, options.checkpoint_every) or (finished and options.checkpoint_every):
                checkpoint(step)
            if asked and not finished:
                return False
            sums, norms, began = torch.zeros(4, dtype=torch.float64), [], time.perf_counter()
    return True


def validation_row(step: int, measures: dict[str, float], prefix: str = "") -> dict[str, Any]:
    """Measures on the held-out examples as a row of metrics."""
    return {"step": step, **{f"{prefix}validation_{name}": value for name, value in measures.items()}}


def _median(norms_B: torch.Tensor) -> float | None:
    """None for an empty batch, and where norms are not taken (``--clipping none``)."""
    return float(norms_B.median()) if norms_B.numel() and not norms_B.isnan().all() else None


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def describe(row: dict[str, Any], target: float) -> str:
    """The end of the progress bar, from one row of metrics."""
    loss = row["loss"]
    words = ["empty batch" if loss is None else f"loss {loss:.3f}"]
    words.append("epsilon infinite" if row["epsilon"] is None else f"epsilon {row['epsilon']:.2f} of {target:.3g}")
    words.append(f"{row['tokens_per_second']:,.0f} tokens/s")
    if row.get("clipped_share") is not None:
        words.append(f"{row['clipped_share']:.0%} clipped")
    return ", ".join(words)


def rounds_updates(accelerator: Accelerator, options: Options, model: nn.Module) -> bool:
    """Whether the optimiser steps on bfloat16 weights, where a small update is lost; elsewhere on float32 ones."""
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    return torch.bfloat16 in trained and engine_name(accelerator) == WHOLE and options.sums_device is None


def make_optimizer(options: Options, model: nn.Module, learning_rate: float | None = None) -> torch.optim.Optimizer:
    """The optimiser of the trainable parameters.

    Args:
        options: of the run.
        model: whose parameters it steps on.
        learning_rate: another one than ``--learning-rate``.

    Raises:
        ImportError: ``--optim`` is of a package that is not installed.
        ValueError: ``--optim adamw_bc`` of bfloat16 weights.
    """
    rate, trained = options.learning_rate if learning_rate is None else learning_rate, _trained(model)
    if options.optim == "adamw_bc":
        return corrected_adamw(options, trained, rate)
    chosen: Any = SimpleNamespace(
        optim=OptimizerNames("adamw_torch" if options.optim == "adamw" else options.optim),
        optim_args=None,
        learning_rate=rate,
        adam_beta1=options.adam_beta1,
        adam_beta2=options.adam_beta2,
        adam_epsilon=1e-8,
    )
    cls, settings = Trainer.get_optimizer_cls_and_kwargs(chosen)
    return cls(trained, weight_decay=options.weight_decay, **settings)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def check_optimizer(options: Options, accelerator: Accelerator) -> None:
    """Refuse ``--optim`` where shards of a tensor are not stepped on as the whole tensor is.

    Raises:
        ValueError: names the engine.
    """
    engine = engine_name(accelerator)
    if engine != WHOLE and options.optim not in ("adamw", "adamw_torch", "adamw_bc", "sgd"):
        raise ValueError(
            f"--optim {options.optim} under {engine}, which gives it shards of tensors; expected adamw or sgd. Or "
            "launch one process, or ddp.yaml."
        )


def make_scheduler(options: Options, optimizer: torch.optim.Optimizer, num_steps: int) -> Any:
    """The schedule of the learning rate, one step for each logical batch.

    It is not passed to ``accelerator.prepare``, which would step it once for each process.
    """
    return get_scheduler(
        options.lr_scheduler_type, optimizer, num_warmup_steps=options.warmup_steps, num_training_steps=num_steps
    )
