"""Correlated noise on two ranks: the law of one process, each element by one rank, over a resume."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.engines import correlated_worker
from tests.engines.correlated_worker import MECHANISMS, STEPS, privacy
from tests.engines.launching import launch

FIRST = 4


@pytest.mark.slow
def test_ddp_has_the_law_of_one_process_over_a_resume(tmp_path: Path) -> None:
    for steps in (FIRST, STEPS):
        words = (str(tmp_path), ",".join(MECHANISMS), str(steps))
        done = launch("ddp", correlated_worker.__file__, *words, scratch=tmp_path)
        assert done.returncode == 0, done.stdout[:3000] + done.stdout[-3000:]
    for mechanism in MECHANISMS:
        ranks = [
            np.concatenate([np.load(tmp_path / f"{mechanism}-{rank}-{first}.npy") for first in (0, FIRST)])
            for rank in range(2)
        ]
        assert (ranks[0] == ranks[1]).all(), "the replicas got different releases"
        rows = ranks[0]
        strategy = privacy(mechanism).resolve(9).strategy
        assert strategy is not None and len(rows) == STEPS
        c = strategy.coefficients()
        matrix = np.array([[c[i - j] if i >= j else 0.0 for j in range(STEPS)] for i in range(STEPS)])
        white = matrix @ rows / strategy.scale
        count = rows.shape[1]
        error = np.sqrt((1 + np.eye(STEPS)) / count)
        assert (np.abs(white @ white.T / count - np.eye(STEPS)) / error).max() < 6
        halves = white[:, : count // 2] @ white[:, -(count // 2) :].T / (count // 2)  # the parts of the two ranks
        assert np.abs(halves).max() < 6 / np.sqrt(count // 2)
