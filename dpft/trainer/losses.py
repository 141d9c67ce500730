"""Per-example losses of a Trainer: its model's own, or those of its functions on each example's outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dpft.errors import PrivacyConfigError
from dpft.trainer import preference
from dpft.wrap import clipped_loss

# Methods in which a subclass may do something that a private step does not repeat; these may define them.
_SEAMS = ("training_step", "get_batch_samples", "_run_epoch", "_inner_training_loop", "_prepare_for_training")
HOOK = "per_example_losses"


class Losses:
    """How a private step gets the loss of a physical batch.

    Args:
        private: trainer, model, inputs -> the loss whose backward gives the clipped sum.
        collate: the Trainer's collator -> that of training batches.
    """

    def __init__(
        self,
        private: Callable[[Any, nn.Module, dict[str, Any]], Tensor],
        collate: Callable[[Any], Any] = lambda collate: collate,
    ) -> None:
        self.private, self.collate = private, collate


def find(trainer: Any) -> Losses:
    """How the losses of this Trainer's class are computed by example.

    Raises:
        PrivacyConfigError: the class computes a loss of its own, or changes the loop; says what to define.
    """
    cls = type(trainer)
    for name in _SEAMS:
        owner = _owner(cls, name)
        if not _known(owner):
            raise PrivacyConfigError(
                f"{owner.__name__}.{name} changes Trainer's loop, and it is not known what it does with examples. Use "
                "callbacks, or write the loop with dpft.prepare."
            )
    if hasattr(trainer, HOOK):
        return Losses(_hooked)
    owner = _owner(cls, "compute_loss")
    if owner.__name__ == "SFTTrainer" and _known(owner):
        _check_sft(trainer)
        return Losses(_own)
    if owner.__name__ in ("DPOTrainer", "RewardTrainer") and _known(owner):
        preference.check(trainer)
        return Losses(preference.private_pairs(owner), preference.PairCollate)
    if owner.__module__ != "transformers.trainer":
        raise PrivacyConfigError(
            f"{owner.__name__}.compute_loss computes a loss of the whole batch. Define per_example_losses(self, "
            "model, inputs), which returns one loss for each example, [B], in its place; or pass compute_loss_func, "
            "which is called for each example's outputs."
        )
    if trainer.label_smoother is not None or trainer.compute_loss_func is not None:
        return Losses(_of_outputs)
    return Losses(_own)


def _owner(cls: type, name: str) -> type:
    """The class that defines a method, this package's aside."""
    return next(c for c in cls.__mro__ if name in c.__dict__ and not c.__module__.startswith("dpft."))


def _known(owner: type) -> bool:
    return owner.__module__.startswith(("transformers.", "trl.trainer.", "accelerate."))


def _check_sft(trainer: Any) -> None:
    if trainer.args.loss_type != "nll":
        raise PrivacyConfigError(
            f"loss_type={trainer.args.loss_type!r}: expected 'nll', the mean over an example's own tokens. Define "
            "per_example_losses(self, model, inputs) in a subclass for another."
        )
    if getattr(trainer, "aux_loss_enabled", False):
        raise PrivacyConfigError(
            "the router's auxiliary loss (output_router_logits) mixes the examples of a batch; set "
            "model.config.output_router_logits = False."
        )


def _own(trainer: Any, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """``model(**inputs).loss``, which the wrapped model computes by example."""
    out = model(**inputs)
    loss = out["loss"] if isinstance(out, dict) else out[0]
    assert isinstance(loss, Tensor)
    return loss


def _hooked(trainer: Any, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """``per_example_losses`` of the subclass."""
    weights = inputs["example_weight"]
    losses = getattr(trainer, HOOK)(model, inputs)
    return clipped_loss(trainer.accelerator.unwrap_model(model), losses, weights)


def _of_outputs(trainer: Any, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Label smoothing, or the user's ``compute_loss_func``, of each example's outputs and labels alone."""
    inputs = dict(inputs)
    labels, weights = inputs.pop("labels", None), inputs["example_weight"]
    out = model(**inputs)
    count = len(weights)
    rows = split_outputs(out, count)
    found = []
    for i, row in enumerate(rows):
        own = None if labels is None else labels[i : i + 1]
        if trainer.compute_loss_func is not None:
            loss = trainer.compute_loss_func(row, own, num_items_in_batch=None)
        else:
            loss = trainer.label_smoother(row, own, shift_labels=trainer._loss_shifts_labels)
        found.append(loss.reshape(()))
    return clipped_loss(trainer.accelerator.unwrap_model(model), torch.stack(found), weights)


def split_outputs(out: Any, count: int) -> list[Any]:
    """The outputs of each example, of one forward.

    Args:
        out: a ModelOutput whose tensors have the batch in front; other entries are left out.
        count: B.

    Returns:
        B outputs of batch 1. ``split``, whose backward is one concatenation, rather than B slices.
    """
    parts: dict[str, Any] = {
        name: value.split(1) for name, value in out.items() if isinstance(value, Tensor) and value.dim() > 0
    }
    parts = {name: value for name, value in parts.items() if len(value) == count}
    return [type(out)(**{name: value[i] for name, value in parts.items()}) for i in range(count)]
