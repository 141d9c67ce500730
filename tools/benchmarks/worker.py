"""The processes of benchmark_steps.py: one case each, which builds its model and then does as it is told.

They are forked from one server that has imported torch and the libraries but run nothing, so a start costs a fork.
What fails is answered with its reason; a process that dies is noticed by :class:`Worker`.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

import dpft
from tools.benchmarks import oracle
from tools.benchmarks.cases import Shape, Step, build_model, find_method, input_ids, make_optimizer
from tools.benchmarks.digest import digest
from tools.common.conditions import describe_device
from tools.common.failures import out_of_memory, reason_of
from tools.common.meter import Meter
from tools.common.processes import end_process, limit_memory

PRELOAD = ["torch", "transformers.models.llama.modeling_llama", "transformers.models.gpt2.modeling_gpt2"]
PRELOAD += ["tools.benchmarks.worker", "opacus", "fastDP"]
FIRST_STEPS, FIRST_TOKENS = 4, 8


class Case:
    """One method at one shape."""

    def __init__(self, shape: Shape, device: str, method: str, frozen_norms: bool = False) -> None:
        """``frozen_norms``: as for a method without a rule for them, to be compared with it."""
        self.shape, self.device, self.steps = shape, device, 0
        built = find_method("fastdp") if frozen_norms else find_method(method)
        self.model = build_model(shape, device, built)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.gradients: Step = find_method(method).make(self.model, shape)
        self.optimizer = make_optimizer(built, self.model, shape) if shape.update else None
        self.tiny = input_ids(shape, device, min(FIRST_TOKENS, shape.tokens))
        # Without the optimiser: the oracle's weights are those of the seed.
        for _ in range(FIRST_STEPS):
            self.steps += 1
            self.gradients(self.tiny)

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
        """Seconds of one step, after ``before`` others that are not timed."""
        ids = input_ids(self.shape, self.device)
        for _ in range(before):
            self.step(ids)
        self.settle()
        self._synchronize()
        start = time.perf_counter()
        found = self.step(ids)
        self._synchronize()
        seconds = time.perf_counter() - start
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


def predict(shape: Shape, device: str) -> dict[str, Any]:
    """What ``dpft.plan`` says of the shape."""
    model = build_model(shape, device)
    planned = dpft.plan(model, batch_size=shape.rows, seq_len=shape.tokens, checkpointing=shape.checkpointing)
    fields = ("peak_bytes", "seconds", "flops", "time_ratio", "memory_ratio")
    found = {name: {f: getattr(p, f) for f in fields} for name, p in planned.predictions.items()}
    plain = {f: getattr(planned.plain, f) for f in fields[:3]}
    return {"choice": planned.choice, "reason": planned.reason, "plain": plain, "strategies": found}


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "expectations": oracle.expectations,
    "predict": predict,
    "describe_device": describe_device,
}


def serve(connection: Connection, threads: int, device: str) -> None:
    """Answer commands ``(name, arguments)`` with ``(True, value)`` or ``(False, reason)`` until the other end closes.

    ``start`` makes the :class:`Case`; other names are its methods, or of :data:`FUNCTIONS`.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its children
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # for as long as the process lives: libraries print
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    if device == "cuda":
        torch.cuda.init()
    case: Case | None = None
    while True:
        try:
            name, arguments = connection.recv()
        except EOFError:
            return
        try:
            value = None
            if name == "start":
                case = Case(*arguments)
                value = case.parameters
            elif name in FUNCTIONS:
                value = FUNCTIONS[name](*arguments)
            else:
                value = getattr(case, name)(*arguments)
            answer = (True, value)
        except Exception as error:  # whatever a library raises is a result of the benchmark
            answer = (False, reason_of(error))
        with contextlib.suppress(BrokenPipeError):
            connection.send(answer)


class WorkerError(RuntimeError):
    """What a worker was asked to do failed; the text is the reason."""


class Worker:
    """The other end of :func:`serve`, in a process of its own that ends with this object's :meth:`end`."""

    def __init__(self, threads: int, device: str, label: str) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, threads, device), name=label, daemon=True)
        self._process.start()
        theirs.close()

    def send(self, name: str, *arguments: Any) -> None:
        """Give a command; :meth:`receive` has its answer."""
        with contextlib.suppress(BrokenPipeError):
            self._connection.send((name, arguments))

    def receive(self, seconds: float) -> Any:
        """The answer to the command given.

        Raises:
            WorkerError: it failed, took longer, or the process died.
        """
        if not self._connection.poll(max(0.0, seconds)):
            self.end()
            raise WorkerError(f"stopped after {seconds:.0f} s")
        try:
            good, value = self._connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join(10)
            status = self._process.exitcode
            raise WorkerError(f"its process ended with status {status}" + " (killed)" * (status == -9)) from None
        if not good:
            raise WorkerError(value)
        return value

    def ask(self, name: str, *arguments: Any, seconds: float) -> Any:
        """:meth:`send` and :meth:`receive`."""
        self.send(name, *arguments)
        return self.receive(seconds)

    @property
    def alive(self) -> bool:
        """Whether the process is there."""
        return self._process.is_alive()

    def end(self) -> None:
        """End the process, whatever it is doing."""
        self._connection.close()
        end_process(self._process)


def end_all(workers: Iterable[Worker]) -> None:
    """End several."""
    for worker in workers:
        worker.end()
