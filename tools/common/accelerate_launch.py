"""How two ranks are started under an engine: by `accelerate launch` with one of the recipes' ready configurations."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3", "zero2_offload")
RANKS = 2


def launch_command(engine: str, script: Path, *words: str, ranks: int = RANKS) -> list[str]:
    """The command line that runs ``script`` with ``words`` on ``ranks`` under an engine of :data:`ENGINES`."""
    return [
        *(str(Path(sys.executable).with_name("accelerate")), "launch", "--num_processes", str(ranks)),
        *("--config_file", str(ROOT / "recipes" / "accelerate" / f"{engine}.yaml"), "--main_process_port", "0"),
        *(str(script), *words),
    ]


def launch_environment(scratch: Path, cpu: bool) -> dict[str, str]:
    """The environment of a launch: no network, one thread a rank, and builds in ``scratch``."""
    own = {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        # A killed DeepSpeed leaves the lock of a build, at which every later run with the same folder waits.
        "TORCH_EXTENSIONS_DIR": str(scratch / "torch_extensions"),
    }
    on_cpu = {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"} if cpu else {}
    return {**os.environ, **own, **on_cpu}
