"""Five trainers side by side: plain, three of Opacus, and dpft's; where their time goes and which bytes they move.

    python tools/profile_trainers.py --mode test
    python tools/profile_trainers.py --mode single --trainer DPGhostClippingTrainer --batch-size 4 --seq-len 512 \\
        --model-size medium
    python tools/profile_trainers.py --mode profile

"test" takes a small Llama on a CPU, "profile" one of about a billion parameters on a GPU, at batches of 4 and 8 rows
of 512 and 1,024 tokens. "single" takes one shape; StandardTrainer is measured with it, to compare with. Each trainer
at each shape has a process of its own. One that fails or runs out of memory is a result, and the others go on.

Trainers are timed together, one step of each in turn; "x plain" is the median over such rounds. Where their processes
do not fit into memory at once, one is timed after the other, and its row says so.

Measured: time without a profiler; the peak of a step, all bytes counted; what a step retains, that is what is alive
after zero_grad() besides parameters, buffers, the batch and the optimiser's state; operators by class (see
trainers/operators.py); and steps under torch.profiler. Everything is in runs/<date-time>/results.json and
summary.txt. Each trainer's trace, runs/<date-time>/<trainer>_<shape>/*.pt.trace.json, opens in chrome://tracing, in
Perfetto and in TensorBoard's profiler plugin, which torch 2.13 calls deprecated.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script finds `tools` from its root

from tools.trainers.options import parse
from tools.trainers.profiles import execute


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and do what it says; returns the exit status."""
    return execute(parse(__doc__, arguments))


if __name__ == "__main__":
    sys.exit(main())
