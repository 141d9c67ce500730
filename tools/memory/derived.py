"""Numbers and words derived from stored results, so that tables, pictures and the comparison all say the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tools.memory.components import TITLES, UNATTRIBUTED
from tools.memory.units import counted, unit_for

Results = Sequence[dict[str, Any]]  # stored results, in the order that they are shown in
STATUS_WORDS = {"ok": "ok", "out_of_memory": "out of memory", "failed": "failed"}


def amounts(result: Mapping[str, Any]) -> dict[str, float]:
    """MiB by component at the peak instant, in drawing order; empty where none was measured."""
    breakdown = result["breakdown"]
    return {key: breakdown[f"{key}_mb"] for key in TITLES} if breakdown else {}


def milliseconds(result: Mapping[str, Any]) -> float | None:
    """Median time of a step; None where there is none: simulated, or failed."""
    spread = result["time_ms"]
    time: float | None = spread["median"] if spread else result["avg_time_ms"]
    return time


def time_ratio(result: Mapping[str, Any]) -> float | None:
    """Median over the rounds of the time over vanilla's of the same round; None where they shared no rounds."""
    ratios = result.get("time_over_vanilla")
    ratio: float | None = ratios["median"] if ratios else None
    return ratio


def timed_alone(result: Mapping[str, Any]) -> str | None:
    """Why the times have no ratio to vanilla's; None where they have one, or nothing is known of it."""
    timing = result.get("timing")
    reason: str | None = timing["alone_because"] if timing else None
    return reason


def place(entry: Mapping[str, Any]) -> str:
    """Where it was, from the module and the operator as far as they are known."""
    module, operator = entry.get("module"), entry.get("operator")
    return f"{module} ({operator})" if module and operator else str(module or operator or "-")


def why_not(result: Mapping[str, Any]) -> str:
    """Why a result has no peak, with where it stopped; empty for one that is ok."""
    if result["status"] == "ok":
        return ""
    failure = result["failure"] or {}
    parts = [STATUS_WORDS[result["status"]]]
    if failure.get("phase"):
        parts[0] += f" in {failure['phase']}"
    if failure.get("module"):
        parts[0] += f" at {failure['module']}"
    if failure.get("allocated_mb") is not None:
        unit = unit_for([failure["allocated_mb"]])
        parts.append(f"{unit.text(failure['allocated_mb'])} {unit.name} allocated")
    if result["status"] == "failed":
        parts.append(result["reason"])
    return ", ".join(parts)


def failed_amounts(result: Mapping[str, Any]) -> dict[str, float]:
    """MiB by component when an experiment failed; empty where that is not known, or it did not."""
    components = (result["failure"] or {}).get("components") or {}
    return {name.removesuffix("_mb"): mb for name, mb in components.items()}


def peak_phase(result: Mapping[str, Any]) -> dict[str, Any] | None:
    """The phase of a measured iteration with the highest peak, the first among equals; None where there is none."""
    measured = [phase for phase in result["phases"] if phase["name"].startswith("iter")]
    phase: dict[str, Any] | None = max(measured, key=lambda phase: phase["peak_mb"], default=None)
    return phase


def added_over(result: Mapping[str, Any], vanilla: Mapping[str, Any]) -> float:
    """MiB at the peak above the vanilla experiment's."""
    added: float = result["breakdown"]["total_allocated_mb"] - vanilla["breakdown"]["total_allocated_mb"]
    return added


def times_of(result: Mapping[str, Any], vanilla: Mapping[str, Any]) -> float | None:
    """The peak as a multiple of the vanilla experiment's; None where that is 0."""
    base = vanilla["breakdown"]["total_allocated_mb"]
    return float(result["breakdown"]["total_allocated_mb"] / base) if base else None


def vanilla_of(results: Results) -> dict[str, Any] | None:
    """The vanilla experiment, if it is there and was measured."""
    return next((r for r in results if r["experiment"] == "vanilla" and r["breakdown"]), None)


def unattributed_percent(result: Mapping[str, Any]) -> float | None:
    """Share of the peak that belongs to no component."""
    breakdown = result["breakdown"]
    if not breakdown or not breakdown["total_allocated_mb"]:
        return None
    return 100.0 * float(breakdown[f"{UNATTRIBUTED}_mb"] / breakdown["total_allocated_mb"])


def _distinct(values: Iterable[Any]) -> str:
    return " / ".join(dict.fromkeys(str(value) for value in values if value not in (None, "")))


def _model(config: Mapping[str, Any]) -> str:
    if config.get("model"):
        return f"model {config['model']}"
    words = {"hidden_dim": "hidden {}", "num_layers": "layers {}", "num_heads": "heads {}", "vocab_size": "V={}"}
    return ", ".join(text.format(config[key]) for key, text in words.items() if key in config)


def _device(result: Mapping[str, Any]) -> str:
    environment, config = result["environment"], result["config"]
    if config.get("simulate"):
        return "simulated with fake tensors"
    if config.get("device") != "cpu" and environment.get("gpu"):
        return str(environment["gpu"])
    threads = f", {counted(environment['threads'], 'thread')}" if environment.get("threads") else ""
    return f"{environment.get('cpu') or 'unknown machine'}{threads}"


def _commit(environment: Mapping[str, Any]) -> str:
    changes = " with changes" if environment.get("dirty") else ""
    return f"commit {str(environment.get('commit') or 'unknown')[:8]}{changes}"


def conditions(results: Results) -> str:
    """Machine, torch, model, T, B, dtype and commit in one line; where results differ, each value of them."""
    configs = [result["config"] for result in results]
    environments = [result["environment"] for result in results]
    parts = [
        _distinct(_device(result) for result in results),
        f"torch {_distinct((e.get('versions') or {}).get('torch') for e in environments) or 'unknown'}",
        _distinct(map(_model, configs)) or "unknown model",
    ]
    counts = _distinct(result["parameters"] and f"{result['parameters']:,}" for result in results)
    parts += [f"{counts} parameters"] if counts else []
    for key, name in (("seq_len", "T="), ("batch_size", "B="), ("dtype", "")):
        value = _distinct(config.get(key) for config in configs)
        parts += [f"{name}{value}"] if value else []
    kinds = _distinct(
        "checkpointed" if c.get("gradient_checkpointing") or c.get("long_context") else "not checkpointed"
        for c in configs
    )
    parts += [kinds] if kinds != "not checkpointed" else []
    parts += ["long context"] if any(c.get("long_context") for c in configs) else []
    for key, usual in (("strategy", "auto"), ("loss_chunk", "auto"), ("engine", "single")):
        value = _distinct(str(config.get(key, usual)) for config in configs)
        parts += [f"{key.replace('_', ' ')} {value}"] if value != usual else []
    limits = _distinct(f"{c['memory_limit'] / 2**30:g}" for c in configs if c.get("memory_limit"))
    parts += [f"at most {limits} GiB beyond the model"] if limits else []
    for key in ("lora", "world_size"):
        value = _distinct(config.get(key) for config in configs if config.get(key) not in (0, 1, None))
        parts += [f"{key.replace('_', ' ')} {value}"] if value else []
    parts.append(_distinct(map(_commit, environments)))
    return ", ".join(parts)
