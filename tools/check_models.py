"""Which models dpft trains exactly: every family of transformers and adapter of PEFT, built small.

    python tools/check_models.py --list all --json docs/models.json --markdown docs/models.md
    python tools/check_models.py --list adapters --only DoRA "LoRA on nf4"
    python tools/check_models.py --only llama mixtral gpt_oss

No network, no weights: a family's configuration class, made small. Each strategy (one_pass, two_pass, per_example,
auto) is EXACT (norms and the clipped sum of every parameter within 1e-6 of plain autograd in float64, one example at a
time and without padding), REFUSED by dpft, WRONG, or a CRASH. Each runs in a process of its own with a time limit.
Quantised bases are compared in float32, within 1e-5; bitsandbytes and torchao are optional.

Exit status: 0, or 1 where something is WRONG or a CRASH, 2 for a mistake on the command line.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script finds `tools` from its root

from tools.models.command import main

if __name__ == "__main__":
    sys.exit(main(__doc__))
