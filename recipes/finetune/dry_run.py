"""--dry-run: what a run would do, its memory and its time, without doing it."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

import dpft
from accelerate import Accelerator
from finetune.engine import engine_name, sequence_size
from finetune.materials import Materials
from finetune.noise import compared, plan_of, taken
from finetune.options import Options
from finetune.private import explain, privacy_config


def dry_run(
    options: Options, materials: Materials, model: nn.Module, accelerator: Accelerator, left: str | None = None
) -> None:
    """Print what a run would do, without doing it; ``left``: of the account that it would pay from."""
    examples = len(materials.train)
    schedule = privacy_config(options).resolve(examples)
    size, ranks = options.max_physical_batch_size or 1, accelerator.num_processes // sequence_size(accelerator)
    physical = schedule.expected_batch_size / ranks / size
    if options.clipping == "none":
        accelerator.print("NOT PRIVATE: --clipping none")
    accelerator.print(schedule.describe())
    accelerator.print(
        f"physical batches   about {physical:.1f} of at most {size} examples "
        f"for a logical batch, on each of {accelerator.num_processes} process(es) ({accelerator.device})"
    )
    options = replace(options, max_physical_batch_size=size * options.rows_of_user)
    first, *others = explain(model.to(accelerator.device).train(), options)
    accelerator.print(f"execution          {first}")
    for line in others:
        accelerator.print(f"                   {line}")
    accelerator.print(f"memory             {_steady_memory(model, accelerator, options, schedule)}")
    plan = plan_of(model, options, accelerator)
    accelerator.print(f"noise of a batch   {taken(options.mechanism, schedule, plan)}")
    if (words := compared(options, schedule, examples)) is not None:
        accelerator.print(f"noise in all       {words}")
    if left is not None:
        accelerator.print(f"account            {left}")
    accelerator.print("a physical batch   is predicted to take")
    for line in _predicted_steps(plan):
        accelerator.print(f"                   {line}")
    accelerator.print("dry run: nothing was trained, nothing was written")


def _steady_memory(
    model: nn.Module, accelerator: Accelerator, options: Options, schedule: dpft.PrivacySchedule
) -> str:
    """The memory that a process always needs, in words: parameters, clipped sums, optimiser, earlier noise."""
    engine, ranks = engine_name(accelerator), accelerator.num_processes
    zero = engine.startswith("zero")
    every = sum(_numel(p) * p.element_size() for p in model.parameters())
    trainable = [p for p in model.parameters() if p.requires_grad]
    # under ZeRO, and in host memory, of float32, with a float32 copy of the weights
    masters = zero or options.sums_device == "cpu"
    held = ((4 if masters else 0, 4 if masters else p.element_size(), _numel(p)) for p in trainable)
    optimiser = sum((copy + _state_bytes(options.optim, size)) * number for copy, size, number in held)
    sums = sum(4 * _numel(p) for p in trainable)  # the clipped sum of a logical batch is float32 in any case
    # of the size of the sums, and divided among all ranks also where these are not
    noise = 0.0 if schedule.strategy is None else schedule.strategy.memory * sums / ranks
    earlier = f", earlier noise {noise / 2**20:,.1f}" if noise else ""
    if options.sums_device == "cpu":
        return (
            f"{every / 2**20:,.1f} MiB of parameters held; in host memory {(sums + optimiser + noise) / 2**20:,.1f} "
            f"MiB: clipped sums {sums / 2**20:,.1f}, {options.optim} with float32 masters {optimiser / 2**20:,.1f}"
            f"{earlier}"
        )
    if engine in ("fsdp2", "zero3"):
        every /= ranks
    if engine in ("fsdp2", "zero2", "zero3"):
        sums /= ranks
    if engine == "fsdp2" or zero:
        optimiser /= ranks
    each = " on each process" if ranks > 1 else ""
    return (
        f"{(every + optimiser + sums + noise) / 2**20:,.1f} MiB held{each}: parameters {every / 2**20:,.1f}, clipped "
        f"sums {sums / 2**20:,.1f}, {options.optim} {optimiser / 2**20:,.1f}{earlier}"
    )


def _state_bytes(optim: str, itemsize: int) -> int:
    """Bytes that an optimiser keeps of a weight: two moments, one of Lion; Adafactor's are of rows and columns."""
    if optim in ("sgd", "adafactor"):
        return 0
    return (1 if "lion" in optim else 2) * (1 if optim.endswith("8bit") else itemsize)


def _predicted_steps(plan: dpft.Plan | str) -> list[str]:
    """What a physical batch of full length will take beyond that, by strategy, in lines: time and peak of memory."""
    if isinstance(plan, str):
        return [plan]
    steps = [("without privacy", plan.plain), *plan.predictions.items()]
    return [f"{n:15} {s.seconds:8.3g} s {s.accumulating_peak_bytes / 2**20:10,.1f} MiB" for n, s in steps]


def _numel(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter; ZeRO-3 leaves an empty one in its place."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
