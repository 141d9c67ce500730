"""Environment variables that torch and tqdm read on import (so import this first), and torch's threads on a CPU.

OpenMP's threads wait for each other by spinning, unless told otherwise. On a machine where another process wants a
core too, a thread that spins keeps the one that it waits for from running. *Measured*, a physical batch of 32 x 128
tokens of the small Llama, two threads on two cores that two to three other processes shared, two rounds: 720 and 5,814
tokens a second spinning, 9,482 and 6,482 sleeping; one thread, 4,992 and 5,518.
"""

from __future__ import annotations

import os

# Never overrides what the user set.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TQDM_DELAY", "2")  # seconds before a progress bar is shown; tqdm reads it when imported


def set_threads(wanted: int | None, processes: int) -> None:
    """Give torch the cores that this process may use. For a process that computes on a CPU.

    ``accelerate launch`` sets OMP_NUM_THREADS=1 unless the environment has a number already.

    Args:
        wanted: threads; None for this process's share of the cores.
        processes: of the run, for where the launcher does not say how many share this machine.
    """
    import torch  # here, because it is the import that reads the environment

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    torch.set_num_threads(wanted or max(1, cores // here))
