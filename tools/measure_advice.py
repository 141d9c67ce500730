"""Is the advice of `dpft.advise` any good? Private trainings on a grid of batch, steps, learning rate and clip norm.

    python tools/measure_advice.py --json docs/benchmarks/advice_cpu.json
    python tools/measure_advice.py --first 4
    python tools/measure_advice.py --curve --json docs/benchmarks/loss_over_epsilon_cpu.json

The recipe's small Llama is trained on the docstrings, cut at 64 tokens, at epsilon 8 and 3: 27 trainings of 30 to 60
seconds of one core each, two at a time. A file that has results is continued. The docstrings are public: to choose a
setting by such a grid on private records spends privacy that no epsilon of these runs accounts for.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script finds `tools` from its root

from tools.advice.command import main

if __name__ == "__main__":
    main(__doc__)
