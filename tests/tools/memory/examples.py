"""Memory profiles for the tests of what is made from them: consistent, and small enough to be read."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

from tools.memory.components import TITLES, UNATTRIBUTED
from tools.memory.result import SCHEMA

Results = list[dict[str, Any]]
# MiB at the peak of a model of some 13M parameters, and what each experiment holds otherwise.
VANILLA = {
    "model_parameters": 50.0,
    "buffers": 0.5,
    "gradients": 50.0,
    "optimizer_states": 100.0,
    "activation_hooks": 180.0,
    "temp_matrices": 40.0,
    "other": 1.0,
    UNATTRIBUTED: 0.3,
}
MORE: dict[str, dict[str, float]] = {
    "ghost": {"book_keeping": 70.0, "norm_samples": 0.02, "temp_matrices": 60.0},
    "flash_clip": {"book_keeping": 70.0, "norm_samples": 0.02, "temp_matrices": 14.0, UNATTRIBUTED: -0.1},
    "fast": {"book_keeping": 20.0, "norm_samples": 0.02, "temp_matrices": 16.0},
    "per_sample": {"book_keeping": 400.0, "norm_samples": 0.02, "gradients": 62.0},
    "opacus_ghost": {"book_keeping": 90.0, "norm_samples": 0.03, "activation_hooks": 210.0},
}
EVERY = ["vanilla", *MORE]
TIMES = {
    "vanilla": 100.0,
    "ghost": 151.0,
    "flash_clip": 149.0,
    "fast": 165.0,
    "per_sample": 260.0,
    "opacus_ghost": 210.0,
}
CONFIG = {
    "vocab_size": 4000,
    "hidden_dim": 256,
    "num_layers": 4,
    "num_heads": 4,
    "seq_len": 512,
    "batch_size": 2,
    "num_iter": 3,
    "warmup_iter": 1,
    "model": None,
    "dtype": "float32",
    "gradient_checkpointing": False,
    "lora": 0,
    "device": "cpu",
    "strategy": "auto",
    "loss_chunk": "auto",
    "optimizer": "adamw",
    "seed": 0,
    "simulate": False,
    "engine": "single",
    "world_size": 1,
}
ENVIRONMENT = {
    "cpu": "Example CPU 2.0",
    "cores": 2,
    "threads": 2,
    "memory_gib": 15.6,
    "python": "3.11.2",
    "versions": {"torch": "2.13.0", "transformers": "5.23.0", "opacus": "1.6.0"},
    "commit": "0123456789abcdef",
    "dirty": False,
    "load_before": 0.1,
    "date": "2026-01-02T03:04:05",
}


def amounts_of(experiment: str) -> dict[str, float]:
    """MiB by component at the peak instant, all of them named."""
    return {key: {**VANILLA, **MORE.get(experiment, {})}.get(key, 0.0) for key in TITLES}


def named(amounts: dict[str, float]) -> dict[str, float]:
    """The same with the names of the file."""
    return {f"{key}_mb": mb for key, mb in amounts.items()}


def _timeline(amounts: dict[str, float], steps: int) -> dict[str, Any]:
    """Activations grow, then shrink while gradients and the private step's tensors grow; the update is short."""
    columns = [key for key in amounts if key != UNATTRIBUTED]
    steady = {"model_parameters", "buffers", "optimizer_states", "other"}
    points = []
    for i in range(steps + 1):
        at = i / steps
        forward, backward = min(1.0, at / 0.4), min(1.0, max(0.0, (at - 0.4) / 0.55))
        share = {"activation_hooks": forward * (1 - backward), "checkpoint_inputs": forward * (1 - backward)}
        wave = 0.2 * abs(math.sin(40 * at))
        values = [amounts[key] * (1.0 if key in steady else share.get(key, max(backward, wave))) for key in columns]
        points.append([150.0 * at, *values])
    marks = [[0.0, "forward"], [60.0, "backward"], [142.5, "step"], [150.0, "end"]]
    return {"unit": "ms", "columns": [f"{key}_mb" for key in columns], "points": points, "marks": marks}


