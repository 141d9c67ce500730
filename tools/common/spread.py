"""Several measurements of one thing as their median and range."""

from __future__ import annotations

import statistics
from collections.abc import Iterable


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, least and most; of one value or more."""
    found = list(values)
    return {"median": statistics.median(found), "min": min(found), "max": max(found)}
