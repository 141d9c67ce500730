"""``advise``: batch, steps, clip norm, learning rate, LoRA or full fine-tuning, with reasons and costs."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from dpft.errors import AccountingError
from dpft.planning.advice_result import Advice, Method, Setting
from dpft.planning.advice_rules import (
    FEWEST_STEPS,
    HIGHEST_RATE,
    LORA_FACTOR,
    RATE,
    SMALL_MODEL,
    STEPS,
    WORTH_ITS_COST,
    Cost,
    Settings,
    learning_rate,
)
from dpft.planning.result import Plan

__all__ = ["advise"]

CLIP_NORM = 1.0
# Bytes of float32 weights, clipped sums and two moments for each parameter that is trained.
TRAINED_BYTES = 16
# Without a plan full fine-tuning is advised up to so many parameters, which take 16 GB at rest.
MOST_FULL = 1_000_000_000
# A model of which less than one in so many parameters trains is taken for one with adapters.
ADAPTED = 20
_SIDES = (0.25, 0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class _Size:
    """Parameters of the model; those that train now; those of LoRA adapters of its linear layers (None: unknown)."""

    parameters: int
    trainable: int
    lora: int | None


def advise(
    model: nn.Module | Any,
    examples: int,
    *,
    target_epsilon: float,
    target_delta: float,
    tokens: int | None = None,
    plan: Plan | None = None,
    token_budget: float | None = None,
    seconds: float | None = None,
    lora_rank: int = 8,
    grid: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Advice:
    """Recommend hyperparameters of a private fine-tuning with AdamW, before any record is read.

    Rules of thumb, where published results agree, on noise multipliers that :class:`dpft.PrivacyConfig` calculates
    for each setting (Poisson sampling, one example as the unit, PLD). A starting point, not an optimum:
    ``docs/choosing.md`` says how far off it was in a grid of trainings.

    - *Batch and steps.* At a given epsilon the total signal-to-noise ratio b sqrt(T) / sigma grows with both and
      levels off (Sander et al. 2023, arXiv 2210.03403; Räisä et al. 2024, arXiv 2402.03990). What noise does to an
      update is decided by sigma / b (McKenna et al. 2025, arXiv 2501.18914), and large batches are the better use of a
      given number of epochs (Li et al. 2022, arXiv 2110.05679; De et al. 2022, arXiv 2204.13650).
    - *Clip norm.* Small enough to clip nearly every gradient (Li et al. 2022); AdamW then cancels it.
    - *Learning rate.* From published scripts of Li et al. 2022, constant in eta sqrt(T).
    - *LoRA.* Where full fine-tuning does not fit: private training suffers little from many parameters (Li et al.).

    Args:
        model: a module, a Hugging Face config, or a number of parameters. A module is only read; where it has frozen
            parameters, what trains is taken as given.
        examples: N, the number of private records; treated as public, as PrivacyConfig does.
        target_epsilon: the budget.
        target_delta: its delta; below 1 / N.
        tokens: of an example (of the longest, or a public guess at the mean: it scales costs and the token budget,
            nothing else). None: those of ``plan``.
        plan: of :func:`dpft.plan` for the model as it is to be trained: seconds and FLOPs of a physical batch, and
            whether full fine-tuning fits. None: FLOPs by parameter counts, and no time.
        token_budget: tokens to process in all, padding not counted. None: no limit.
        seconds: time to train, by the plan. None: no limit.
        lora_rank: r of the adapters that are advised.
        grid: also computes the settings around the recommended one, four times as many at most in each direction:
            some 20 more calibrations: 16 s of one core in all for 3,517 and for a million examples.
        progress: called with the number of calibrations done.

    Returns:
        The advice; ``print`` it.

    Raises:
        ValueError: an argument missing, out of range, or not what the plan is of.
        AccountingError: an epsilon that needs no noise.
        MissingPackageError: the accountant's packages are not installed.
    """
    _check(examples, target_epsilon, target_delta, lora_rank, token_budget, seconds, grid)
    size = _size(model, lora_rank)
    tokens = _tokens(tokens, plan)
    if seconds is not None and plan is None:
        raise ValueError(f"seconds is {seconds!r} without a plan; give plan=dpft.plan(model, ...), which has a speed")
    method, reason = _method(size, plan, lora_rank)
    fits = plan is not None and plan.fits
    if seconds is not None and not fits:
        raise ValueError(
            f"seconds is {seconds!r}, and the plan does not fit its memory, so that it has no time; plan the model "
            "with LoRA adapters, a smaller batch or checkpointing"
        )
    trainable = size.lora if method == "lora" else size.trainable
    cost = _cost(size, trainable, tokens, plan if fits else None)
    settings = Settings(examples, target_epsilon, target_delta, CLIP_NORM, trainable, cost, progress)
    batch, steps, limit = _batch_and_steps(settings, token_budget, seconds)
    chosen = settings.at(batch, steps)
    if chosen is None:
        raise AccountingError(
            f"a batch of {batch:,} in {steps:,} steps asks for next to no noise at epsilon {target_epsilon:g}, delta "
            f"{target_delta:g}: it protects nothing; lower target_epsilon."
        )
    around = [
        [found for over in _SIDES if (found := settings.at(_scaled(batch, side), _scaled(steps, over)))]
        for side in (_SIDES if grid else ())
    ]
    neighbours = {
        "half the batch": (_scaled(batch, 0.5), steps),
        "twice the batch": (2 * batch, steps),
        "half the steps": (batch, _scaled(steps, 0.5)),
        "twice the steps": (batch, 2 * steps),
    }
    alternatives = {
        name: found for name, (b, t) in neighbours.items() if (b, t) != (batch, steps) and (found := settings.at(b, t))
    }
    low_rank = method == "lora" or size.trainable < size.parameters / ADAPTED
    rate = float(f"{learning_rate(steps, size.parameters, low_rank):.2g}")
    return Advice(
        examples=examples,
        target_epsilon=float(target_epsilon),
        target_delta=float(target_delta),
        tokens=tokens,
        parameters=size.parameters,
        trainable=trainable,
        method=method,
        clip_norm=CLIP_NORM,
        learning_rate=rate,
        setting=chosen,
        alternatives=alternatives,
        grid=list(dict.fromkeys(setting for row in around for setting in row)),
        reasons={**_reasons(chosen, alternatives, limit, size, low_rank, trainable), "method": reason},
        notes=_notes(plan if fits else None),
    )


def _scaled(value: int, factor: float) -> int:
    return max(1, round(value * factor))


def _check(
    examples: Any, epsilon: Any, delta: Any, rank: Any, token_budget: Any, seconds: Any, grid: Any
) -> None:  # fmt: skip
    for name, value, least in (("examples", examples, 2), ("lora_rank", rank, 1)):
        if type(value) is not int or value < least:
            raise ValueError(f"{name} is {value!r}; expected a whole number >= {least}")
    for name, value in (("target_epsilon", epsilon), ("target_delta", delta)):
        if not _positive(value):
            raise ValueError(f"{name} is {value!r}; expected a finite number > 0")
    if delta >= 1 / examples:
        raise ValueError(
            f"target_delta is {delta:g} for {examples:,} examples; expected less than 1 / {examples:,}, as a "
            "mechanism that publishes a random record in full has that delta. Lower it"
        )
    for name, value in (("token_budget", token_budget), ("seconds", seconds)):
        if value is not None and not _positive(value):
            raise ValueError(f"{name} is {value!r}; expected a finite number > 0, or None for no limit")
    if not isinstance(grid, bool):
        raise ValueError(f"grid is {grid!r}; expected True or False")


def _positive(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    return 0 < float(value) < math.inf


def _tokens(tokens: Any, plan: Any) -> int:
    if plan is not None and not isinstance(plan, Plan):
        raise ValueError(f"plan is a {type(plan).__name__}; expected what dpft.plan(model, ...) returns, or None")
    if tokens is None:
        if plan is None:
            raise ValueError("tokens and plan are None; give the tokens of an example, or a plan, which has them")
        return plan.seq_len
    if type(tokens) is not int or tokens < 1:
        raise ValueError(f"tokens is {tokens!r}; expected a whole number >= 1, the tokens of an example")
    if plan is not None and tokens != plan.seq_len:
        raise ValueError(f"tokens is {tokens}, and the plan is of {plan.seq_len}; leave tokens out, or plan for them")
    return tokens


def _size(model: Any, rank: int) -> _Size:
    if isinstance(model, bool) or (isinstance(model, int) and model < 1):
        raise ValueError(f"model is {model!r}; expected a number of parameters >= 1, a module or a config")
    if isinstance(model, int):
        return _Size(model, model, None)
    if not isinstance(model, nn.Module):
        model = _from_config(model)
    every = list(model.parameters())
    trainable = sum(p.numel() for p in every if p.requires_grad)
    if not trainable:
        raise ValueError(f"no parameter of {type(model).__name__} requires a gradient; unfreeze what is to be trained")
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    lora = sum(rank * (m.in_features + m.out_features) for m in linear)
    return _Size(sum(p.numel() for p in every), trainable, lora or None)


def _from_config(config: Any) -> nn.Module:
    """A causal LM on meta tensors."""
    import torch
    from transformers import AutoModelForCausalLM, PretrainedConfig

    if not isinstance(config, PretrainedConfig):
        raise ValueError(
            f"model is a {type(config).__name__}; expected a module, a Hugging Face config or a number of parameters"
        )
    with torch.device("meta"):
        built: nn.Module = AutoModelForCausalLM.from_config(config)
    return built


def _method(size: _Size, plan: Plan | None, rank: int) -> tuple[Method, str]:
    gigabytes = TRAINED_BYTES * size.parameters / 1e9
    if size.trainable < size.parameters:
        return "as given", (
            f"The model trains {size.trainable:,} of its {size.parameters:,} parameters, and stays as it is."
        )
    adapters = f"{size.lora:,} parameters of LoRA at rank {rank}" if size.lora else f"LoRA at rank {rank}"
    if plan is not None and not plan.fits:
        held = plan.predictions[plan.choice].total_bytes / 2**30
        return "lora", (
            f"Full fine-tuning needs {held:.1f} GiB of {plan.memory / 2**30:.1f} GiB by the plan: {adapters} instead."
        )
    if plan is None and size.parameters > MOST_FULL:
        return "lora", (
            f"Full fine-tuning of {size.parameters:,} parameters holds {gigabytes:.0f} GB at rest, and without a plan "
            f"the limit is {TRAINED_BYTES * MOST_FULL / 1e9:.0f} GB: {adapters} instead."
        )
    known = f"{gigabytes:.2g} GB at rest" if plan is None else "the plan fits"
    return "full", (
        f"Full fine-tuning of {size.parameters:,} parameters ({known}): with privacy it is on a par with low-rank "
        "methods or better (Li et al. 2022), so that LoRA is for what does not fit."
    )


def _cost(size: _Size, trainable: int | None, tokens: int, plan: Plan | None) -> Cost:
    if plan is None:
        # Forward 2, gradients of activations 2, of trained weights 2 for each parameter (Kaplan et al. 2020, arXiv
        # 2001.08361), attention not counted.
        return Cost(tokens, (4.0 * size.parameters + 2.0 * (trainable or 0)) * tokens)
    found, long = plan.predictions[plan.choice], plan.long
    at_once = plan.batch_size * plan.world_size // (long.sequence_parallel if long is not None else 1)
    return Cost(tokens, found.flops / plan.batch_size, lambda batch: math.ceil(batch / at_once) * found.seconds)


def _batch_and_steps(settings: Settings, token_budget: float | None, seconds: float | None) -> tuple[int, int, str]:
    """And the limit in words, empty where none binds."""
    batch, steps = settings.unlimited()
    limits = {}
    if token_budget is not None:
        limits[f"{token_budget:.3g} tokens"] = token_budget / settings.cost.tokens
    if seconds is not None:
        assert settings.cost.seconds is not None
        limits[f"{seconds:.3g} seconds"] = seconds * batch / settings.cost.seconds(batch)
    for words, most in sorted(limits.items(), key=lambda item: item[1])[:1]:
        if most < batch * steps:
            batch, steps = settings.within(most)
            if seconds is not None and settings.cost.seconds is not None:  # a small batch fills no physical one
                steps = max(1, min(steps, int(seconds / settings.cost.seconds(batch))))
            return batch, steps, words
    return batch, steps, ""


def _reasons(
    chosen: Setting,
    alternatives: dict[str, Setting],
    limit: str,
    size: _Size,
    low_rank: bool,
    trainable: int | None,
) -> dict[str, str]:
    def gain(name: str) -> str:
        other = alternatives.get(name)
        return "" if other is None else f"{other.signal_to_noise / chosen.signal_to_noise:.2f}"

    rated = f"sampling rate q = {chosen.sample_rate:.3g}, noise {chosen.noise:.2e} a coordinate"
    length = "" if trainable is None else f", {chosen.noise_length:.2g} times the clip norm in length"
    more, half = gain("twice the batch"), gain("half the batch")
    compared = [f"twice the batch makes it {more} times as high" * bool(more), f"half {half}" * bool(half)]
    grows = ", ".join(words for words in compared if words)
    batch = f"{rated}{length}; signal-to-noise ratio {chosen.signal_to_noise:,.0f}, {chosen.share:.0%} of the most"
    batch += f" that this epsilon allows ({grows})." if grows else " that this epsilon allows."
    if limit:
        steps = (
            f"{limit} are {chosen.epochs:.3g} epochs; they go into large batches, down to {FEWEST_STEPS} steps, as "
            "long as half the batch and twice the steps would lose more than a tenth of the signal-to-noise ratio."
        )
    else:
        steps = (
            f"{STEPS} updates, {chosen.epochs:.3g} epochs: about as many as Li et al. 2022 took; the batch is the "
            f"smallest of which twice as much gains less than a factor {WORTH_ITS_COST:g}."
        )
    clip = (
        f"Below nearly every gradient's norm, so that each example has the same weight and AdamW cancels C: the noise "
        f"of {chosen.noise:.1e} a coordinate is far above its epsilon of 1e-8 (Li et al. 2022 take 0.1)."
    )
    scaled = "" if size.parameters <= SMALL_MODEL else ", times the cube root of 124M over the model's parameters"
    lora = f", times {LORA_FACTOR:g} for LoRA" if low_rank else ""
    words = (
        f"{RATE:g} / sqrt({chosen.steps}), at most {HIGHEST_RATE:g}{scaled}{lora}: with AdamW a weight moves by some "
        "eta sqrt(T) where noise dominates; published settings are within a factor of 3. Try a third and three times "
        "as much on public data."
    )
    return {"batch": batch, "steps": steps, "clip_norm": clip, "learning_rate": words}


def _notes(plan: Plan | None) -> list[str]:
    time = "hours are the plan's, without communication" if plan else "FLOPs are 4 a parameter and 2 a trained one"
    return [
        "Poisson sampling, one example as the unit, accountant PLD; the number of examples is treated as public",
        "nothing here depends on the records; a choice among settings by results on them is not accounted for",
        time,
    ]
