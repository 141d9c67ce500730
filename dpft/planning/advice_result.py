"""What :func:`dpft.advise` returns, and how it prints."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from dpft.planning.result import aligned
from dpft.privacy.config import PrivacyConfig

__all__ = ["Advice", "Setting"]

Method = Literal["full", "lora", "as given"]


@dataclass(frozen=True)
class Setting:
    """A logical batch and a number of steps, and what they cost under the advice's epsilon and delta.

    Attributes:
        batch: expected size b of a logical batch, in examples.
        steps: T, noisy updates.
        noise_multiplier: sigma, by dpft's accountant.
        epsilon: that the accountant computes for it; at most the target.
        sample_rate: q = b / N.
        epochs: q T, passes over the data in expectation.
        noise: sigma C / b, standard deviation of the noise on each coordinate of an update's mean gradient, in the
            gradient's unit (noise-batch ratio times clip norm).
        noise_length: sigma sqrt(d) / b, the length of that noise over C, the greatest length that the mean gradient
            can have. d: trainable parameters.
        signal_to_noise: b sqrt(T) / sigma, of all updates together, along one direction: the sum of T expected
            clipped sums if every gradient had length C in it, over the noise of that sum.
        share: signal_to_noise over the most that epsilon and delta allow, which is that of one update on all examples.
        tokens: b T times the tokens of an example, in expectation.
        flops: of them.
        seconds: on the machine of the plan, without communication; None without a plan.
    """

    batch: int
    steps: int
    noise_multiplier: float
    epsilon: float
    sample_rate: float
    epochs: float
    noise: float
    noise_length: float
    signal_to_noise: float
    share: float
    tokens: int
    flops: float
    seconds: float | None


@dataclass(frozen=True)
class Advice:
    """Hyperparameters of a private training, and why. See :func:`dpft.advise`.

    Nothing in it depends on the private records except their number, which is treated as public, as
    :class:`dpft.PrivacyConfig` treats it where no sample rate is declared.

    Attributes:
        examples: N.
        target_epsilon: the budget.
        target_delta: its delta.
        tokens: of an example.
        parameters: of the model.
        trainable: d, of them or of its adapters, under ``method``; None: of LoRA on a model of which only the number
            of parameters was given.
        method: ``"full"``, ``"lora"``, or ``"as given"`` where the model comes with frozen parameters.
        clip_norm: C.
        learning_rate: peak, of AdamW.
        setting: the recommended batch and steps, with their cost.
        alternatives: half and twice the batch, half and twice the steps, where they exist.
        grid: settings around the recommended one, batch by batch; without those that the accountant refuses.
        reasons: of ``batch``, ``steps``, ``clip_norm``, ``learning_rate`` and ``method``: a sentence each.
        notes: what the advice does not cover.
    """

    examples: int
    target_epsilon: float
    target_delta: float
    tokens: int
    parameters: int
    trainable: int | None
    method: Method
    clip_norm: float
    learning_rate: float
    setting: Setting
    alternatives: dict[str, Setting]
    grid: list[Setting]
    reasons: dict[str, str]
    notes: list[str]

    @property
    def batch(self) -> int:
        """Expected size of a logical batch."""
        return self.setting.batch

    @property
    def steps(self) -> int:
        """Number of updates."""
        return self.setting.steps

    def privacy(self, **changes: Any) -> PrivacyConfig:
        """The configuration of the recommended training, with ``changes`` to its fields.

        Raises:
            PrivacyConfigError: as its constructor.
        """
        fields: dict[str, Any] = {
            "target_epsilon": self.target_epsilon,
            "target_delta": self.target_delta,
            "expected_batch_size": self.batch,
            "num_steps": self.steps,
            "max_grad_norm": self.clip_norm,
        }
        return PrivacyConfig(**(fields | changes))

    def to_dict(self) -> dict[str, Any]:
        """All fields, serialisable to JSON."""
        return dataclasses.asdict(self)

    def table(self) -> str:
        """The recommended setting and its alternatives, a line each."""
        head = ["", "b", "T", "q", "epochs", "sigma", "noise", "S/N", "of most", "tokens", "FLOPs", "hours"]
        rows = [_row("recommended", self.setting)]
        rows += [_row(name, setting) for name, setting in self.alternatives.items()]
        return "\n".join(aligned([head, *rows]))

    def __str__(self) -> str:
        trained = "?" if self.trainable is None else f"{self.trainable:,}"
        what = f"{self.method}: {trained} of {self.parameters:,} parameters"
        lines = [
            f"advice for {self.examples:,} examples of {self.tokens:,} tokens, epsilon {self.target_epsilon:g}, "
            f"delta {self.target_delta:g}",
            "",
        ]
        values = {
            "batch": f"{self.batch:,} expected",
            "steps": f"{self.steps:,}",
            "clip_norm": f"{self.clip_norm:g}",
            "learning_rate": f"{self.learning_rate:.2g} (AdamW)",
            "method": what,
        }
        for name, value in values.items():
            lines += [f"{name.replace('_', ' '):14} {value}", f"               {self.reasons[name]}"]
        lines += ["", self.table(), "noise: sigma C / b on each coordinate; S/N: of all updates along one direction"]
        return "\n".join([*lines, *(f"- {note}" for note in self.notes)])


def _row(name: str, setting: Setting) -> list[str]:
    return [
        name,
        f"{setting.batch:,}",
        f"{setting.steps:,}",
        f"{setting.sample_rate:.3g}",
        f"{setting.epochs:.3g}",
        f"{setting.noise_multiplier:.3f}",
        f"{setting.noise:.2e}",
        f"{setting.signal_to_noise:,.0f}",
        f"{setting.share:.0%}",
        f"{setting.tokens:.2e}",
        f"{setting.flops:.1e}",
        "-" if setting.seconds is None else f"{setting.seconds / 3600:,.2f}",
    ]
