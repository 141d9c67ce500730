"""The training steps of one experiment: under the tracker in one process, and timed without it in another."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch

from tools.common.processes import limit_memory
from tools.common.worker import report
from tools.memory.setup import EXPERIMENTS, Experiment, Setup, make_batch, make_model
from tools.memory.simulate import turn_long_context_on
from tools.trainers.implementations import DPFlashClippingTrainer

TINY = 8  # tokens of the steps that take the place of those with dpft's isolation check


class Steps:
    """The steps of one experiment, counted.

    dpft's isolation check runs in backward 1, 2, 4, 8, ...: some ten times in a run of thousands. Those of the warm-up
    are measured as such; from then on a tiny step takes the place of the next one.

    Args:
        model: of :func:`tools.memory.setup.make_model`; it is changed.
        made: called with ``"module"`` when the model is wrapped, then with ``"optimizer"``.
    """

    def __init__(
        self, setup: Setup, experiment: Experiment, model: Any, made: Callable[[str], None] = lambda _: None
    ) -> None:
        self.setup, self.steps = setup, 0
        self.trainer = experiment.trainer(model, setup, made)
        self.ids = make_batch(setup, model)
        self.tiny = make_batch(setup, model, min(TINY, setup.seq_len))

    def settle(self) -> None:
        """Take tiny steps until dpft's isolation check is not due in the next step."""
        if self.setup.simulate or not isinstance(self.trainer, DPFlashClippingTrainer):
            return
        while (self.steps + 1) & self.steps == 0:
            self.steps += 1
            self.trainer.train_step(self.tiny)

    def step(self, at: Callable[[str], None] = lambda _: None) -> None:
        """One step; ``at`` is told of the four instants."""
        self.steps += 1
        at("before_forward")
        loss = self.trainer.forward(self.ids)
        at("after_forward")
        self.trainer.backward(loss)
        del loss
        at("after_backward")
        self.trainer.step()
        at("after_step")
        self.trainer.zero_grad()


class TimedSteps:
    """What a process that measures time keeps: an experiment, warmed up, of which it takes one step at a time.

    Args:
        name: one of :data:`tools.memory.setup.EXPERIMENTS`.
    """

    def __init__(self, setup: Setup, name: str) -> None:
        report("model")
        model = make_model(setup, EXPERIMENTS[name])
        turn_long_context_on(setup, model)
        if setup.memory_limit is not None:
            limit_memory(setup.device, setup.memory_limit)
        self.setup, self.steps = setup, Steps(setup, EXPERIMENTS[name], model)
        report("warmup")
        for _ in range(setup.warmup_iter):
            self.steps.step()

    def step(self) -> float:
        """Milliseconds of wall time of one step, without a tracker."""
        self.steps.settle()
        gc.collect()
        self._synchronize()
        start = time.perf_counter()
        self.steps.step()
        self._synchronize()
        return 1e3 * (time.perf_counter() - start)

    def _synchronize(self) -> None:
        """Wait for the GPU."""
        if self.setup.device == "cuda":
            torch.cuda.synchronize()
