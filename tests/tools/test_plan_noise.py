"""The table of what noise takes is what the code counts now."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools import plan_noise

FILE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "noise_planned.json"


@pytest.mark.slow
def test_the_file_has_what_is_counted() -> None:
    found = plan_noise.rows()
    assert json.loads(FILE.read_text())["rows"] == found, "python tools/plan_noise.py --json docs/benchmarks/..."
    assert len(found) == len(plan_noise.MODELS) * len(plan_noise.CARDS) * len(plan_noise.NOISES)
