"""Why a measurement failed: out of memory, or one line of the error."""

from __future__ import annotations

import torch


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: on a CPU torch says so in the text of a RuntimeError only."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def reason_of(error: BaseException) -> str:
    """One line: out of memory, or the error's class and first line."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
    return f"out of memory ({text})" if out_of_memory(error) else text
