"""Starts worker scripts as users do: ``accelerate launch --config_file recipes/accelerate/...``, on the CPU."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

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
        "PYTHONFAULTHANDLER": "1",
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
    timeout: float = 240,
) -> subprocess.CompletedProcess[str]:
    """Run a worker to its end; its output is in ``stdout``, both streams together.

    One that does not end in ``timeout`` seconds, which are fewer than pytest leaves to a test, is ended with all its
    children, and the test fails with where each of their threads stood.
    """
    words = command(engine, script, *args, processes=processes, options=options)
    log = scratch / f"launch_{time.monotonic_ns()}.log"
    with open(log, "w") as stream:
        launcher = subprocess.Popen(
            words, cwd=scratch, env=environment(scratch), stdout=stream, stderr=subprocess.STDOUT
        )
        try:
            returncode = launcher.wait(timeout)
        except BaseException as error:  # also pytest's own time limit, and Ctrl-C
            end_with_stacks(launcher)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            pytest.fail(f"{engine} did not end in {timeout:g} s:\n{log.read_text()[-20000:]}", pytrace=False)
    return subprocess.CompletedProcess(words, returncode, log.read_text())


def end_with_stacks(launcher: subprocess.Popen[bytes]) -> None:
    """End a launcher and its children; each of them first prints the stacks of its threads, as faulthandler does."""
    children: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(launcher.pid).children(recursive=True)
    launcher.kill()  # first, or it would end the others
    launcher.wait()
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.send_signal(signal.SIGABRT)
    for child in psutil.wait_procs(children, timeout=10)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def succeed(done: subprocess.CompletedProcess[str]) -> str:
    """The output of a launch that must have succeeded."""
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout
