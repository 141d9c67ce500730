"""Time and memory of training steps, private and plain, interleaved in one process."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

import dpft
from tools.benchmarks.cases import Shape, Step, find_method, input_ids
from tools.benchmarks.worker import Case
from tools.common.failures import out_of_memory, reason_of
from tools.common.meter import Meter
from tools.common.spread import spread
from tools.gpu_stages.context import PARTIAL, Context

MODEL = Shape("llama", 2048, 20, 32_000, 16_384, 1, dtype="bfloat16")
TINY = Shape("llama", 64, 2, 300, 64, 1, dtype="bfloat16")
LLAMA_1B = Shape(
    "llama", 2048, 16, 128_256, 131_072, 1, "bfloat16", True, True, heads=32, kv_heads=8, intermediate=8192, tied=True
)  # fmt: skip
ROUNDS = 5
GPU_CHUNK = 2048  # tokens, as dpft's own choice
HERE = "tools.gpu_stages.steps"


def _with_lora(model: Any, shape: Shape, method: str) -> Step:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return find_method(method).make(get_peft_model(model, config).to(model.device), shape)


def lora_plain(model: Any, shape: Shape) -> Step:
    """Plain training of adapters of rank 16 on all linear layers."""
    return _with_lora(model, shape, "plain")


def lora_one_pass(model: Any, shape: Shape) -> Step:
    """The same, private."""
    return _with_lora(model, shape, "one_pass")


def tiled_plain(model: Any, shape: Shape) -> Step:
    """Plain training under ``dpft.long_context``, with the head in chunks, as the private step has it."""
    dpft.wrap(model, clipping="none", loss_chunk=GPU_CHUNK)
    dpft.long_context(model)
    return find_method("plain").make(model, shape)


def tiled_one_pass(model: Any, shape: Shape) -> Step:
    """The same, private."""
    made = find_method("one_pass").make(model, shape)
    dpft.long_context(model)
    return made


class Entry:
    """One method at one shape: its model, its times and its peak."""

    def __init__(self, context: Context, shape: Shape, method: str) -> None:
        self.context, self.shape, self.method = context, shape, method
        self.row: dict[str, Any] = {"shape": str(shape), "method": method.rpartition(":")[2]}
        self.seconds: list[float] = []
        self.case: Case | None = None
        self._try(self._build)

    def _build(self) -> None:
        self.case = Case(self.shape, self.context.device, self.method)
        self.row["parameters"] = self.case.parameters()

    def _try(self, what: Any) -> None:
        try:
            what()
        except Exception as error:  # whatever a library raises is a result
            self.row["reason"] = "out of memory" if out_of_memory(error) else reason_of(error)
            self.case = None
            gc.collect()
            if self.context.device == "cuda":
                torch.cuda.empty_cache()

    def measure(self) -> None:
        """Peak of one step above what is there between steps, in bytes; a warm-up for the times."""
        if self.case is not None:
            self._try(self._peak)

    def _peak(self) -> None:
        assert self.case is not None
        ids = input_ids(self.shape, self.context.device)
        self.case.settle()
        gc.collect()
        self.context.synchronize()
        began = time.perf_counter()
        if self.context.device == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            found = self.case.step(ids)
            self.context.synchronize()
            self.row["peak_bytes"] = torch.cuda.max_memory_allocated() - before
            self.row["allocated_peak_bytes"] = torch.cuda.max_memory_allocated()
        else:
            with Meter([*self.case.model.parameters(), *self.case.model.buffers(), ids]) as meter:
                found = self.case.step(ids)
            self.row["peak_bytes"] = meter.peak
        self.row["first_seconds"] = time.perf_counter() - began
        del found

    def time(self) -> None:
        """One step, timed."""
        if self.case is not None:
            self._try(self._time)

    def _time(self) -> None:
        assert self.case is not None
        self.seconds.append(self.case.time(0))


def compare(context: Context, shape: Shape, methods: Sequence[str], rounds: int = ROUNDS) -> None:
    """Rows of all methods at a shape; ratios are to the first of them, of the same round.

    A round that would not end in time is not begun; then the step in which memory was measured is the only one.
    """
    began = time.monotonic()
    entries = []
    for method in methods:
        entries.append(Entry(context, shape, method))
        entries[-1].measure()
        context.write(PARTIAL, measuring=[entry.row for entry in entries])
    taken = sum(entry.row.get("first_seconds", 0.0) for entry in entries)
    for number in range(rounds):
        if context.left < 1.2 * taken:
            break
        start = time.monotonic()
        for entry in entries if number % 2 == 0 else entries[::-1]:
            entry.time()
        taken = time.monotonic() - start
    plain = entries[0]
    for entry in entries:
        row = entry.row
        if entry.case is not None and entry.seconds:
            row["seconds"] = spread(entry.seconds)
            row["tokens_per_second"] = shape.rows * shape.tokens / row["seconds"]["median"]
            if plain.case is not None:
                row["time_ratio"] = spread(a / b for a, b in zip(entry.seconds, plain.seconds, strict=False))
                row["memory_ratio"] = row["peak_bytes"] / plain.row["peak_bytes"]
        context.add(**row, rounds=len(entry.seconds))
    del entries, plain
    gc.collect()
    if context.device == "cuda":
        torch.cuda.empty_cache()
    context.add(what="taken", shape=str(shape), seconds=time.monotonic() - began)


def long(context: Context) -> None:
    """One long example, without checkpointing."""
    shape = TINY if context.rehearse else MODEL
    compare(context, shape, ("plain", "one_pass", "two_pass", *_peers(context)))


def _peers(context: Context) -> tuple[str, ...]:
    if context.missing("opacus"):
        context.add(method="opacus_ghost", reason="Opacus is not installed")
        return ()
    return ("opacus_ghost",)


def short(context: Context) -> None:
    """Many short examples, the whole model and adapters."""
    adapters = () if context.missing("peft") else (f"{HERE}:lora_plain", f"{HERE}:lora_one_pass")
    if not adapters:
        context.add(method="lora", reason="peft is not installed")
    for rows, tokens in ((2, 16), (4, 8)) if context.rehearse else ((16, 128), (64, 256), (4, 2048)):
        shape = replace(TINY if context.rehearse else MODEL, rows=rows, tokens=tokens)
        for methods in (("plain", "one_pass"), adapters):
            if methods and context.left > 3:
                compare(context, shape, methods)


def longer(context: Context) -> None:
    """Contexts that need checkpointing."""
    for tokens in (64, 96) if context.rehearse else (32_768, 65_536):
        shape = replace(TINY if context.rehearse else MODEL, tokens=tokens, checkpointing=True)
        if context.left > 3:
            compare(context, shape, ("plain", "one_pass"), rounds=3)


def llama_1b(context: Context) -> None:
    """Whole private steps of a real model's shape, with AdamW and noise."""
    shape = replace(LLAMA_1B, width=64, layers=2, vocab=300, tokens=128, heads=4, kv_heads=2, intermediate=96)
    compare(context, shape if context.rehearse else LLAMA_1B, ("one_pass",), rounds=2)


def long_context(context: Context) -> None:
    """The same model under ``dpft.long_context``: twice the tokens, beside plain training with it."""
    shape = replace(LLAMA_1B, tokens=262_144)
    if context.rehearse:
        shape = replace(LLAMA_1B, width=64, layers=2, vocab=300, tokens=600, heads=4, kv_heads=2, intermediate=96)
    compare(context, shape, (f"{HERE}:tiled_one_pass", f"{HERE}:tiled_plain"), rounds=1)
