"""Squared gradient norms of one linear layer: ours by each method, Opacus' function, a plain einsum; beside float64.

    python tools/benchmark_norms.py --preset cpu --json norms_cpu.json
    python tools/benchmark_norms.py --layers 1024x1024 2048x128256 --tokens 512 4096 --dtype bfloat16

x [B, T, p] and g [B, T, d] are normal draws of a fixed seed. Time is the median of rounds in which every method has
its turn; the ratio is Opacus' time to the method's, of the same round. Memory is bytes of live tensors (on a GPU: of
its allocator) above x and g. A method that is off by more than rounding is refused a time.

The last table is what the Opacus fork that this work starts from says of its own kernel, beside this machine's ratio.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script finds `tools` from its root

from tools.benchmarks.norm_options import parse
from tools.benchmarks.norms import execute


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and do what it says; returns the exit status."""
    return execute(parse(__doc__, arguments))


if __name__ == "__main__":
    sys.exit(main())
