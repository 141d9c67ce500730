"""Three releases with a clip norm that adapts, on all examples; each rank writes what it ended with. Launched."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import dpft
from tests.engines.matrix_worker import Bench, Examples, plain_llama

NUMBER, STEPS = 7, 3
SETTINGS = {
    "adaptive_clip": dpft.AdaptiveClip(count_noise=1e-9, learning_rate=1.0, quantile=0.6),
    "num_steps": STEPS,
    "max_grad_norm": 0.2,
}


def main(output: Path) -> None:
    bench = Bench(output)
    model = plain_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    made = bench.private(model, optimizer, Examples(NUMBER), privacy=SETTINGS, max_physical_batch_size=2)
    physical = bench.train(*made)
    accelerator, _, _, loader = made
    end = {"clip_norm": loader.privacy.clip_norm, "physical": physical}
    (output / f"rank_{accelerator.process_index}.json").write_text(json.dumps(end))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
