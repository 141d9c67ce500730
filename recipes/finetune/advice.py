"""The advice of ``dpft.advise`` for a terminal, and as a picture."""

from __future__ import annotations

import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

import dpft
from accelerate import Accelerator
from finetune.data.progress import timed
from finetune.data.users import Users, unit_of
from finetune.noise import compared, plan_of, taken
from finetune.output import OUTPUTS
from finetune.private import planned_schedule

COLUMN = 19


def give_advice(name: str, options: Any, model: nn.Module, train: Any, accelerator: Accelerator) -> None:
    """--advise: print the advice, and draw it in the folder of outputs.

    Nothing is read but the number of examples; of users, also how many records each has: that part is not for
    publication.

    Raises:
        ValueError: there is no target epsilon, or none can be advised for.
    """
    if options.target_epsilon is None:
        raise ValueError("--advise is for a --target-epsilon; leave --noise-multiplier out.")
    examples, tokens = len(train), options.example_tokens * options.rows_of_user
    with timed(accelerator, "calibrating the noise of some fifty settings"):
        advice = dpft.advise(
            model,
            examples,
            target_epsilon=options.target_epsilon,
            target_delta=options.target_delta,
            tokens=tokens,
            token_budget=None if options.num_epochs is None else options.num_epochs * examples * tokens,
        )
    accelerator.print("\n".join(lines(advice)))
    advised = replace(options, expected_batch_size=advice.batch, num_steps=advice.steps, num_epochs=None)
    for line in noise_of(advised, model, examples, accelerator):
        accelerator.print(line)
    if isinstance(train, Users):
        accelerator.print(f"note: an example is one {unit_of(options)}")
        with timed(accelerator, "comparing users with records as examples"):
            rows = float(np.minimum(train.owned, train.at_most).mean())
            compared = dpft.compare_units(
                train.owned,
                rows=train.at_most,
                batch=advice.batch * rows,
                steps=advice.steps,
                delta=options.target_delta,
                target_epsilon=options.target_epsilon,
            )
        accelerator.print(compared)
    if accelerator.is_main_process:
        OUTPUTS.mkdir(exist_ok=True)
        picture(advice, OUTPUTS / f"{name}_advice.png")
    accelerator.print(f"epsilon and noise by batch and steps: {OUTPUTS / f'{name}_advice.png'}; nothing was trained")


def noise_of(options: Any, model: nn.Module, examples: int, accelerator: Accelerator) -> list[str]:
    """What the mechanism of the options is worth with the batch and the steps that were advised, and what it takes."""
    try:
        schedule = planned_schedule(options, examples)
    except dpft.DPFTError as error:
        return [f"{'mechanism':{COLUMN}}{options.mechanism}, not with this batch and these steps: {error}"]
    plan = plan_of(model, replace(options, max_physical_batch_size=1), accelerator)
    found = [f"{'mechanism':{COLUMN}}{taken(options.mechanism, schedule, plan)}"]
    words = compared(options, schedule, examples)
    return found if words is None else [*found, f"{'noise in all':{COLUMN}}{words}"]


def lines(advice: dpft.Advice) -> list[str]:
    """What is advised, why, and what other settings would cost, in lines of at most 119 characters.

    Nothing in it depends on the private records but their number.
    """
    trained = "" if advice.trainable is None else f", {advice.trainable:,} of {advice.parameters:,} parameters train"
    values = {
        "batch": f"--expected-batch-size {advice.batch}",
        "steps": f"--num-steps {advice.steps}",
        "clip_norm": f"--max-grad-norm {advice.clip_norm:g}",
        "learning_rate": f"--learning-rate {advice.learning_rate:g}",
        "method": f"{advice.method}{trained}",
    }
    found = []
    for name, value in values.items():
        found.append(f"{name.replace('_', ' '):{COLUMN}}{value}")
        indent = " " * COLUMN
        found += textwrap.wrap(advice.reasons[name], 119, initial_indent=indent, subsequent_indent=indent)
    return [*found, *advice.table().splitlines(), *(f"note: {note}" for note in advice.notes)]


def picture(advice: dpft.Advice, path: str | Path) -> None:
    """Draw the grid: the share of the greatest signal-to-noise ratio, by batch and steps, and the noise per update.

    Args:
        advice: with a grid.
        path: PNG to write.

    Raises:
        ValueError: an advice without a grid.
    """
    # The Agg canvas needs no display, and a figure made without pyplot leaves nothing open.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not advice.grid:
        raise ValueError("the advice has no grid to draw; ask for it with dpft.advise(..., grid=True)")
    batches, steps = sorted({s.batch for s in advice.grid}), sorted({s.steps for s in advice.grid})
    shares = [[float("nan")] * len(steps) for _ in batches]
    figure = Figure(figsize=(1.6 + 1.25 * len(steps), 1.6 + 0.75 * len(batches)), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for setting in advice.grid:
        row, column = batches.index(setting.batch), steps.index(setting.steps)
        shares[row][column] = setting.share
        chosen = setting == advice.setting
        axis.text(
            column,
            row,
            f"{setting.share:.0%}\n{setting.noise:.1e}\n{setting.epochs:.3g} ep",
            ha="center",
            va="center",
            fontsize=8,
            fontweight="bold" if chosen else "normal",
            color="black" if setting.share > 0.5 else "white",
        )
        if chosen:
            axis.plot(column, row, "s", markersize=46, markerfacecolor="none", markeredgecolor="tab:red", linewidth=2)
    image = axis.imshow(shares, origin="lower", aspect="auto", cmap="viridis", vmin=0, vmax=1)
    axis.set_xticks(range(len(steps)), [f"{n:,}" for n in steps])
    axis.set_yticks(range(len(batches)), [f"{n:,}\nq {n / advice.examples:.3g}" for n in batches])
    axis.set(xlabel="steps T", ylabel="expected logical batch b")
    axis.set_title(
        f"N = {advice.examples:,}, epsilon {advice.target_epsilon:g}, delta {advice.target_delta:g}", fontsize=10
    )
    figure.colorbar(image, label="share of the greatest total signal-to-noise ratio")
    figure.supxlabel("in each cell: the share, noise sigma C / b on a coordinate, epochs", fontsize=7, color="0.3")
    figure.savefig(path, dpi=150)
