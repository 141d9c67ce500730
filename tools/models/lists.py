"""What the table can be about: lists of families, adapters and quantised bases, and the sections of a document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from tools.models.adapters import ADAPTERS
from tools.models.building import HEADS, families
from tools.models.precision import Precision
from tools.models.quantised import QUANTISATIONS, QuantisedBase

TEXT_HEADS = ("sequence_classification", "masked_lm", "seq2seq_lm")
PEFT = ("adapter", "quantised")
LISTS: dict[str, tuple[str, ...]] = {
    **{head: (head,) for head in HEADS},
    "heads": TEXT_HEADS,
    "adapters": PEFT,
    "all": ("causal_lm", *TEXT_HEADS, *PEFT),
}


class Subject(Protocol):
    """One row of the table: a small model and its batches. It is sent to a process.

    Attributes:
        name, head, class_name: of the row.
        precision: in which it is compared.
    """

    @property
    def name(self) -> str: ...
    @property
    def head(self) -> str: ...
    @property
    def class_name(self) -> str: ...
    @property
    def precision(self) -> Precision: ...

    def build(self) -> nn.Module:
        """The same model each time; may raise :class:`~tools.models.building.NotBuiltError`."""

    def lengths(self) -> list[int]:
        """Tokens of the rows."""

    def make_batch(self, config: Any, lengths: list[int], seed: int = 1) -> dict[str, Tensor]:
        """Rows of these lengths, with labels."""


def subjects(name: str) -> Sequence[Subject]:
    """The rows of a list, by head and then by name."""
    found: list[Subject] = []
    for head in LISTS[name]:
        if head == "adapter":
            found += sorted(ADAPTERS, key=lambda adapter: adapter.name.lower())
        elif head == "quantised":
            found += [QuantisedBase(each) for each in QUANTISATIONS]
        else:
            found += families(head)
    return found
