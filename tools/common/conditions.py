"""The conditions of a measurement: machine, device, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ("torch", "transformers", "accelerate", "deepspeed", "opacus", "numpy", "triton", "fastDP")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
    return done.stdout.strip()


def cpu_name() -> str:
    """The processor as the operating system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def versions(libraries: Sequence[str] = LIBRARIES) -> dict[str, str | None]:
    """Of libraries; None where one is not installed, "unknown" for a bare folder."""
    found: dict[str, str | None] = {}
    for name in libraries:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def conditions(threads: int) -> dict[str, Any]:
    """Machine, versions and commit; ``dirty`` where files that are tracked differ from it."""
    return {
        "cpu": cpu_name(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": versions(),
        "commit": _git("rev-parse", "HEAD") or None,
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def describe_device(device: str) -> dict[str, Any]:
    """The name and memory of the GPU."""
    if device != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(0)
    return {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
