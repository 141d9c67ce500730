"""In what precision a row is compared, and what counts as exact in it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tools.benchmarks.oracle import Float64


@dataclass(frozen=True)
class Precision:
    """A dtype with its tolerance.

    Attributes:
        name: of the dtype.
        context: in which every forward and backward runs.
        tolerance: the largest relative error that counts as exact.
        small: a parameter whose gradient is much smaller than the whole is held to this share of the whole: what
            cancels to zero (the bias of keys) is rounding, of any relative size.
    """

    name: str
    context: Callable[[], contextlib.AbstractContextManager[Any]]
    tolerance: float
    small: float


DOUBLE = Precision("float64", Float64, tolerance=1e-6, small=1e-6)
# For kernels that refuse doubles. Both sides round: a small parameter may be off by 1e-7 of the whole.
SINGLE = Precision("float32", contextlib.nullcontext, tolerance=1e-5, small=1e-2)
