"""Starts worker scripts as users do: ``accelerate launch --config_file recipes/accelerate/...``, on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "recipes" / "accelerate"
ENGINES = ("single", "ddp", "fsdp2", "zero1", "zero2", "zero3", "zero2_offload")
SHARDED = ("fsdp2", "zero3")


def command(
    engine: str, script: Path | str, *args: str, processes: int = 2, options: tuple[str, ...] = ()
) -> list[str]:
    """The command line of a launch; ``options`` are the launcher's."""
    config = ROOT / "accelerate_config.yaml" if engine == "single" else CONFIGS / f"{engine}.yaml"
    launcher = [str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file", str(config)]
    if engine != "single":
        launcher += ["--num_processes", str(processes), "--main_process_port", "0"]
    return [*launcher, *options, str(script), *args]


def environment(scratch: Path) -> dict[str, str]:
    """What a worker on the CPU needs; ``scratch`` keeps a killed DeepSpeed's locks away from other runs."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "ACCELERATE_TORCH_DEVICE": "cpu",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONWARNINGS": "ignore",
        "TORCH_EXTENSIONS_DIR": str(scratch / "torch_extensions"),
    }


def launch(
    engine: str,
    script: Path | str,
    *args: str,
    scratch: Path,
    processes: int = 2,
    options: tuple[str, ...] = (),
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Run a worker to its end; its output is in ``stdout``, both streams together."""
    return subprocess.run(
        command(engine, script, *args, processes=processes, options=options),
        cwd=scratch,
        env=environment(scratch),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )


def succeed(done: subprocess.CompletedProcess[str]) -> str:
    """The output of a launch that must have succeeded."""
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout
