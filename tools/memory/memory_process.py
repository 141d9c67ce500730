"""What a process that measures memory does: a few training steps under the tracker, told as fields of a result."""

from __future__ import annotations

import functools
import gc
import re
import traceback
from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch import Tensor

import dpft
from tools.common.conditions import describe_device
from tools.common.failures import out_of_memory, reason_of
from tools.common.meter import MIB
from tools.common.processes import lift_limit, limit_memory
from tools.common.worker import report
from tools.memory.allocator import allocator_of
from tools.memory.owners import owners_of
from tools.memory.profile_fields import PARTS, Profile, Readings, phase_of
from tools.memory.setup import EXPERIMENTS, Setup, make_model
from tools.memory.simulate import make_ready, resolved, shares_of, simulation, turn_long_context_on
from tools.memory.steps import Steps
from tools.memory.tracker import Tracker
from tools.trainers.implementations import DPFlashClippingTrainer

MADE = {"module": "1_wrapped_with_dp", "optimizer": "2_optimizer_created"}


def _mark_iteration(mark: Callable[[str], None], iteration: int, point: str) -> None:
    mark(f"iter{iteration}_{point}")


def measure_memory(setup: Setup, name: str) -> dict[str, Any]:
    """Train a few steps under the tracker.

    Returns:
        Fields of the result (:mod:`tools.memory.result`); ``status``, ``reason`` and ``failure`` where a step ran out
        of memory or failed, which is a result too. Besides them ``beside_mb``, what the process takes beside its
        tensors, ``tracked_step_ms``, and ``device``, the GPU.

    Raises:
        Exception: whatever building the model raises: there is nothing to tell but the reason.
    """
    experiment = EXPERIMENTS[name]
    report("model")
    private_mb = psutil.Process().memory_full_info().uss / MIB
    model = make_model(setup, experiment)
    host = turn_long_context_on(setup, model)
    allocator = allocator_of(setup.device, setup.simulate)
    readings = Readings(allocator, setup.simulate)
    batch: list[Tensor] = []
    owners = owners_of(model, lambda: None, lambda: batch, "plain")
    names = {id(module): path for path, module in model.named_modules()}
    device = "meta" if setup.simulate else setup.device
    error: Exception | None = None
    at = "model"
    gc.freeze()  # what was left in cycles before does not die in the middle of a step; what steps leave is collected
    tracker = Tracker(device, owners, names, allocator, readings.take)
    with allocator.running(), tracker, simulation(setup, tracker):

        def go_on(words: str) -> None:
            nonlocal at
            at = words
            report(words)

        def mark(point: str) -> None:
            go_on(phase_of(point) or point)
            tracker.mark(point)

        try:
            mark("0_model_loaded")
            if setup.memory_limit is not None:
                limit_memory(setup.device, setup.memory_limit)
            run = Steps(resolved(setup), experiment, model, lambda what: mark(MADE[what]))
            batch += [run.ids, run.tiny]
            optimizer = run.trainer.optimizer
            tracker.owners = owners_of(model, lambda: optimizer, lambda: batch, experiment.library)
            for p in model.parameters():
                if p.requires_grad:
                    p.register_post_accumulate_grad_hook(tracker.is_gradient)
            make_ready(setup, model, experiment.library)
            for _ in range(setup.warmup_iter):
                run.step(lambda point: go_on(f"warmup, {PARTS.get(point, 'end')}"))
            mark("3_after_warmup")
            for i in range(setup.num_iter):
                run.settle()
                gc.collect()
                run.step(functools.partial(_mark_iteration, mark, i))
        except Exception as caught:  # whatever a library raises is a result of the profile
            error = caught
            traceback.clear_frames(caught.__traceback__)  # which hold what the step had made
        if setup.memory_limit is not None:
            lift_limit(setup.device)  # for what the profilers do with what they have
    gc.unfreeze()
    report("events")
    profile = Profile(tracker, readings, shares_of(setup, model, experiment.library))
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    found |= {"beside_mb": private_mb if setup.simulate or setup.device == "cpu" else beside_tensors()}
    found |= {"device": {} if setup.simulate else describe_device(setup.device)}
    found |= {"snapshots": profile.snapshots(), "phases": profile.phase_fields()}
    if error is not None:
        lost = out_of_memory(error)
        failure = profile.failure()
        return {
            **found,
            "status": "out_of_memory" if lost else "failed",
            "reason": missing_memory(error, setup) if lost else reason_of(error),
            "failure": None if failure is None else {**failure, "phase": at},
        }
    breakdown = profile.breakdown()
    return {
        **found,
        "status": "ok",
        "peak_memory_mb": breakdown["peak_allocated_mb"],
        "breakdown": breakdown,
        "largest": profile.largest(),
        "highest": {f"{name}_mb": size / MIB for name, size in profile.timeline.highest.items()},
        "notes": strategy_notes(run),
        "timeline": profile.timeline_fields(setup.num_iter - 1),
        "host": None if host is None else profile.host_fields(setup.num_iter - 1, host.events),
        "tracked_step_ms": profile.step_ms(),
        "independent_peak_mb": None if setup.simulate else breakdown["peak_allocated_mb"],
        "tracked_peak_mb": profile.tracked_peak(),
    }


def strategy_notes(run: Steps) -> list[str]:
    """The strategy that dpft decided on during the run; empty for other libraries."""
    if not isinstance(run.trainer, DPFlashClippingTrainer):
        return []
    return [f"strategy taken: {dpft.stats(run.trainer.model).strategy}"]


def missing_memory(error: Exception, setup: Setup) -> str:
    """What a failed allocation asked for, where torch says so."""
    asked = re.search(r"tried to allocate ([\d.]+) (bytes|[KMGT]iB)", str(error), re.IGNORECASE)
    if asked is None:
        return reason_of(error)
    size, unit = float(asked[1]), asked[2]
    words = f"{size / MIB:.1f} MiB" if unit == "bytes" else f"{asked[1]} {unit}"
    limit = f"; the limit is {setup.memory_limit / 2**30:g} GiB beyond the model" if setup.memory_limit else ""
    return f"out of memory: an operation asked for {words} more{limit}"


def beside_tensors() -> float:
    """MiB of the GPU's memory that are in use beside this process's tensors: its own context, and other programs."""
    free, total = torch.cuda.mem_get_info()
    return (total - free - torch.cuda.memory_reserved()) / MIB
