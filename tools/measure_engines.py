"""What a step costs under each engine, plain and private: bytes sent, traversals, FLOPs, memory. On the CPU, counted.

    python tools/measure_engines.py --json docs/benchmarks/engines_cpu.json
    python tools/measure_engines.py --engines fsdp2 zero3 --width 128 --tokens 64

Two processes, by `accelerate launch` with the ready configurations, a small Llama, float32, AdamW. Plain training is
Accelerate's own: prepare(model, optimizer), accelerator.accumulate. Nothing is timed, so a busy machine does no harm.

Bytes are payload: of an all-gather and a reduce-scatter the whole, of the others the tensor. A ring of W ranks sends
2 (W-1)/W of an all-reduce's payload from each rank, and (W-1)/W of the others'. Memory is bytes of live tensors on
rank 0, parameters and optimiser states included: at rest (between steps), at the peak of a step, and added between two
physical batches of one logical batch. All in units of the float32 bytes of all parameters.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script finds `tools` from its root

from tools.engines.command import main

if __name__ == "__main__":
    main(__doc__)
