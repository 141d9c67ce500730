"""What the tools do with processes of their own: end them, and limit what one may allocate."""

from __future__ import annotations

import resource
from multiprocessing.process import BaseProcess

import psutil
import torch


def end_process(process: BaseProcess) -> None:
    """End a process, whatever it is doing."""
    process.terminate()
    process.join(5)
    if process.is_alive():
        process.kill()
        process.join()


def limit_memory(device: str, free: int) -> None:
    """Let this process allocate at most so many bytes more than it has now."""
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_allocated() + free) / total))
    else:
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (psutil.Process().memory_info().data + free, hard))


def lift_limit(device: str) -> None:
    """Let this process allocate what the machine has."""
    if device == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0)
    else:
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
