"""Progress of what takes long before the training: bars of ``datasets``, and the time that something took."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from datasets import disable_progress_bars, enable_progress_bars

from accelerate import Accelerator


@contextmanager
def loading_bars(accelerator: Accelerator) -> Iterator[None]:
    """Within it ``datasets`` shows progress bars: on rank 0, on a terminal, after TQDM_DELAY (``environment.py``)."""
    if accelerator.is_main_process and sys.stderr.isatty():
        enable_progress_bars()
    try:
        yield
    finally:
        disable_progress_bars()


@contextmanager
def timed(accelerator: Accelerator, what: str) -> Iterator[None]:
    """Say what begins; and at its end how long it took, if that was a second or more. Nothing can be counted in it."""
    accelerator.print(f"{what} ...")
    began = time.perf_counter()
    yield
    seconds = time.perf_counter() - began
    if seconds >= 1:
        accelerator.print(f"{what}: {seconds:.0f} s")
