"""Where every byte of a training step goes: plain, private, and what privacy adds, each in a process of its own.

    python tools/profile_memory.py run
    python tools/profile_memory.py run --experiments vanilla flash_clip opacus_ghost --gradient-checkpointing
    python tools/profile_memory.py run --simulate --model meta-llama/Llama-3.1-8B --dtype bf16 --seq-len 131072
    python tools/profile_memory.py single --experiment flash_clip --output flash_result.json --seq-len 16384
    python tools/profile_memory.py plot --input-dir memory_profiling_results/run_20260101_120000 --output-dir pictures
    python tools/profile_memory.py compare before/flash_clip.json after/flash_clip.json --threshold 5

Every storage is followed from its birth to its death and belongs to one component, which docs/memory.md explains. What
torch's allocator has counted beyond that is shown as unattributed. Times are of another process, without the tracker.
Sizes are MiB (2**20 bytes) in files, and what reads best in pictures.

Exit status: 0; 1 where `compare` finds a regression, or an experiment failed other than by running out of memory,
which is a result; 2 for what cannot be done as asked; 130 after Ctrl-C.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script finds `tools` from its root

from tools.memory.commands import execute
from tools.memory.options import parse


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and do what it says."""
    return execute(parse(__doc__, arguments))


if __name__ == "__main__":
    sys.exit(main())
