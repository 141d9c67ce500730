"""Whole commands of the project on the device: the memory profile, and the recipe from the options to the card."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tools.gpu_stages.context import FAILED, Context

ROOT = Path(__file__).resolve().parents[2]
TAIL = 2000  # characters of a failed command's output


def _finished(context: Context, *words: str) -> str | None:
    """Run a script of the project; None where it succeeded, else the end of what it printed."""
    environment = {**os.environ, **({"ACCELERATE_USE_CPU": "true"} if context.rehearse else {})}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=max(5.0, context.left),
    )
    return None if done.returncode == 0 else f"status {done.returncode}: {done.stdout[-TAIL:]}"


def memory(context: Context) -> str | None:
    """tools/profile_memory.py run, with its defaults on a GPU."""
    parent = context.path.parent.resolve() / "memory"
    words = ["tools/profile_memory.py", "run", "--device", context.device, "--output-dir", str(parent)]
    if context.rehearse:
        words += ["--vocab-size", "128", "--hidden-dim", "32", "--num-layers", "1", "--num-heads", "2"]
        words += ["--seq-len", "32", "--num-iter", "1", "--warmup-iter", "1"]
    before = set(parent.glob("run_*"))
    if (reason := _finished(context, *words)) is not None:
        context.add(reason=reason)
        return FAILED
    (made,) = set(parent.glob("run_*")) - before
    for path in sorted(made.glob("*.json")):
        found = json.loads(path.read_text())
        if "peak_memory_mb" in found:
            fields = ("experiment", "status", "peak_memory_mb", "time_over_vanilla", "reason")
            context.add(**{field: found[field] for field in fields})
    return None


def recipe(context: Context) -> str | None:
    """recipes/llama_dp.py for three steps in bf16, with a given noise multiplier."""
    missing = context.missing("datasets", "dp_accounting")
    if missing:
        context.add(reason=f"the recipe needs {' and '.join(missing)}, which cannot be imported")
        return None
    output = context.path.parent.resolve() / "recipe"
    words = [
        "recipes/llama_dp.py",
        "--bf16",
        "--num-steps",
        "3",
        "--noise-multiplier",
        "1.0",
        "--output-dir",
        str(output),
    ]
    words += ["--overwrite-output-dir", "--max-eval-examples", "16", "--sample-tokens", "4"]
    if context.rehearse:
        words += ["--expected-batch-size", "8", "--seq-len", "32", "--dataset", "tickets"]
    if (reason := _finished(context, *words)) is not None:
        context.add(reason=reason)
        return FAILED
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    context.add(
        files=sorted(path.name for path in output.iterdir()),
        losses=[row["validation_loss"] for row in steps if "validation_loss" in row],
        card="## Privacy statement" in (output / "README.md").read_text(),
    )
    return None
