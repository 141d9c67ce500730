"""Words and units of the memory profiler's tables and pictures, so that all of them say the same."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tools.memory.result import UNATTRIBUTED

# What a reader of the page is told; a storage belongs to the first of its holders in this order.
MEANINGS = {
    "model_parameters": "The model's weights, trained or frozen; one that is tied counts once.",
    "buffers": "Tensors of the model that are no parameters, such as the frequencies of rotary embeddings.",
    "gradients": "What a parameter's .grad holds, or will without a copy; for a private step also the clipped sum.",
    "optimizer_states": "What the optimiser keeps between steps: of Adam, two moments for every trained parameter.",
    "norm_samples": "Squared norms, one number per example and layer, and the clip factors made from them.",
    "activation_hooks": "What autograd saves in the forward pass for the backward pass (torch's saved tensors), "
    "and what a checkpoint computes again.",
    "checkpoint_inputs": "With gradient checkpointing: inputs of the checkpointed blocks, to recompute these from.",
    "book_keeping": "What only the private step keeps: layers' inputs and output gradients until the clip factors are "
    "known, per-example gradients, noise. What autograd saves anyway counts there, not here.",
    "temp_matrices": "Made inside the phase and held by nobody: intermediate results of single operations, "
    "such as the matrix of which a norm is computed.",
    "other": "The batch, and what outlives the phase that it was made in without any of the holders above.",
    "unattributed": "The measured total less all of the above: what the tracker did not see. A little below 0 where "
    "it sees a storage die a moment late.",
}
STATUS_WORDS = {"ok": "ok", "out_of_memory": "out of memory", "failed": "failed"}


@dataclass(frozen=True)
class Unit:
    """A unit of memory: its name, and how many MiB it is."""

    name: str
    mb: float

    def of(self, mb: float) -> float:
        """That many MiB in this unit."""
        return mb / self.mb

    def text(self, mb: float) -> str:
        """The number without the unit, to about three places."""
        value = self.of(mb)
        digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 9.95 else 2
        return f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0: no minus before a number that is shown as 0


def unit_for(amounts_mb: Iterable[float]) -> Unit:
    """The unit in which the largest of these amounts, in MiB, reads best: GiB, MiB or KiB."""
    most = max((abs(mb) for mb in amounts_mb), default=0.0)
    if most >= 1024:
        return Unit("GiB", 1024.0)
    return Unit("MiB", 1.0) if most >= 1 or most == 0 else Unit("KiB", 1 / 1024)


def spread_text(values: Mapping[str, Any] | None, digits: int = 1) -> str:
    """A median with its range, or a dash."""
    if values is None:
        return "-"
    text = f"{values['median']:.{digits}f}"
    least, most = (f"{values[key]:.{digits}f}" for key in ("min", "max"))
    return text if least == most else f"{text} ({least} to {most})"


def milliseconds(result: Mapping[str, Any]) -> float | None:
    """Median time of a step; None where there is none: simulated, or failed."""
    spread = result["time_ms"]
    time: float | None = spread["median"] if spread else result["avg_time_ms"]
    return time


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


def vanilla_of(results: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The vanilla experiment, if it is there and was measured."""
    return next((r for r in results if r["experiment"] == "vanilla" and r["breakdown"]), None)


def unattributed_percent(result: Mapping[str, Any]) -> float | None:
    """Share of the peak that belongs to no component."""
    breakdown = result["breakdown"]
    if not breakdown or not breakdown["total_allocated_mb"]:
        return None
    return 100.0 * float(breakdown[f"{UNATTRIBUTED}_mb"] / breakdown["total_allocated_mb"])


def grouped(reasons: Mapping[str, str]) -> str:
    """Names with the reason of each, those of the same reason together."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(those)} ({reason})" for reason, those in names.items())


def wrapped_name(name: str, width: int = 13) -> str:
    """A name in lines of at most ``width`` characters, cut after an underscore where there is one."""
    lines = textwrap.wrap(name.replace("_", "_ "), width + 1)
    return "\n".join(line.replace("_ ", "_") for line in lines)


def counted(number: int, word: str) -> str:
    """``1 thread``, ``2 threads``."""
    return f"{number} {word}{'s' * (number != 1)}"


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


def conditions(results: Sequence[Mapping[str, Any]]) -> str:
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
    kinds = _distinct("checkpointed" if c.get("gradient_checkpointing") else "not checkpointed" for c in configs)
    parts += [kinds] if kinds != "not checkpointed" else []
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
