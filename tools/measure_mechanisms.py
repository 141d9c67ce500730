"""When does correlated noise beat DP-SGD, and does what is done after the release help? Private trainings.

    python tools/measure_mechanisms.py            # docs/benchmarks/mechanisms_cpu.json
    python tools/measure_mechanisms.py --exact    # docs/benchmarks/mechanisms_exact.json; no training
    python tools/measure_mechanisms.py --page     # the tables of docs/mechanisms.md

The last block of the recipe's small Llama on the docstrings: some 530 trainings, three seconds of one core each. A
file that has results is continued. The docstrings are public: on private records a choice by such losses is not
accounted for.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script finds `tools` from its root

from tools.mechanisms.command import main

if __name__ == "__main__":
    main(__doc__)
