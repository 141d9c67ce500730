"""What a private training adds at the end of each step: epsilon in the progress bar, and an end with the budget."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback


class PrivacyCallback(TrainerCallback):
    """After Trainer's own callbacks.

    Args:
        trainer: the private Trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Epochs are counted in releases, so that a resume goes on where it was; the budget may end sooner."""
        loader = self._trainer.private_loader
        # Trainer called model.zero_grad(), of which the optimiser does not know that the release is gone.
        self._trainer.optimizer.zero_grad()
        state.epoch = state.global_step / len(kwargs["train_dataloader"])
        for callback in self._trainer.callback_handler.callbacks:
            bar = getattr(callback, "training_bar", None)
            if isinstance(callback, ProgressCallback) and bar is not None:
                bar.set_postfix_str(f"epsilon {loader.privacy.epsilon():.3g}")
        if loader.privacy.steps >= loader.privacy.last_step and state.global_step < state.max_steps:
            control.should_training_stop = True
            control.should_save = str(getattr(args.save_strategy, "value", args.save_strategy)) != "no"
