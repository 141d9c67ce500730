"""Parameters of fewer elements than there are ranks, or of a number that the ranks do not divide.

    accelerate launch --num_processes 3 --config_file ... few_elements_worker.py OUTPUT_FOLDER

One of them is alone in its group of the optimiser, and so in its partition under ZeRO. ``test_few_elements.py`` judges
what is written.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dpft.noise import GaussianNoise
from tests.engines import correlated_worker
from tests.engines.matrix_worker import CLIP, RATE, Bench, Examples, full_parameters
from tests.engines.models import plain_llama
from tests.oracle import trainable

NUMBER, STEPS, SIGMA = 5, 3, 3.0
MECHANISM = "bandmf"


class Scaled(nn.Module):
    """A module whose output's last dimension is divided into ``parts``, each with a factor of its own."""

    def __init__(self, inner: nn.Module, parts: int) -> None:
        super().__init__()
        self.inner = inner
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, parts)[:, None])

    def forward(self, *args: Any) -> Tensor:
        out: Tensor = self.inner(*args)
        return (out.unflatten(-1, (len(self.weight), -1)) * self.weight).flatten(-2)


def few_elements() -> nn.Module:
    """Of 1, 2 and 4 elements: FSDP2 gives three ranks 2, 2 and 0 of four."""
    model: Any = plain_llama()
    model.model.norm = Scaled(model.model.norm, 1)
    model.model.layers[0].mlp = Scaled(model.model.layers[0].mlp, 2)
    model.model.layers[0].input_layernorm = Scaled(model.model.layers[0].input_layernorm, 4)
    return model


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    alone = model.get_parameter("model.norm.weight")
    return [{"params": [alone]}, {"params": [p for p in model.parameters() if p is not alone]}]


def changes(bench: Bench, **options: Any) -> list[dict[str, Tensor]]:
    """What each step takes off the parameters, divided by the learning rate."""
    model = few_elements()
    before = {n: p.detach().clone().float() for n, p in trainable(model).items()}
    optimizer = torch.optim.SGD(groups_of(model), lr=RATE)
    accelerator, prepared, stepped, loader = bench.private(
        model, optimizer, Examples(NUMBER), max_physical_batch_size=2, **options
    )
    found = []
    for batch in loader:
        accelerator.backward(prepared(**batch).loss)
        stepped.step()
        last = loader.is_last
        stepped.zero_grad()
        if last:
            after = full_parameters(accelerator, prepared)
            found.append({n: (before[n] - after[n]) / RATE for n in before})
            before = after
    loader.privacy.close()
    return found


def constant(self: GaussianNoise, tensor: Tensor, std: float, place: Any = None) -> Tensor:
    """In place of noise."""
    return tensor.add_(std)


def run(bench: Bench) -> None:
    """The sum of one batch; noise that is a constant, of batches without an example; correlated noise."""
    rank = os.environ["RANK"]
    (release,) = changes(bench)
    torch.save({n: r * NUMBER for n, r in release.items()}, bench.output / f"sum_{rank}.pt")
    draw = GaussianNoise.add_
    GaussianNoise.add_ = constant  # type: ignore[method-assign]  # for this test
    plan = {"noise_multiplier": SIGMA, "sample_rate": 1e-9, "expected_batch_size": 4, "num_steps": STEPS}
    noises = [{n: r * 4 / (SIGMA * CLIP) for n, r in step.items()} for step in changes(bench, privacy=plan)]
    GaussianNoise.add_ = draw  # type: ignore[method-assign]  # as it was before
    torch.save(noises, bench.output / f"noise_{rank}.pt")
    correlated_worker.start(bench, MECHANISM, 0, "few", few_elements)


if __name__ == "__main__":
    run(Bench(Path(sys.argv[1])))
    dist.barrier()
    dist.destroy_process_group()
