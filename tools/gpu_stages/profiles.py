"""What a one-pass step adds to a plain one, as ``torch.profiler`` sees it: kernels, launches, gaps."""

from __future__ import annotations

import gc
import time
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from tools.benchmarks.cases import input_ids
from tools.benchmarks.worker import Case
from tools.gpu_stages.context import Context
from tools.gpu_stages.steps import MODEL, TINY

STEPS, TOP = 3, 25


def run(context: Context) -> None:
    """One row a method, then the kernels whose time differs most."""
    found = {method: profiled(context, method) for method in ("plain", "one_pass")}
    for method, (totals, _) in found.items():
        context.add(method=method, **totals)
    plain, private = found["plain"][1], found["one_pass"][1]
    more = {name: _of(private, name)[1] - _of(plain, name)[1] for name in {*plain, *private}}
    for name in sorted(more, key=lambda name: -abs(more[name]))[:TOP]:
        context.add(
            kernel=name,
            more_ms=more[name],
            plain={"calls": _of(plain, name)[0], "ms": _of(plain, name)[1]},
            one_pass={"calls": _of(private, name)[0], "ms": _of(private, name)[1]},
        )


def _of(kernels: dict[str, tuple[float, float]], name: str) -> tuple[float, float]:
    return kernels.get(name, (0.0, 0.0))


def profiled(context: Context, method: str) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Totals of a step in ms, and of each kernel (on a CPU: operator) calls and ms a step."""
    shape = TINY if context.rehearse else MODEL
    case = Case(shape, context.device, method)
    ids = input_ids(shape, context.device)
    case.step(ids)
    while any((case.steps + k) & (case.steps + k - 1) == 0 for k in range(1, STEPS + 1)):
        case.step(case.tiny)  # no step with dpft's isolation check among those that are profiled
    context.synchronize()
    cuda = context.device == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as profiler:
        start = time.perf_counter()
        for _ in range(STEPS):
            case.step(ids)
        context.synchronize()
        wall = 1e3 * (time.perf_counter() - start) / STEPS
    kernels: dict[str, tuple[float, float]] = {}
    launches = 0.0
    for event in profiler.key_averages():
        launches += event.count / STEPS if event.key.startswith(("cudaLaunchKernel", "cuLaunchKernel")) else 0.0
        if cuda != (event.device_type.name == "CUDA") or event.is_user_annotation:
            continue
        microseconds: Any = event.self_device_time_total if cuda else event.self_cpu_time_total
        kernels[event.key] = (event.count / STEPS, microseconds / 1e3 / STEPS)
    busy = sum(ms for _, ms in kernels.values())
    totals = {"wall_ms": wall, "busy_ms": busy, "gaps_ms": wall - busy, "launches": launches}
    totals["kernels"] = sum(calls for calls, _ in kernels.values())
    del case
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    return totals, kernels
