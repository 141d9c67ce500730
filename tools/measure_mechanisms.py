"""When does correlated noise beat DP-SGD, and does what is done after the release help? Private trainings.

    python tools/measure_mechanisms.py --json docs/benchmarks/mechanisms_cpu.json
    python tools/measure_mechanisms.py --json docs/benchmarks/mechanisms_cpu.json --exact   # no training
    python tools/measure_mechanisms.py --json docs/benchmarks/mechanisms_cpu.json --page    # docs/mechanisms.md

The recipe's small Llama on the docstrings: some twenty seconds of one core each, about 150 trainings. A file that has
results is continued. The docstrings are public: a choice by such losses on private records is not accounted for.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script finds `tools` from its root

from tools.mechanisms.command import main

if __name__ == "__main__":
    main(__doc__)
