"""What one engine does with balls-and-bins sampling and with ``secure_rng``. ``engine_worker.py`` runs it."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from torch import Tensor

from dpft.noise import GaussianNoise
from tests.engines.matrix_worker import ADAM, Bench, Examples, full_parameters
from tests.engines.models import plain_llama

# Five steps are of two epochs; 11 examples are in three bins of about 4.
BINS: dict[str, Any] = {"sampler": "balls_and_bins", "sample_rate": None, "expected_batch_size": 4, "num_steps": 5}
NUMBER, SEED = 11, 5


def run(bench: Bench) -> None:
    """Each rank writes its parameters, and how many values its secure noise was added to, of which deviation."""
    rank = os.environ.get("RANK", "0")
    model = plain_llama()
    made = bench.private(
        model,
        torch.optim.Adam(model.parameters(), **ADAM),
        Examples(NUMBER),
        privacy=BINS,
        test_seed=SEED,
        max_physical_batch_size=2,
    )
    bench.train(*made)
    torch.save(full_parameters(made[0], made[1]), bench.output / f"bins_{rank}.pt")
    added: list[tuple[float, int]] = []
    add = GaussianNoise.add_

    def noted(self: GaussianNoise, tensor: Tensor, std: float, *place: Any) -> Tensor:
        assert self.secure
        added.append((std, tensor.numel()))
        return add(self, tensor, std, *place)

    GaussianNoise.add_ = noted  # type: ignore[method-assign]  # a spy takes its place
    bench.noise("noise, secure", "float32", secure_rng=True)
    GaussianNoise.add_ = add  # type: ignore[method-assign]  # as it was before
    (bench.output / f"secure_{rank}.json").write_text(json.dumps(added))
    bench.write(int(rank))
