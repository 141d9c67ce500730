"""Time, FLOPs and memory of one training step: plain, ours, Opacus, fastDP; each in a process of its own, in turns.

    python tools/benchmark_steps.py --preset cpu --json steps_cpu.json
    python tools/benchmark_steps.py --preset gpu --json steps_gpu.json
    python tools/benchmark_steps.py --architecture gpt2 --tokens 512 1024 --rows 1 4 --methods plain one_pass fastdp

Every method makes the same model from the same seed and takes the same batch, forward and backward, to the clipped
sum; noise and the optimiser are left out unless --update asks for them. Ratios of time are to the plain step of the
same round. A method whose clipped sum is not what float64 autograd gives one example at a time, at a small size, or
not that of our per-example strategy at the size that is timed, is refused a time. Memory is bytes of live tensors (on
a GPU: of its allocator) above parameters, buffers and batch, with empty .grad, in a step of its own. dpft's first
steps, and those with its isolation check, are not what a run of thousands consists of: tiny ones take their place.

With --json the results are written after every shape, and a plot beside them. "predicted" is what dpft.plan says.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script finds `tools` from its root

from tools.benchmarks.step_options import parse
from tools.benchmarks.steps import execute


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and do what it says; returns the exit status."""
    return execute(parse(__doc__, arguments))


if __name__ == "__main__":
    sys.exit(main())
