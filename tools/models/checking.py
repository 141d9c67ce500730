"""One row of the table in a process of its own: each strategy beside the oracle, its cost, and what lacks a rule."""

from __future__ import annotations

import functools
import re
import traceback
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import dpft
from tools.common.meter import Meter
from tools.models.building import NotBuiltError
from tools.models.lists import PEFT, Subject
from tools.models.oracle import Expected, compare, dependence, expected, loss_of
from tools.models.precision import DOUBLE, Precision

STRATEGIES = ("one_pass", "two_pass", "per_example", "auto")
EXACT, WRONG, REFUSED, CRASH = "EXACT", "WRONG", "REFUSED", "CRASH"
CHECKED, NOT_BUILT, PLAIN_FAILS = "checked", "not built", "plain fails"
COST_ROWS, COST_TOKENS = 4, 32
# Backward 3: without the isolation checks, which run in backward 1, 2, 4, 8 and so on.
STEPS_BEFORE = 2
Make = Callable[[], nn.Module]
_LACKS = re.compile(r"^  (\S+): (\w+)(.*)$", re.MULTILINE)


def check(subject: Subject) -> dict[str, Any]:
    """Everything about a row, as JSON."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    precision = subject.precision
    result: dict[str, Any] = {"name": subject.name, "head": subject.head, "class": subject.class_name}
    try:
        model = subject.build()
    except NotBuiltError as error:
        return {**result, "status": NOT_BUILT, "reason": str(error)}
    except Exception as error:  # whatever a library raises is a result
        return {**result, "status": NOT_BUILT, "reason": last_line(error), "where": where(error)}
    if subject.head not in PEFT:  # an adapter's base is frozen by design
        result["frozen"] = sum(not p.requires_grad for p in model.parameters())
    result["parameters"] = sum(p.requires_grad for p in model.parameters())
    lengths = subject.lengths()
    try:
        batch = subject.make_batch(model.config, lengths)
        result |= conduct(model, batch, precision)
        make = functools.partial(_another, subject, result["mode"])
        if result["depends_on"] == "padding":
            batch = subject.make_batch(model.config, [max(lengths)] * len(lengths))
        right = expected(model, batch, precision)
    except Exception as error:
        return {**result, "status": PLAIN_FAILS, "reason": last_line(error), "where": where(error)}
    result |= {"status": CHECKED, "without_gradient": sorted(n for n, g in right.sums.items() if not g.any())}
    result["strategies"] = {strategy: judge(make(), batch, right, strategy, precision) for strategy in STRATEGIES}
    lacking = result["strategies"]["one_pass"].get("lacking", [])
    if lacking:
        result["others"] = judge_others(make, batch, {path for path, _ in lacking}, precision)
    result["cost"] = cost(subject, make, result["strategies"])
    return result


def conduct(model: nn.Module, batch: Mapping[str, Tensor], precision: Precision = DOUBLE) -> dict[str, Any]:
    """How the plain model treats its rows; a model whose training forward is random is put into eval mode.

    Returns:
        ``mode``; ``depends_on``: what beside a row changes its outputs, ``rows`` (whatever their lengths),
        ``padding`` (not in a batch of equal rows; so is a batch that has no padding because the model's must not), or
        nothing.
    """
    with torch.no_grad(), precision.context():
        first, second = (loss_of(model, batch) for _ in range(2))
    if first != second:
        model.eval()
    mode = "train" if model.training else "eval"
    tokens = batch["attention_mask"].shape[1]
    longest = int(batch["attention_mask"].sum(1).argmax())
    equal = {name: value[longest : longest + 1].repeat_interleave(3, 0) for name, value in batch.items()}
    generator = torch.Generator().manual_seed(2)
    for i in range(1, 3):
        order = torch.randperm(tokens, generator=generator)
        equal["input_ids"][i] = equal["input_ids"][i, order]
    depends_on = ""
    if dependence(model, equal, precision) > precision.tolerance:
        depends_on = "rows"
    elif batch["attention_mask"].all() or dependence(model, batch, precision) > precision.tolerance:
        depends_on = "padding"
    return {"mode": mode, "depends_on": depends_on}


def judge(
    model: nn.Module, batch: Mapping[str, Tensor], right: Expected, strategy: str, precision: Precision = DOUBLE
) -> dict[str, Any]:
    """A strategy's status, with what belongs to it; the model is wrapped.

    Returns:
        ``status``; ``error`` and ``where`` (the parameter, or ``norms``); for what is refused ``reason`` and
        ``lacking``, ``[path, class]`` of parameters without a rule; for a crash ``reason`` and ``at``; ``chose``, the
        strategy that ran, and of ``auto`` ``explain``, the reason.
    """
    try:
        wrap_any(model, right.max_grad_norm, strategy)
        with precision.context():
            model(**batch).loss.backward()
        stats = dpft.stats(model)
    except dpft.DPFTError as error:
        text = str(error)
        return {
            "status": REFUSED,
            "reason": text.strip().splitlines()[0],
            "lacking": [[path, cls] for path, cls, _ in _LACKS.findall(text)],
            "module": named_module(text),
        }
    except Exception as error:
        return {"status": CRASH, "reason": last_line(error), "at": where(error)}
    sums = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    worst, parameter = compare(stats.norms, sums, right, precision.small)
    found = {"status": EXACT if worst <= precision.tolerance else WRONG, "error": worst, "where": parameter}
    found["chose"] = stats.strategy
    if strategy == "auto":
        found["explain"] = dpft.explain(model, *batch["input_ids"].shape).splitlines()[0]
    return found


def wrap_any(model: nn.Module, max_grad_norm: float, strategy: Any) -> nn.Module:
    """``dpft.wrap`` as the table uses it; the tests plant mistakes here."""
    return dpft.wrap(model, max_grad_norm=max_grad_norm, strategy=strategy)


def judge_others(make: Make, batch: Mapping[str, Tensor], lacking: set[str], precision: Precision) -> dict[str, Any]:
    """One-pass where the parameters without a rule are frozen: does anything else stand in its way?"""

    def frozen() -> nn.Module:
        model = make()
        for name, p in model.named_parameters(remove_duplicate=False):
            if name in lacking:
                p.requires_grad_(False)
        return model

    try:
        right = expected(frozen(), batch, precision)
    except Exception as error:
        return {"status": PLAIN_FAILS, "reason": last_line(error)}
    return judge(frozen(), batch, right, "one_pass", precision)


def _another(subject: Subject, mode: str) -> nn.Module:
    """The same model again: a copy would hold what the forwards of some have left in it."""
    return subject.build().train(mode == "train")


def cost(subject: Subject, make: Make, strategies: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """FLOPs of a private step over those of a plain one, with rows of equal length: one-pass, or what ``auto`` chose.

    Returns:
        ``strategy``, ``flops``, ``plain_flops``; None where neither runs, a ``reason`` where it fails at this shape.
    """
    chosen = next((s for s in ("one_pass", "auto", "per_example") if strategies[s]["status"] in (EXACT, WRONG)), None)
    if chosen is None:
        return None
    try:
        model = make()
        batch = subject.make_batch(model.config, [COST_TOKENS] * COST_ROWS, seed=3)
        plain = step_flops(model, batch, subject.precision)
        private = step_flops(wrap_any(make(), 1.0, chosen), batch, subject.precision)
    except Exception as error:
        return {"strategy": chosen, "reason": last_line(error)}
    return {"strategy": strategies[chosen].get("chose"), "flops": private, "plain_flops": plain}


def step_flops(model: nn.Module, batch: Mapping[str, Tensor], precision: Precision) -> int:
    """FLOPs of a forward and a backward, after :data:`STEPS_BEFORE` others."""
    meter = Meter([])
    with precision.context():
        for _ in range(STEPS_BEFORE):
            model(**batch).loss.mean().backward()
        with meter:
            model(**batch).loss.mean().backward()
    return meter.flops


def named_module(text: str) -> str:
    """The first module that an error names in quotes, or an empty text."""
    found = re.search(r"'([\w.]+\.[\w.]+)'", text)
    return found.group(1) if found else ""


def last_line(error: BaseException) -> str:
    """Its class, and the last line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1].strip() if lines else ''}"[:300]


def where(error: BaseException) -> str:
    """The file and line that raised it, without folders above the package; not this tool's function mode."""
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((f for f in reversed(frames) if "/tools/" not in f.filename), frames[-1])
    return f"{'/'.join(frame.filename.split('/')[-2:])}:{frame.lineno}"
