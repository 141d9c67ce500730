"""``dpft env``: versions, device, and what each extra would bring."""

from __future__ import annotations

import argparse
import platform
import re
from importlib import metadata
from typing import Any

EXTRAS = {
    "deepspeed": "ZeRO-1, ZeRO-2, ZeRO-3, Ulysses",
    "peft": "LoRA and the other adapters",
    "trl": "private SFTTrainer, DPOTrainer, RewardTrainer",
    "triton": "the fused kernels on a GPU",
}


def add_to(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser("env", help="versions, device, and what each extra would bring")
    command.set_defaults(run=report)


def version(name: str) -> str | None:
    """Of an installed distribution."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def requirements() -> list[str]:
    """The distributions that dpft needs, without extras."""
    found = [line for line in metadata.requires("dpft") or [] if "extra ==" not in line]
    return sorted(re.split(r"[^A-Za-z0-9._-]", line)[0] for line in found)


def report(args: argparse.Namespace) -> str:
    """One line for each fact."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    lines = [("dpft", version("dpft") or "not installed"), ("Python", platform.python_version())]
    lines += [("machine", f"{platform.system()} {platform.machine()}"), ("device", device)]
    lines += [(name, version(name) or "MISSING: pip install dpft") for name in requirements()]
    for name, brings in EXTRAS.items():
        lines.append((name, version(name) or f"not installed; pip install 'dpft[{name}]' brings {brings}"))
    return "\n".join(f"{name:<18} {value}" for name, value in lines)
