"""What a process does for one trainer at one shape: steps that are counted, profiled or timed.

Memory is measured over the trainer's construction and its first steps, then operators by class, and last what
``torch.profiler`` sees. Each has steps of its own: none disturbs another. Times are of another process.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from tools.benchmarks.cases import Method, Shape, build_model, input_ids, plain
from tools.common.conditions import describe_device
from tools.common.meter import Meter
from tools.trainers.implementations import TRAINERS, Trainer
from tools.trainers.operators import OperatorCounter

PRELOAD = ["torch", "transformers.models.llama.modeling_llama", "tools.trainers.worker"]
PHASES = ("forward", "backward", "step", "zero_grad")
COUNTED_STEPS, PROFILED_STEPS, TINY_TOKENS = 5, 2, 8
Around = Callable[[str], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True)
class Job:
    """What is measured.

    Attributes:
        trainer: a name of :data:`tools.trainers.TRAINERS`, or ``module:Class`` of one's own.
        shape: the model and the batch.
        device: ``"cpu"`` or ``"cuda"``.
        threads: of torch.
        warmup: steps before anything is measured, at least 1.
        steps: that are timed, at least 1.
        trace: where the Chrome trace goes.
    """

    trainer: str
    shape: Shape
    device: str
    threads: int
    warmup: int
    steps: int
    trace: Path


def find_trainer(name: str) -> type[Trainer]:
    """A trainer's class by its name, or ``module:Class``.

    Raises:
        ValueError: no such name, or something that is no :class:`tools.trainers.Trainer`.
        ImportError, AttributeError: no such module or class.
    """
    if name in TRAINERS:
        return TRAINERS[name]
    module, _, attribute = name.partition(":")
    found = getattr(importlib.import_module(module), attribute) if module and attribute else None
    if not (isinstance(found, type) and issubclass(found, Trainer)):
        raise ValueError(f"trainer is {name!r}; expected one of {', '.join(TRAINERS)}, or module:Class of your own")
    return found


class Session:
    """A model, its trainer, and steps that are counted."""

    def __init__(self, job: Job) -> None:
        self.job, self.steps = job, 0
        self.cuda = job.device == "cuda"
        self._make = find_trainer(job.trainer)
        self.model = build_model(job.shape, job.device, Method(plain, reentrant=self._make.reentrant))
        self.ids = input_ids(job.shape, job.device)
        self.tiny = self.ids[:, :TINY_TOKENS].clone()

    def step(self, ids: Tensor, around: Around = contextlib.nullcontext) -> None:
        """A training step; ``around`` makes, for the name of a phase, a context that it runs in."""
        self.steps += 1
        with around("forward"):
            loss = self.trainer.forward(ids)
        with around("backward"):
            self.trainer.backward(loss)
            del loss
        with around("step"):
            self.trainer.step()
        with around("zero_grad"):
            self.trainer.zero_grad()

    def settle(self, count: int = 1) -> None:
        """Take tiny steps until dpft's isolation check is due in none of the next ``count``.

        It is made at backward 1, 2, 4, 8, ...: some ten times in a run of thousands, and would be in half of these.
        """
        while any((self.steps + k) & (self.steps + k - 1) == 0 for k in range(1, count + 1)):
            self.step(self.tiny)

    def warm_up(self) -> None:
        """Make the trainer, and take the steps before those that are measured."""
        self.trainer = self._make(self.model, rows=self.job.shape.rows)
        for _ in range(self.job.warmup):
            self.step(self.ids)
        self.settle()

    def memory(self) -> dict[str, int]:
        """Make the trainer, warm up, and measure the peak of a step and what stays after it, in bytes.

        On a CPU live storages, as :class:`tools.common.meter.Meter` counts them; on a GPU what its allocator gave out,
        with its rounding and the libraries' workspaces.
        """
        known = [*self.model.parameters(), *self.model.buffers(), self.ids, self.tiny]
        base = storage_bytes(known)
        with contextlib.nullcontext() if self.cuda else Meter(known) as meter:
            self.warm_up()
            gc.collect()
            if meter is None:
                self.synchronize()
                torch.cuda.reset_peak_memory_stats()
            else:
                meter.peak = meter.live
            self.step(self.ids)
            self.synchronize()
            gc.collect()
            peak = torch.cuda.max_memory_allocated() if meter is None else base + meter.peak
            live = torch.cuda.memory_allocated() if meter is None else base + meter.live
        parameters = list(self.model.parameters())
        state = storage_bytes(t for s in self.trainer.optimizer.state.values() for t in s.values())
        return {
            "peak_bytes": peak,
            "parameter_bytes": storage_bytes(parameters),
            "optimizer_state_bytes": state,
            "retained_bytes": live - base - state,
            "retained_gradient_bytes": storage_bytes(p.grad for p in parameters),
        }

    def timed_step(self) -> dict[str, float]:
        """Seconds of each phase of one step, a GPU waited for after each."""
        seconds: dict[str, float] = {}

        @contextlib.contextmanager
        def timed(name: str) -> Iterator[None]:
            start = time.perf_counter()
            yield
            self.synchronize()
            seconds[name] = time.perf_counter() - start

        self.settle()
        gc.collect()
        self.synchronize()
        self.step(self.ids, timed)
        return seconds

    def classes(self) -> dict[str, dict[str, float]]:
        """The operators of a step, by class; see :mod:`tools.trainers.operators`. Seconds: the median of some."""
        counted = []
        for _ in range(COUNTED_STEPS):
            self.settle()
            with OperatorCounter(self.job.device) as counter:
                self.step(self.ids)
            counted.append(counter.counts)
        found = {name: asdict(count) for name, count in counted[-1].items()}
        for name, count in found.items():
            count["seconds"] = statistics.median(counts[name].seconds for counts in counted)
        return found

    def operators(self) -> list[dict[str, Any]]:
        """Operators of some steps under ``torch.profiler``, by self time on the device, whose trace is written."""
        self.settle(PROFILED_STEPS)
        self.synchronize()
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.cuda
        with profile(activities=activities, record_shapes=True, profile_memory=True) as profiler:
            for _ in range(PROFILED_STEPS):
                self.step(self.ids, record_function)
            self.synchronize()
        part = self.job.trace.with_name(f".{self.job.trace.name}")
        profiler.export_chrome_trace(str(part))
        part.replace(self.job.trace)
        found = []
        for event in profiler.key_averages():
            # A kernel's time is also that of the operator that launched it, and an annotation's is no operator's.
            if event.device_type.name != "CPU" or event.is_user_annotation:
                continue
            microseconds = event.self_device_time_total if self.cuda else event.self_cpu_time_total
            seconds = microseconds / 1e6 / PROFILED_STEPS
            found.append({"name": event.key, "calls": event.count / PROFILED_STEPS, "seconds": seconds})
        whole = sum(row["seconds"] for row in found)
        for row in found:
            row["share"] = row["seconds"] / whole if whole else 0.0
        return sorted(found, key=lambda row: -row["seconds"])

    def profile(self) -> dict[str, Any]:
        """All that is measured but the time: memory, then operators by class, then what the profiler sees."""
        found: dict[str, Any] = {"parameters": sum(p.numel() for p in self.model.parameters()), **self.memory()}
        found["classes"] = self.classes()
        found["operators"] = self.operators()
        return {**found, "machine": describe_device(self.job.device)}

    def synchronize(self) -> None:
        """Wait for the GPU, if there is one."""
        if self.cuda:
            torch.cuda.synchronize()


def storage_bytes(tensors: Iterable[Any]) -> int:
    """Bytes of the storages of those that are tensors, each storage once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if isinstance(t, Tensor)}
    return sum(storages.values())
