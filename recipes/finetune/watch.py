"""What the metrics of a run say is wrong with it, in words: each warning at most once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

PATIENCE = 10  # steps in a row
ALL, NONE = 0.99, 0.01  # of the examples
UNCHANGED = 0.5  # of the weights
THIRD = 4  # losses, at least


@dataclass(frozen=True)
class Finding:
    """A warning.

    Attributes:
        words: one line.
        of_records: whether it was made of private records without noise, so that it is not for publication.
        harmless: whether it only explains what is seen.
    """

    words: str
    of_records: bool = True
    harmless: bool = False

    def __str__(self) -> str:
        return f"{'note' if self.harmless else 'warning'}: {self.words}"

    def row(self, step: int) -> dict[str, Any]:
        """Itself as a row of the run's metrics."""
        return {"step": step, "warning": self.words, "not_for_publication": self.of_records}


class RunWatch:
    """Reads the rows of ``loop.train`` as they come.

    Args:
        max_grad_norm: the clip norm C; where it adapts, the first one.
        learning_rate: its peak.
    """

    def __init__(self, max_grad_norm: float, learning_rate: float) -> None:
        self._clip_norm, self._peak = max_grad_norm, learning_rate
        self._said: set[str] = set()
        self._runs: dict[str, int] = {}
        self._losses: list[float] = []

    def look(self, row: dict[str, Any]) -> Iterator[Finding]:
        """The warnings that a row gives rise to.

        Args:
            row: of one logical step: ``step``, ``loss``, ``clipped_share`` and ``median_norm`` (None for an empty
                logical batch), ``learning_rate``; and, where they were taken, ``validation_loss`` and
                ``unchanged_share``, the share of the weights that the update left as they were; ``clip_norm`` where it
                adapts.
        """
        self._clip_norm = row.get("clip_norm", self._clip_norm)
        for name, finding in self._found(row):
            if name not in self._said:
                self._said.add(name)
                yield finding

    def _found(self, row: dict[str, Any]) -> Iterator[tuple[str, Finding]]:
        rate, clipped, same = row.get("learning_rate"), row.get("clipped_share"), row.get("unchanged_share")
        for name in ("loss", "validation_loss"):
            if row.get(name) is not None and not math.isfinite(row[name]):
                yield (
                    "finite",
                    Finding(
                        f"{name} of step {row['step']} is {row[name]}: the weights have diverged, or the model "
                        "overflows on some text, whose gradient then counts 0. Lower --learning-rate, or "
                        "leave out --bf16."
                    ),
                )
        # a warm-up begins with one step at 0
        if self._lasts("zero", None if rate is None else rate == 0, 2):
            yield (
                "zero",
                Finding(
                    "the learning rate is 0, so that each step spends privacy and trains nothing: --learning-rate "
                    f"is {self._peak:g}, or the schedule ends before the run.",
                    of_records=False,
                ),
            )
        if self._lasts("all", None if clipped is None else clipped >= ALL, PATIENCE):
            yield (
                "all",
                Finding(
                    f"at least {ALL:.0%} of the examples were clipped in each of {PATIENCE} steps (median norm "
                    f"{_number(row)}, C {self._clip_norm:g}). No fault: all gradients then count alike "
                    "(normalisation), and a smaller C would only scale the update, which Adam undoes. A larger "
                    "--max-grad-norm lets long gradients count for more, under noise that grows with it.",
                    harmless=True,
                ),
            )
        if self._lasts("none", None if clipped is None else clipped <= NONE, PATIENCE):
            yield (
                "none",
                Finding(
                    f"at most {NONE:.0%} of the examples were clipped in each of {PATIENCE} steps (median norm "
                    f"{_number(row)}, C {self._clip_norm:g}): the noise, in proportion to C, is larger than it need "
                    "be. Lower --max-grad-norm in another run; choosing it by these norms is covered by no epsilon."
                ),
            )
        if self._lasts("unchanged", None if same is None or not rate else same > UNCHANGED, PATIENCE):
            yield (
                "unchanged",
                Finding(
                    f"the updates left more than {UNCHANGED:.0%} of the bfloat16 weights as they were in each of "
                    f"{PATIENCE} steps, being below 2^-9 of them. Keep float32 weights (leave out --bf16, or "
                    "FSDP2, ZeRO or --sums-device cpu with it), or raise --learning-rate.",
                    of_records=False,
                ),
            )
        if self._rises(row.get("loss")):
            yield (
                "rising",
                Finding(
                    f"the loss rises: the mean of the last third of {len(self._losses)} steps is above that of the "
                    "first by more than the losses of the first third differ. Lower --learning-rate, or the noise "
                    "by a larger --expected-batch-size."
                ),
            )

    def _lasts(self, name: str, holds: bool | None, steps: int) -> bool:
        """Whether it held in so many steps in a row; None: a step that says nothing."""
        if holds is not None:
            self._runs[name] = self._runs.get(name, 0) + 1 if holds else 0
        return self._runs.get(name, 0) >= steps

    def _rises(self, loss: float | None) -> bool:
        if loss is not None and math.isfinite(loss):
            self._losses.append(loss)
        third = len(self._losses) // 3
        if third < THIRD:
            return False
        first, last = self._losses[:third], self._losses[-third:]
        return sum(last) / third - sum(first) / third > max(first) - min(first)


def _number(row: dict[str, Any]) -> str:
    return "unknown" if row.get("median_norm") is None else f"{row['median_norm']:.3g}"
