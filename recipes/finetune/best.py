"""--save-best: the weights of the evaluation with the lowest validation loss are exported, instead of the last ones.

Every step's weights are released, and the budget is spent to the end of the run, so that whichever are exported cost
no more. The choice itself is made by held-out private records without noise: the card says that nothing covers it.
"""

from __future__ import annotations

import json
from pathlib import Path

from accelerate import Accelerator
from finetune import checkpoints
from finetune.engine import from_first
from finetune.output import CHECKPOINTS

BEST = "best"


class Best:
    """The best evaluation of a run so far, kept as a checkpoint.

    Args:
        accelerator: of the run.
        output: the run's folder; the best of an earlier start of the run is taken from there. A collective.
        strict: see :func:`checkpoints.load`.

    Attributes:
        step: of the best evaluation; 0 before the first.
        loss: its validation loss; private, as it was computed from records.

    Raises:
        ValueError: the earlier start was of another engine, or under ZeRO had another number of processes.
    """

    def __init__(self, accelerator: Accelerator, output: Path, strict: bool = True) -> None:
        self._strict = strict
        self._accelerator, self._folder = accelerator, output / CHECKPOINTS / BEST
        about = from_first(accelerator, self._about)
        self.step, self.loss = int(about.get("step", 0)), float(about.get("loss", "inf"))

    def _about(self) -> dict[str, float]:
        path = self._folder / checkpoints.ABOUT
        if not path.exists():
            return {}
        about = json.loads(path.read_text(encoding="utf-8"))
        checkpoints.check_engine(self._accelerator, self._folder, about["engine"])
        if checkpoints.is_of_others(self._accelerator, about["processes"]):
            raise ValueError(
                f"--save-best: {BEST!r} was written by {about['processes']} processes; launch as many, or leave "
                "--save-best out."
            )
        return {"step": about["step"], "loss": about["loss"]}

    def consider(self, step: int, loss: float) -> None:
        """Keep the state if its validation loss is the lowest. A collective.

        Raises:
            SaveError: see :func:`checkpoints.write`.
        """
        if loss < self.loss:  # never of NaN
            checkpoints.write(self._accelerator, self._folder, step=step, loss=loss)
            self.step, self.loss = step, loss

    def restore(self) -> None:
        """Put the kept state into the prepared objects. A collective; nothing may be trained after it."""
        checkpoints.load(self._accelerator, checkpoints.Checkpoint(self.step, self._folder), self._strict)

    def note(self, steps: int) -> str:
        """What the privacy statement must say of weights that were chosen among ``steps``."""
        return (
            f"the weights are those of step {self.step}, chosen by the lowest validation loss: that choice looked at "
            f"held-out private records without noise, and no epsilon covers it. The epsilon is that of all {steps} "
            "steps, after any of which they could have been chosen"
        )
