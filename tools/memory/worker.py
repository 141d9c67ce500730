"""What one process of the memory profiler does: train a few steps under the tracker, or time them without it."""

from __future__ import annotations

import functools
import gc
import re
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import dpft
from tools.common.failures import out_of_memory, reason_of
from tools.common.processes import lift_limit, limit_memory
from tools.memory.allocator import allocator_of
from tools.memory.events import Owners, Role
from tools.memory.fields import PARTS, Profile, Readings, phase_of
from tools.memory.setup import EXPERIMENTS, Experiment, Setup, make_batch, make_model
from tools.memory.simulate import make_ready, resolved, shares_of, simulation
from tools.memory.timeline import MIB
from tools.memory.tracker import Tracker
from tools.trainers.implementations import DPFlashClippingTrainer

TINY = 8  # tokens of the steps that take the place of those with dpft's isolation check
MADE = {"module": "1_wrapped_with_dp", "optimizer": "2_optimizer_created"}
Say = Callable[[str], None]


class Run:
    """The steps of one experiment, counted.

    dpft's isolation check runs in backward 1, 2, 4, 8, ...: some ten times in a run of thousands. Those of the warm-up
    are measured as such; from then on a tiny step takes the place of the next one.
    """

    def __init__(
        self, setup: Setup, experiment: Experiment, model: Any, made: Callable[[str], None] = lambda _: None
    ) -> None:
        self.setup, self.steps = setup, 0
        self.trainer = experiment.trainer(model, setup, made)
        self.ids = make_batch(setup, model)
        self.tiny = make_batch(setup, model, min(TINY, setup.seq_len))

    def settle(self) -> None:
        """See the class."""
        if self.setup.simulate or not isinstance(self.trainer, DPFlashClippingTrainer):
            return
        while (self.steps + 1) & self.steps == 0:
            self.steps += 1
            self.trainer.train_step(self.tiny)

    def step(self, at: Callable[[str], None] = lambda _: None) -> None:
        """One step; ``at`` is told of the four instants."""
        self.steps += 1
        at("before_forward")
        loss = self.trainer.forward(self.ids)
        at("after_forward")
        self.trainer.backward(loss)
        del loss
        at("after_backward")
        self.trainer.step()
        at("after_step")
        self.trainer.zero_grad()


def owners_of(
    model: nn.Module, optimizer: Callable[[], Any], batch: Callable[[], list[Tensor]], library: str
) -> Owners:
    """Who is asked for tensors."""
    parameters = list(model.parameters())
    modules = list(model.modules())

    def steady() -> Iterator[tuple[Role, Tensor]]:
        yield from ((Role.PARAMETER, p) for p in parameters)
        yield from ((Role.BUFFER, b) for b in model.buffers())
        yield from ((Role.INPUT, ids) for ids in batch())

    def changing() -> Iterator[tuple[Role, Tensor]]:
        yield from ((Role.GRADIENT, p.grad) for p in parameters if p.grad is not None)
        for state in getattr(optimizer(), "state", {}).values():
            yield from ((Role.OPTIMIZER, t) for t in state.values() if isinstance(t, Tensor))
        if library == "dpft":
            held = dpft.book_keeping(model)
            yield from ((Role.NORM, t) for t in held.norms)
            yield from ((Role.KEPT, t) for t in held.kept)
        elif library == "opacus":
            yield from _held_by_opacus(parameters, modules)

    return Owners(steady, changing)


def _held_by_opacus(parameters: list[nn.Parameter], modules: list[nn.Module]) -> Iterator[tuple[Role, Tensor]]:
    """Opacus keeps norms and per-example gradients as attributes of parameters, and layers' inputs of modules."""
    for p in parameters:
        held = p.__dict__
        yield from ((Role.NORM, t) for t in _flat(held.get("_norm_sample")))
        for name in ("grad_sample", "summed_grad"):
            yield from ((Role.KEPT, t) for t in _flat(held.get(name)))
    for module in modules:
        yield from ((Role.KEPT, t) for t in _flat(module.__dict__.get("activations")))


def _flat(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _flat(one)


def _mark_iteration(mark: Callable[[str], None], iteration: int, point: str) -> None:
    mark(f"iter{iteration}_{point}")


def measure_memory(setup: Setup, name: str, say: Say) -> dict[str, Any]:
    """A few steps under the tracker: the result's fields, or those of its failure.

    What runs out of memory, or fails, is a result; before the tracker there is nothing to tell but the reason.
    """
    experiment = EXPERIMENTS[name]
    say("model")
    model = make_model(setup, experiment)
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
            say(words)

        def mark(point: str) -> None:
            go_on(phase_of(point) or point)
            tracker.mark(point)

        try:
            mark("0_model_loaded")
            if setup.memory_limit is not None:
                limit_memory(setup.device, setup.memory_limit)
            run = Run(resolved(setup), experiment, model, lambda what: mark(MADE[what]))
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
    say("events")
    profile = Profile(tracker, readings, shares_of(setup, model, experiment.library))
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
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
        "notes": taken(run),
        "timeline": profile.timeline_fields(setup.num_iter - 1),
        "tracked_step_ms": profile.step_ms(),
        "independent_peak_mb": None if setup.simulate else breakdown["peak_allocated_mb"],
        "tracked_peak_mb": profile.tracked_peak(),
    }


def taken(run: Run) -> list[str]:
    """What was decided during the run."""
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


def measure_time(setup: Setup, name: str, say: Say) -> dict[str, Any]:
    """Milliseconds of each measured step, without a tracker."""
    say("model")
    experiment = EXPERIMENTS[name]
    model = make_model(setup, experiment)
    try:
        if setup.memory_limit is not None:
            limit_memory(setup.device, setup.memory_limit)
        run = Run(setup, experiment, model)
        say("warmup")
        for _ in range(setup.warmup_iter):
            run.step()
        values = []
        for i in range(setup.num_iter):
            run.settle()
            gc.collect()
            say(f"iter{i}")
            synchronize(setup)
            start = time.perf_counter()
            run.step()
            synchronize(setup)
            values.append(1e3 * (time.perf_counter() - start))
    except Exception as error:
        return {"status": "out_of_memory" if out_of_memory(error) else "failed", "reason": reason_of(error)}
    return {"status": "ok", "values": values}


def synchronize(setup: Setup) -> None:
    """Wait for the GPU."""
    if setup.device == "cuda":
        torch.cuda.synchronize()


def spread(values: Iterable[float]) -> dict[str, Any]:
    """Median and range."""
    found = list(values)
    return {"median": statistics.median(found), "min": min(found), "max": max(found), "values": found}
