"""Broken mechanisms: each is a defect that private training has really had, put into dpft for the time of one audit.

A plant patches one function of dpft while it is entered, and nothing else. An audit that does not notice it is worth
nothing; ``tools/audit.py --plant all`` runs them all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import dpft.loader
import dpft.run
from dpft.clipping import factors, passes
from dpft.noise import GaussianNoise
from dpft.optimizer import DPOptimizer
from dpft.privacy.samplers.sampler import ShuffleSampler

UNCLIPPED = "transformer.h.0.mlp.c_proj.weight"  # of the subject, a layer whose gradients are not small


@contextmanager
def noise_times(factor: float) -> Iterator[None]:
    add = GaussianNoise.add_
    with mock.patch.object(
        GaussianNoise, "add_", lambda self, tensor, std, place=None: add(self, tensor, std * factor, place)
    ):
        yield


@contextmanager
def _noise_per_physical_batch() -> Iterator[None]:
    next_batch, release = dpft.run.LoopGuard.next_batch, DPOptimizer._release
    physical: Counter[int] = Counter()

    def counting(self: Any, number: int, *batch: Any) -> None:
        physical[number] += 1
        next_batch(self, number, *batch)

    def noisy(self: DPOptimizer, p: nn.Parameter, std: float) -> None:
        for _ in range(physical[max(physical)] - 1):
            if p.grad is not None:
                self.noise.add_(p.grad, std)
        release(self, p, std)

    with (
        mock.patch.object(dpft.run.LoopGuard, "next_batch", counting),
        mock.patch.object(DPOptimizer, "_release", noisy),
    ):
        yield


@contextmanager
def _mean_after_clipping() -> Iterator[None]:
    rule = factors.ClipRule.factors

    def averaged(self: factors.ClipRule, sq_norms: Tensor, weights: Tensor | None = None) -> Tensor:
        return rule(self, sq_norms, weights) / len(sq_norms)

    with mock.patch.object(factors.ClipRule, "factors", averaged):
        yield


@contextmanager
def _layer_unclipped() -> Iterator[None]:
    release = passes.KeepPass.release

    def partly(self: Any, key: str, weight: Tensor, dtype: torch.dtype) -> Tensor | None:
        clipped = self._weights
        if key == UNCLIPPED:
            self._weights = replace(clipped, factors=(clipped.factors > 0).double())
            self._inputs.clear()
        released = release(self, key, weight, dtype)
        self._weights = clipped
        return released

    with mock.patch.object(passes.KeepPass, "release", partly):
        yield


@contextmanager
def _tied_cross_term_forgotten() -> Iterator[None]:
    cross = passes._tied_cross

    def nothing(*arguments: Any) -> Tensor | None:
        found = cross(*arguments)
        return None if found is None else torch.zeros_like(found)

    with mock.patch.object(passes, "_tied_cross", nothing):
        yield


@contextmanager
def _shuffled_as_poisson() -> Iterator[None]:
    def shuffle(schedule: Any, dataset_size: int, **ranks: Any) -> ShuffleSampler:
        return ShuffleSampler(dataset_size, int(schedule.expected_batch_size), **ranks)

    with mock.patch("dpft.prepare.make_sampler", shuffle):
        yield


@contextmanager
def _divisor_of_the_drawn() -> Iterator[None]:
    next_batch, step = dpft.run.LoopGuard.next_batch, DPOptimizer.step
    drawn: Counter[int] = Counter()

    def counting(self: Any, number: int, is_last: bool, rows: int, padding: int) -> None:
        drawn[number] += rows - padding
        next_batch(self, number, is_last, rows, padding)

    def dividing(self: DPOptimizer, closure: Any = None) -> None:
        before, self.expected_batch_size = self.expected_batch_size, float(max(1, drawn[max(drawn)]))
        try:
            step(self, closure)
        finally:
            self.expected_batch_size = before

    with (
        mock.patch.object(dpft.run.LoopGuard, "next_batch", counting),
        mock.patch.object(DPOptimizer, "step", dividing),
    ):
        yield


@contextmanager
def _noise_repeated_at_resume() -> Iterator[None]:
    with mock.patch("dpft.prepare.GaussianNoise", lambda **options: GaussianNoise(b"the same at every start")):
        yield


@contextmanager
def _padding_counted() -> Iterator[None]:
    fetch = dpft.loader._Fetch.__getitem__

    def counted(self: Any, physical: Any) -> tuple[dict[str, Any], bool, int]:
        batch, is_last, step = fetch(self, physical)
        padding = batch["example_weight"] == 0
        if not padding.all():
            batch["example_weight"] = torch.ones_like(batch["example_weight"])
            batch["labels"][padding] = batch["labels"][0].clone()
        return batch, is_last, step

    with mock.patch.object(dpft.loader._Fetch, "__getitem__", counted):
        yield


@dataclass(frozen=True)
class Plant:
    """One defect.

    Attributes:
        name: on the command line.
        what: it does, in one line.
        entered: a context in which dpft has it.
        subject: name of what is audited with it, in :mod:`tools.auditing.catalogue`.
    """

    name: str
    what: str
    entered: Callable[[], AbstractContextManager[None]]
    subject: str = "white_box"


PLANTS = (
    Plant("no_noise", "no noise is added", lambda: noise_times(0.0)),
    Plant("half_noise", "the noise has half the claimed standard deviation", lambda: noise_times(0.5)),
    Plant(
        "noise_per_physical_batch",
        "noise is added once per physical batch, not per release",
        _noise_per_physical_batch,
    ),
    Plant("mean_after_clipping", "clipped gradients are averaged over the physical batch", _mean_after_clipping),
    Plant("layer_unclipped", "one layer's gradient is not scaled by the clip factor", _layer_unclipped),
    Plant(
        "tied_cross_term",
        "the norm of a tied embedding and head lacks their cross term",
        _tied_cross_term_forgotten,
    ),
    Plant("shuffled_as_poisson", "batches of a shuffled epoch are accounted as Poisson samples", _shuffled_as_poisson),
    Plant("divisor_of_the_drawn", "the sum is divided by the number of drawn examples", _divisor_of_the_drawn),
    Plant(
        "noise_repeated_at_resume", "after a resume the noise of the start is drawn again", _noise_repeated_at_resume
    ),
    Plant("padding_counted", "padding rows contribute like examples", _padding_counted),
)