def example(experiment: str = "vanilla", scale: float = 1.0, steps: int = 60, **changes: float) -> dict[str, Any]:
    """A result that is ok.

    Args:
        experiment: its name; one of ``MORE`` brings its own amounts.
        scale: of every amount of memory.
        steps: instants of the timeline.
        **changes: MiB by component, in the place of what the experiment has.
    """
    amounts = {key: scale * changes.get(key, mb) for key, mb in amounts_of(experiment).items()}
    total = sum(amounts.values())
    time = TIMES.get(experiment, 180.0)
    spread = {"median": time, "min": 0.97 * time, "max": 1.05 * time, "values": [0.97 * time, time, 1.05 * time]}
    ratio = time / TIMES["vanilla"]
    ratios = {"median": ratio, "min": 0.99 * ratio, "max": 1.02 * ratio, "values": [0.99 * ratio, ratio, 1.02 * ratio]}
    peak = {"median": total, "min": total, "max": total, "values": [total]}
    first = {key: mb if key in ("model_parameters", "buffers") else 0.0 for key, mb in amounts.items()}
    snapshot = {
        "name": "0_model_loaded",
        "allocated_mb": sum(first.values()),
        "reserved_mb": None,
        "resident_mb": 700.0,
        "timestamp": 1767323045.25,
        "components": named(first),
    }
    early = {key: 0.5 * mb for key, mb in amounts.items()}
    phase = {"module": "model.layers.0.mlp", "operator": "mm", "peak_mb": 0.5 * total, "components": named(early)}
    last = {"module": "lm_head", "operator": "addmm", "peak_mb": total, "components": named(amounts)}
    storage = {"component": "activation_hooks", "shape": [2, 512, 4000], "dtype": "float32", "operator": "mm"}
    result = {
        "schema": SCHEMA,
        "experiment": experiment,
        "words": f"{experiment.replace('_', ' ')}, as its authors wrote it",
        "notes": [],
        "status": "ok",
        "reason": None,
        "failure": None,
        "config": CONFIG,
        "parameters": 13_107_200,
        "avg_time_ms": 1.01 * time,
        "time_ms": spread,
        "time_over_vanilla": ratios,
        "timing": {"interleaved_with": [name for name in EVERY if name != experiment], "alone_because": None},
        "peak_memory_mb": total,
        "breakdown": {**named(amounts), "total_allocated_mb": total, "peak_allocated_mb": total},
        "snapshots": [snapshot],
        "phases": [{"name": "iter0_forward", **phase}, {"name": "iter0_backward", **last}],
        "largest": [{**storage, "mb": 15.625 * scale, "module": "lm_head", "count": 2}],
        "timeline": _timeline(amounts, steps),
        "profiling": {
            "time_ratio": 2.3,
            "independent_peak_mb": total,
            "tracked_peak_mb": 0.9999 * total,
            "independent": "torch.profiler's allocator events",
        },
        "repetitions": {"count": 1, "peak_memory_mb": peak},
        "environment": ENVIRONMENT,
    }
    return copy.deepcopy(result)


def out_of_memory(experiment: str = "per_sample") -> dict[str, Any]:
    """A result of an experiment that ran out of memory in its first backward pass."""
    amounts = {key: 0.7 * mb for key, mb in amounts_of(experiment).items()}
    failure = {
        "phase": "warmup",
        "module": "model.layers.3.mlp.down_proj",
        "allocated_mb": sum(amounts.values()),
        "components": named(amounts),
    }
    times = ("avg_time_ms", "time_ms", "time_over_vanilla", "timing")
    nothing = dict.fromkeys((*times, "peak_memory_mb", "breakdown", "timeline"))
    return {
        **example(experiment),
        **nothing,
        "status": "out_of_memory",
        "reason": "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory",
        "failure": failure,
        "phases": [],
        "largest": [],
        "profiling": None,
        "repetitions": None,
    }


def failed(experiment: str = "opacus_ghost") -> dict[str, Any]:
    """A result of an experiment that failed before anything was measured."""
    reason = "NotImplementedError: <RMSNorm> & co. are not supported, 100% of them"
    nothing: dict[str, Any] = {"status": "failed", "reason": reason, "failure": None, "snapshots": []}
    return {**out_of_memory(experiment), **nothing, "parameters": None}


def simulated(experiment: str = "vanilla", scale: float = 300.0) -> dict[str, Any]:
    """A result of ``--simulate``: no time, no timeline, nothing resident."""
    result = example(experiment, scale)
    result["config"] |= {"simulate": True, "seq_len": 131072, "dtype": "bfloat16"}
    result |= dict.fromkeys(("avg_time_ms", "time_ms", "time_over_vanilla", "timing", "timeline"))
    result["profiling"] |= {"time_ratio": None, "independent_peak_mb": None, "tracked_peak_mb": None}
    for snapshot in result["snapshots"]:
        snapshot["resident_mb"] = None
    return result


def renamed(result: dict[str, Any], name: str) -> dict[str, Any]:
    """The same of another experiment."""
    return {**result, "experiment": name, "timing": {"interleaved_with": ["vanilla"], "alone_because": None}}


def alone(experiment: str) -> dict[str, Any]:
    """A result whose process did not fit into memory beside the others': no ratio to vanilla's time."""
    timing = {"interleaved_with": [], "alone_because": "3 processes at once may need 900 MiB; 800 MiB are free"}
    return {**example(experiment), "time_over_vanilla": None, "timing": timing}


def long_names() -> Results:
    """Names that do not fit under a bar."""
    names = [f"opacus_fast_gradient_clipping_{name}_with_a_long_name" for name in EVERY[1:4]]
    return [example(), *(renamed(example(old), new) for old, new in zip(EVERY[1:4], names, strict=True))]


SETS: dict[str, Callable[[], Results]] = {
    "one": lambda: [example()],
    "three": lambda: [example(name) for name in EVERY[:3]],
    "six": lambda: [example(name) for name in EVERY],
    "lost": lambda: [example(), example("ghost"), out_of_memory(), failed()],
    "all lost": lambda: [out_of_memory("vanilla"), failed("ghost")],
    "long names": long_names,
    "one dominates": lambda: [example(name, activation_hooks=90_000.0) for name in EVERY[:3]],
    "tiny": lambda: [example(name, scale=1e-4) for name in EVERY[:3]],
    "nothing": lambda: [example(scale=0.0), example("ghost", scale=0.0)],
    "less than vanilla": lambda: [example(), example("ghost", activation_hooks=60.0, book_keeping=3.0)],
    "equal": lambda: [example(), *(renamed(example(), f"copy_{i}") for i in range(4))],
    "alone": lambda: [alone(name) for name in EVERY[:3]],
    "simulated": lambda: [simulated(name) for name in EVERY[:3]],
}
