"""What a process of benchmark_steps.py does: one method at one shape, or what ``dpft.plan`` says of a shape."""

from __future__ import annotations

import gc
import statistics
import time
from typing import Any

import torch
from torch import Tensor

import dpft
from tools.benchmarks import oracle
from tools.benchmarks.cases import Shape, Step, build_model, find_method, input_ids, make_optimizer
from tools.benchmarks.digest import digest
from tools.common.failures import out_of_memory
from tools.common.meter import Meter
from tools.common.processes import limit_memory

PRELOAD = ["torch", "transformers.models.llama.modeling_llama", "transformers.models.gpt2.modeling_gpt2"]
PRELOAD += ["transformers.models.bert.modeling_bert", "peft"]
PRELOAD += ["tools.benchmarks.worker", "opacus", "fastDP"]
FIRST_STEPS, FIRST_TOKENS = 4, 8


class Case:
    """One method at one shape."""

    def __init__(self, shape: Shape, device: str, method: str, frozen_norms: bool = False) -> None:
        """``frozen_norms``: as for a method without a rule for them, to be compared with it."""
        self.shape, self.device, self.steps = shape, device, 0
        built = find_method("fastdp") if frozen_norms else find_method(method)
        self.model = build_model(shape, device, built)
        self.gradients: Step = find_method(method).make(self.model, shape)
        self.optimizer = make_optimizer(built, self.model, shape) if shape.update else None
        self.tiny = input_ids(shape, device, min(FIRST_TOKENS, shape.tokens))
        # Without the optimiser: the oracle's weights are those of the seed.
        for _ in range(FIRST_STEPS):
            self.steps += 1
            self.gradients(self.tiny)

    def parameters(self) -> int:
        """How many the model has."""
        return sum(p.numel() for p in self.model.parameters())

    def step(self, ids: Tensor) -> dict[str, Tensor]:
        """One step, counted; its gradients, unless an optimiser has used them up."""
        self.steps += 1
        found = self.gradients(ids)
        if self.optimizer is None:
            return found
        for name, p in self.model.named_parameters():
            p.grad = found.pop(name, None)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return found

    def settle(self) -> None:
        """Take a tiny step where dpft's next would be one with its isolation check: backward 1, 2, 4, 8, ...

        A run has thousands of steps, and some ten of those.
        """
        while (self.steps + 1) & self.steps == 0:
            self.step(self.tiny)

    def check(self) -> dict[str, Any]:
        """The digest of a step on the oracle's batch."""
        self.settle()
        self.steps += 1
        return {"digest": digest(self.gradients(oracle.small_ids(self.shape, self.device)))}

    def probe(self) -> dict[str, Any]:
        """One step, not timed: the digest of its gradients, FLOPs, peak bytes above parameters, buffers and batch."""
        if self.optimizer is not None:
            self.step(self.tiny)  # which makes its state
        self.settle()
        ids = input_ids(self.shape, self.device)
        gc.collect()
        known = [*self.model.parameters(), *self.model.buffers(), ids]
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        with Meter(known) as meter:
            found = self.step(ids)
        peak = meter.peak
        if self.device == "cuda":
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - sum(t.untyped_storage().nbytes() for t in known)
        return {"digest": digest(found), "flops": meter.flops, "peak_bytes": peak}

    def time(self, before: int) -> float:
        """Seconds of one step, on a CPU of the processor, after ``before`` others that are not timed."""
        ids = input_ids(self.shape, self.device)
        for _ in range(before):
            self.step(ids)
        self.settle()
        self._synchronize()
        clock = time.process_time if self.device == "cpu" else time.perf_counter
        start = clock()
        found = self.step(ids)
        self._synchronize()
        seconds = clock() - start
        del found
        return seconds

    def fits(self, tokens: int) -> bool:
        """Whether a step of that length ends without running out of memory."""
        self.settle()
        self.clear()
        try:
            self.step(input_ids(self.shape, self.device, tokens))
            self._synchronize()
        except Exception as error:
            if not out_of_memory(error):
                raise
            return False
        finally:
            self.clear()
        return True

    def limit(self, free: int) -> None:
        """Let the process allocate at most so many bytes more than it has now."""
        limit_memory(self.device, free)

    def park(self, device: str) -> None:
        """Move the model aside while others have their turn, or back."""
        self.model.to(device)
        self.clear()

    def clear(self) -> None:
        """Give back what a failed step left, and what the allocator keeps."""
        for p in self.model.parameters():
            p.grad = None
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def first_steps(shape: Shape, device: str, method: str = "one_pass", count: int = 20) -> dict[str, float]:
    """A private model's first steps, with their isolation checks, in turns with plain ones of a model that is warm.

    Returns:
        ``first``: the first step over the median of the plain ones; ``all``: the first ``count`` together over as many
        plain ones, which the machine's noise lengthens alike.
    """
    ids = input_ids(shape, device)
    models = {name: build_model(shape, device, find_method(name)) for name in ("plain", method)}
    steps = {name: find_method(name).make(model, shape) for name, model in models.items()}
    for _ in range(3):
        steps["plain"](ids)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    clock = time.process_time if device == "cpu" else time.perf_counter
    for _ in range(count):
        for name, step in steps.items():
            start = clock()
            step(ids)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(clock() - start)
    one = statistics.median(seconds["plain"])
    return {"first": seconds[method][0] / one, "all": sum(seconds[method]) / sum(seconds["plain"]), "count": count}


def predict(shape: Shape, device: str) -> dict[str, Any]:
    """What ``dpft.plan`` says of the shape."""
    model = build_model(shape, device)
    planned = dpft.plan(model, batch_size=shape.rows, seq_len=shape.tokens, checkpointing=shape.checkpointing)
    fields = ("peak_bytes", "seconds", "flops", "time_ratio", "memory_ratio")
    found = {name: {f: getattr(p, f) for f in fields} for name, p in planned.predictions.items()}
    plain = {f: getattr(planned.plain, f) for f in fields[:3]}
    return {"choice": planned.choice, "reason": planned.reason, "plain": plain, "strategies": found}
