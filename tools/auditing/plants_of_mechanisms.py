"""Broken mechanisms beyond the plain one: correlated noise, samplers, clip groups, users, accounts, queries, searches.

As in :mod:`tools.auditing.plants`: each patches one thing while it is entered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch

import dpft.evaluation
from dpft.clipping import clip_groups
from dpft.correlated_noise import CorrelatedNoise, _Draws, _TensorNoise
from dpft.noise import GaussianNoise
from dpft.privacy import Account, BallsAndBinsSampler, CyclicPoissonSampler, PoissonSampler
from dpft.privacy.account.events import Selection
from dpft.run import LoopGuard
from tools.auditing import whole_runs
from tools.auditing.plants import Plant, noise_times


# ---------------------------------------------------------------------------------------------- correlated noise
def _repeated() -> AbstractContextManager[Any]:
    fill = _Draws.fill
    return mock.patch.object(_Draws, "fill", lambda self, out, step: fill(self, out, 0))


def _taken_back_twice() -> AbstractContextManager[Any]:
    def step(self: Any, number: int) -> torch.Tensor:
        noise = self.draws.fill(self._zeros(), number)
        if self.strategy.kind == "bandmf":
            for weight, before in zip(self.strategy.weights[1:], self._kept, strict=False):
                noise.sub_(before, alpha=2 * weight)
            self._kept.appendleft(noise)
            return noise
        for weight, buffer in zip(self.strategy.weights, self._kept, strict=True):
            noise.sub_(buffer, alpha=2 * weight)
        for decay, buffer in zip(self.strategy.decays, self._kept, strict=True):
            buffer.mul_(decay).add_(noise)
        return noise

    return mock.patch.object(_TensorNoise, "step", step)


@contextmanager
def _scale_forgotten() -> Iterator[None]:
    add = CorrelatedNoise.add_

    def smaller(self: Any, tensor: torch.Tensor, std: float, place: Any = None) -> torch.Tensor:
        return add(self, tensor, std / self.strategy.scale, place)

    with mock.patch.object(CorrelatedNoise, "add_", smaller):
        yield


# ---------------------------------------------------------------------------------------------- samplers
@contextmanager
def _two_groups() -> Iterator[None]:
    draw = CyclicPoissonSampler.draw

    def both(self: Any, step: int) -> Any:
        return np.union1d(draw(self, step), draw(self, step + 1))

    with mock.patch.object(CyclicPoissonSampler, "draw", both):
        yield


@contextmanager
def _twice_the_rate() -> Iterator[None]:
    draw = PoissonSampler.draw

    with mock.patch.object(PoissonSampler, "draw", lambda self, step: np.union1d(draw(self, step), draw(self, step))):
        yield


@contextmanager
def _two_bins() -> Iterator[None]:
    def lay(self: Any, rng: np.random.Generator) -> Any:
        return rng.integers(self.steps_per_epoch, size=(2, self.dataset_size))

    def batch(self: Any, laid: Any, position: int) -> Any:
        return np.flatnonzero((laid == position).any(axis=0))

    with mock.patch.multiple(BallsAndBinsSampler, _lay=lay, _batch=batch):
        yield


# ---------------------------------------------------------------------------------------------- clipping, users
@contextmanager
def _groups_at_whole_norm() -> Iterator[None]:
    shares = clip_groups.ClipGroups.__init__

    def whole(self: Any, names: Any, given: Any, of: Any) -> None:
        shares(self, names, tuple(1.0 for _ in given), of)

    with mock.patch.object(clip_groups.ClipGroups, "__init__", whole):
        yield


@contextmanager
def _vote_without_noise() -> Iterator[None]:
    count = LoopGuard._next_clip_norm

    def exact(self: Any) -> float | None:
        with mock.patch.object(GaussianNoise, "add_", lambda noise, tensor, std: tensor):
            return count(self)

    with mock.patch.object(LoopGuard, "_next_clip_norm", exact):
        yield


def _user_with_twice_the_rows() -> AbstractContextManager[Any]:
    return mock.patch.object(whole_runs, "ROWS_THERE", 2 * whole_runs.USER_ROWS)


def _user_under_two_names() -> AbstractContextManager[Any]:
    return mock.patch.object(whole_runs, "NAMES", 2)


# ---------------------------------------------------------------------------------------------- accounts, queries
@contextmanager
def _use_forgotten() -> Iterator[None]:
    uses = Account.uses
    with mock.patch.object(Account, "uses", lambda self: uses(self)[1:]):
        yield


@contextmanager
def _answers_after_the_stop() -> Iterator[None]:
    ask = dpft.evaluation.EarlyStop.__call__

    def again(self: Any, values: Any) -> bool:
        self.stopped = False
        return ask(self, values)

    with mock.patch.object(dpft.evaluation.EarlyStop, "__call__", again):
        yield


@contextmanager
def _selection_not_paid() -> Iterator[None]:
    """The account pays for one trial, whatever the number of them."""
    spend = Account.spend

    def cheap(self: Account, uses: Any, what: str) -> str:
        return spend(self, [use for r, _ in uses for use in (r.trial if isinstance(r, Selection) else ())], what)

    with mock.patch.object(Account, "spend", cheap):
        yield


def _plant(subject: str) -> Callable[..., Plant]:
    return lambda name, what, entered: Plant(f"{subject}_{name}", what, entered, subject)


MECHANISM_PLANTS = (
    _plant("poisson")("twice_the_rate", "each batch is the union of two draws", _twice_the_rate),
    _plant("adaptive_clip")("vote_without_noise", "the count of clipped examples gets no noise", _vote_without_noise),
    _plant("layer_groups")("at_whole_norm", "each group is clipped at the whole clip norm", _groups_at_whole_norm),
    _plant("bandmf_steps")("taken_back_twice", "earlier noise is taken back twice", _taken_back_twice),
    _plant("blt_steps")("scale_forgotten", "the noise lacks the sensitivity of the strategy", _scale_forgotten),
    _plant("bandmf")("noise_repeated", "every step draws the same values", _repeated),
    _plant("bandmf")("taken_back_twice", "earlier noise is taken back twice", _taken_back_twice),
    _plant("bandmf")("scale_forgotten", "the noise lacks the sensitivity of the strategy", _scale_forgotten),
    _plant("bandmf")(
        "two_groups", "an example is drawn in two groups, so in steps that follow each other", _two_groups
    ),
    _plant("blt")("noise_repeated", "every step draws the same values", _repeated),
    _plant("blt")("taken_back_twice", "earlier noise is taken back twice", _taken_back_twice),
    _plant("blt")("scale_forgotten", "the noise lacks the sensitivity of the strategy", _scale_forgotten),
    _plant("balls_and_bins")("two_bins", "an example is in two batches of an epoch", _two_bins),
    _plant("groups")("at_whole_norm", "each group is clipped at the whole clip norm", _groups_at_whole_norm),
    _plant("secure")("half_noise", "the noise on the grid has half its standard deviation", lambda: noise_times(0.5)),
    _plant("user_rows")("twice_the_rows", "users have twice as many rows as is claimed", _user_with_twice_the_rows),
    _plant("by_user")("two_names", "each user is in the data under two names", _user_under_two_names),
    _plant("private_mean")("half_noise", "the noise has half its standard deviation", lambda: noise_times(0.5)),
    _plant("early_stop")("goes_on", "questions are answered after it has said stop", _answers_after_the_stop),
    _plant("tune")("one_trial_paid", "the search pays for one trial, and not for the choice", _selection_not_paid),
    _plant("account")("use_forgotten", "the account counts the last of two trainings only", _use_forgotten),
)
