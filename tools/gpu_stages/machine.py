"""What is there: card, driver, versions, and the packages that are missing."""

from __future__ import annotations

import shutil
import subprocess

import torch

from tools.common.conditions import describe_device, versions
from tools.gpu_stages.context import Context

PACKAGES = ("transformers", "accelerate", "triton", "peft", "opacus", "datasets", "dp_accounting", "deepspeed")


def run(context: Context) -> None:
    """One row for each question."""
    context.add(what="device", **describe_device(context.device))
    if context.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        context.add(
            what="card",
            capability=f"{properties.major}.{properties.minor}",
            multiprocessors=properties.multi_processor_count,
            bf16=torch.cuda.is_bf16_supported(),
            driver=_driver(),
        )
    context.add(what="versions", **versions())
    context.add(what="missing", packages=context.missing(*PACKAGES))


def _driver() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=8)
    return done.stdout.strip() or None
