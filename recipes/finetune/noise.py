"""What the noise of a mechanism takes, and how much there is beside that of DP-SGD: for --dry-run and --advise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

import dpft
from accelerate import Accelerator
from finetune.engine import WHOLE, engine_name
from finetune.options import Options
from finetune.private import planned_schedule, privacy_config


def plan_of(model: nn.Module, options: Options, accelerator: Accelerator) -> dpft.Plan | str:
    """The plan of a physical batch of full length on this engine; or why there is none.

    Args:
        model: with unsharded parameters.
        options: ``max_physical_batch_size`` is the number of rows over ``options.rows``.
        accelerator: of the run.
    """
    name, ranks = engine_name(accelerator), accelerator.num_processes
    engine: Any = ("single" if ranks == 1 else "ddp") if name == WHOLE else name
    privacy = privacy_config(options)
    try:
        return dpft.plan(
            model,
            batch_size=(options.max_physical_batch_size or 1) * options.rows,
            seq_len=options.row_tokens,
            engine=engine,
            world_size=ranks,
            clip_groups=privacy.clip_groups,
            privacy=privacy,
        )
    except dpft.UnsupportedModuleError as error:
        return f"not predicted: {error}"


def taken(mechanism: str, schedule: dpft.PrivacySchedule, plan: dpft.Plan | str) -> str:
    """What the noise of a logical batch takes, in words: vectors that are kept, and the time of drawing."""
    if isinstance(plan, str) or plan.noise is None:
        vectors = 0 if schedule.strategy is None else schedule.strategy.memory
        return f"{mechanism}, keeps {vectors} vectors of the size of the trained parameters; its time is not predicted"
    cost = plan.noise
    kept = f"keeps {cost.vectors} vectors, {cost.kept_bytes / 2**20:,.1f} MiB; " if cost.vectors else ""
    return f"{mechanism}, {kept}{cost.elements:,} values are drawn in {cost.seconds:.3g} s"


def compared(options: Options, schedule: dpft.PrivacySchedule, examples: int) -> str | None:
    """How much noise is in the sums of the releases, in words, beside that of DP-SGD at the same epsilon.

    See ``dpft.PrivacySchedule.noise_in_sums``.

    Args:
        options: of the run.
        schedule: of it.
        examples: to train on.

    Returns:
        None for noise that is not correlated, or that is none.
    """
    if schedule.strategy is None or not schedule.private:
        return None
    plain = replace(options, mechanism="dp_sgd", bands=None, buffers=None, sampler=None)
    plain = replace(plain, noise_multiplier=None, target_epsilon=schedule.epsilon)
    other = planned_schedule(plain, examples).noise_in_sums
    return f"{schedule.noise_in_sums:.4g} C in the sums of the releases, and {other:.4g} C of dp_sgd at this epsilon"
