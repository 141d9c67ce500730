"""The loss of every head: exact against the float64 oracle in every strategy, or refused by name."""

from __future__ import annotations

import pytest

from tests import zoo
from tests.clipping.against_oracle import case_of, check
from tests.models import heads


@pytest.mark.parametrize("strategy", ["one_pass", "two_pass", "per_example"])
@pytest.mark.parametrize("entry", heads.EXACT, ids=str)
def test_exact(entry: zoo.Entry, strategy: str) -> None:
    check(case_of(entry), strategy=strategy)


@pytest.mark.parametrize("strategy", ["one_pass", "two_pass"])
@pytest.mark.parametrize("entry", heads.EXACT, ids=str)
def test_exact_checkpointed(entry: zoo.Entry, strategy: str) -> None:
    check(case_of(entry), "non-reentrant", strategy=strategy)
