"""The white-box audit under engines: every rank finds the same, a sound mechanism passes, half the noise fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.engines.launching import launch, succeed

WORKER = Path(__file__).with_name("audit_worker.py")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3"])
def test_audited(engine: str, tmp_path: Path) -> None:
    succeed(launch(engine, WORKER, str(tmp_path), scratch=tmp_path))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    for name, claim_holds in (("sound", True), ("half", False)):
        assert first[name]["violated"] is not claim_holds, first[name]["failed"]
        assert first[name]["measured"] == pytest.approx(second[name]["measured"])
        expected = 1.0 if claim_holds else 0.5
        assert first[name]["measured"]["noise_multiplier"] == pytest.approx(expected, rel=0.02)
