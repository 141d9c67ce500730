"""An account and several ranks: one pays, all hear of it, and a refusal is one on all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.engines.launching import launch, succeed

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_ranks_pay_once_together(engine: str, tmp_path: Path) -> None:
    worker = Path(__file__).with_name("account_worker.py")
    succeed(launch(engine, worker, str(tmp_path), scratch=tmp_path))
    for rank in (0, 1):
        seen = json.loads((tmp_path / f"{rank}.json").read_text())
        assert "training of 4 steps does not fit" in seen["refused"]
        assert seen["open"] == [3] and seen["closed"] == [2]
