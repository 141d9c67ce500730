"""The private classes: ``DPTrainer``, ``DPTrainingArguments``, and ``private_trainer`` for any other Trainer."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import transformers

from dpft.errors import PrivacyConfigError
from dpft.privacy import PrivacyConfig
from dpft.trainer.mixin import PrivateMixin


@functools.cache
def private_trainer(cls: type) -> type:
    """A private subclass of a Trainer class: one step is one logical batch, with one release.

    ::

        trainer = dpft.private_trainer(SFTTrainer)(model=model, args=args, train_dataset=dataset, privacy=privacy)
        trainer.train()

    Args:
        cls: ``transformers.Trainer``, ``Seq2SeqTrainer``, TRL's ``SFTTrainer``, or a subclass. One that computes a
            loss of its own defines ``per_example_losses(self, model, inputs)``, which returns ``[B]``.

    Returns:
        A class with the same constructor, and ``privacy`` and ``privacy_options`` (see
        :class:`dpft.trainer.mixin.PrivateMixin`).

    Raises:
        PrivacyConfigError: not a Trainer class.
    """
    given: Any = cls
    if not isinstance(given, type) or not issubclass(given, transformers.Trainer):
        raise PrivacyConfigError(f"private_trainer got {cls!r}; expected transformers.Trainer or a subclass of it")
    if issubclass(cls, PrivateMixin):
        return cls
    return type(f"Private{cls.__name__}", (PrivateMixin, cls), {"__doc__": f"{cls.__name__}, private."})


class DPTrainer(PrivateMixin, transformers.Trainer):
    """A drop-in for ``transformers.Trainer`` that trains with differential privacy: see :func:`private_trainer`."""


@dataclass
class DPTrainingArguments(transformers.TrainingArguments):
    """``transformers.TrainingArguments`` with the fields of :class:`dpft.PrivacyConfig` that are words or numbers.

    For ``adaptive_clip``, ``clip_groups`` and the others pass ``privacy=`` to the Trainer, beside
    ``transformers.TrainingArguments``.

    ``max_grad_norm`` is the clip norm of an example; ``max_steps`` or ``num_train_epochs`` says how many logical
    batches of ``expected_batch_size`` examples are released.

    Attributes:
        target_epsilon: the budget; or give ``noise_multiplier``.
        target_delta: delta.
        expected_batch_size: examples of a logical batch, in expectation.
        noise_multiplier: sigma.
        sampler: see :class:`dpft.PrivacyConfig`, as the following ones.
    """

    target_epsilon: float | None = field(default=None, metadata={"help": "privacy budget epsilon"})
    target_delta: float = field(default=1e-6, metadata={"help": "delta; well below 1 / number of examples"})
    expected_batch_size: int = field(default=256, metadata={"help": "examples of a logical batch, in expectation"})
    noise_multiplier: float | None = field(default=None, metadata={"help": "sigma, in the place of an epsilon"})
    sampler: str = field(
        default="poisson",
        metadata={"help": "poisson, truncated_poisson, fixed_size, shuffle, balls_and_bins; that of the mechanism"},
    )
    mechanism: str = field(default="dp_sgd", metadata={"help": "dp_sgd; bandmf with bands, blt with buffers"})
    bands: int | None = field(default=None, metadata={"help": "of bandmf, with sampler cyclic_poisson"})
    buffers: int | None = field(default=None, metadata={"help": "of blt, with sampler fixed_order"})
    max_batch_size: int | None = field(default=None, metadata={"help": "cap of truncated_poisson"})
    clip_function: str = field(default="abadi", metadata={"help": "abadi or automatic"})
    accountant: str = field(default="pld", metadata={"help": "pld or rdp"})
    secure_rng: bool = field(default=False, metadata={"help": "noise from a cryptographic generator"})

    def privacy(self) -> PrivacyConfig:
        """The configuration that these fields declare.

        Raises:
            PrivacyConfigError: see :class:`dpft.PrivacyConfig`.
        """
        chosen: dict[str, Any] = {
            name: getattr(self, name)
            for name in (
                *("target_epsilon", "target_delta", "expected_batch_size", "noise_multiplier", "max_grad_norm"),
                *("sampler", "max_batch_size", "clip_function", "accountant", "secure_rng"),
                *("mechanism", "bands", "buffers"),
            )
        }
        by_steps = self.max_steps > 0
        return PrivacyConfig(
            **chosen,
            num_steps=self.max_steps if by_steps else None,
            num_epochs=None if by_steps else float(self.num_train_epochs),
        )
