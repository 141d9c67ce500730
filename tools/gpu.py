"""Everything that is to be measured on a GPU, in the order of what it is worth, within a budget of time.

    python tools/gpu.py                                   # or: make gpu
    python tools/gpu.py --list
    python tools/gpu.py --only kernels long --seconds 200
    python tools/gpu.py --skip --output docs/benchmarks/gpu/h100    # what has no result there yet
    python tools/gpu.py --rehearse                        # every stage on a CPU, with tiny shapes

Each stage has a process and a time limit of its own, and writes OUTPUT/NAME.json as it goes: a run that is cut off
keeps what it had. At the end: a table, and OUTPUT/summary.md. No accountant is needed: the noise multiplier is given.
A stage that needs a package that is not installed says so, and the others go on.

Exit status: 0; 1 where a stage found something wrong or failed; 2 for what cannot be done; 130 after Ctrl-C.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script finds `tools` from its root

from tools.gpu_stages.options import parse
from tools.gpu_stages.runner import execute


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and do what it says; returns the exit status."""
    return execute(parse(__doc__, arguments))


if __name__ == "__main__":
    sys.exit(main())
