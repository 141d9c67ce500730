"""What is known of devices by their names (devices.json): what a float64 product costs, and which kernels are fastest.

The table is data: a measurement changes it, and no code.
"""

from __future__ import annotations

import functools
import json
import time
from pathlib import Path
from typing import Any

import torch

_EDGE = 1024


def double_cost(device: torch.device) -> float:
    """Time of a float64 product over that of a float32 product; 1 for a device that is only simulated."""
    if device.type != "cuda":
        return 2.0 if device.type == "cpu" else 1.0
    return _of(torch.cuda.get_device_name(device), device)


@functools.cache
def _of(name: str, device: torch.device) -> float:
    listed = from_table("float32_over_float64", name)
    return _measured(device) if listed is None else float(listed)


def fastest_impl(device: torch.device) -> str | None:
    """The kernels that were found exact and fastest on such a device; None if none were measured there."""
    return from_table("fastest_verified", torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def from_table(table: str, name: str) -> Any:
    """A table's entry for a device of that name: the longest key that is a part of it; None if none is."""
    entries = _tables()[table]
    matches = [key for key in entries if key in name]
    return entries[max(matches, key=len)] if matches else None


@functools.cache
def _tables() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("devices.json").read_text())
    return found


def _measured(device: torch.device) -> float:
    """Waits for the device, for some milliseconds."""
    seconds = []
    for dtype in (torch.float32, torch.float64):
        a = torch.ones(_EDGE, _EDGE, dtype=dtype, device=device)
        best = float("inf")
        for _ in range(4):
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            a @ a
            torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - start)
        seconds.append(best)
    return seconds[1] / seconds[0]
