"""What tests of plans share."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from dpft.planning.simulate import simulate


@pytest.fixture
def simulated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans of one model that differ in their memory share its simulations, which do not depend on it."""
    known: dict[Any, Any] = {}

    def once(twin: nn.Module, *args: Any, **kwargs: Any) -> Any:
        key = args, tuple((name, value) for name, value in kwargs.items() if name != "costs")
        if key not in known:
            known[key] = simulate(twin, *args, **kwargs)
        return known[key]

    monkeypatch.setattr("dpft.planning.predictor.simulate", once)
