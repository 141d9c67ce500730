"""The recipe, as a launcher starts it, on the CPU.

    recipe_on_cpu.py [--recipe NAME] [--fault KIND:RANK:STEP] OPTIONS OF THE RECIPE

A fault happens on one rank while it saves the checkpoint of a step: ``full`` makes every file of more than some bytes
fail to be written, as on a full disk; ``hang`` never comes back.
"""

from __future__ import annotations

import resource
import runpy
import signal
import sys
import time
from typing import Any

import accelerate
from tests.engines.launching import ROOT
from tests.engines.on_cpu import OnCPU, use_cpu

FAULT: list[str] = []


class Faulty(OnCPU):
    """With the fault that was asked for."""

    def save_state(self, output_dir: Any = None, *args: Any, **options: Any) -> Any:
        """As Accelerate's, or the fault."""
        if FAULT[1:] == [str(self.process_index), str(output_dir).rpartition("_")[2]]:
            if FAULT[0] == "full":
                # Python ignores SIGXFSZ, so that a write fails with an error, part way through a file
                resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
            else:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)  # or the launcher waits 30 s before it kills
                time.sleep(3600)
        return super().save_state(output_dir, *args, **options)


if __name__ == "__main__":
    use_cpu()
    setattr(accelerate, "Accelerator", Faulty)  # noqa: B010  # what the recipe imports; a class is no variable to mypy
    sys.path.insert(0, str(ROOT / "recipes"))
    name = "llama_dp"
    if sys.argv[1] == "--recipe":
        name = sys.argv[2]
        del sys.argv[1:3]
    if sys.argv[1] == "--fault":
        FAULT += sys.argv[2].split(":")
        del sys.argv[1:3]
    sys.argv[0] = str(ROOT / "recipes" / f"{name}.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
