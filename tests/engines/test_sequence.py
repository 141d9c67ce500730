"""Sequence parallelism: one example's tokens on several ranks, and the same private gradient and noise as on one.

One launch of each engine runs every case (``sequence_worker.py``), with the criteria of ``test_matrix.py``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.engines.conftest import WORKER
from tests.engines.launching import launch, succeed
from tests.engines.test_matrix import check_noise, check_steps, check_sums, check_verdicts

pytestmark = pytest.mark.slow

REFUSED = {
    "left padding": "Pad on the right",
    "two rows": "max_physical_batch_size=1",
    "packed": "position_ids do not count up from 0",
    "a value that is not of tokens": "cannot be split",
    "eval mode": "eval mode",
    "different examples": "the ranks of one sequence were given different examples",
}


def check_refusals(results: dict[str, Any]) -> None:
    for title, words in REFUSED.items():
        assert words in results[title]["raised"], title
    of = results["without gradients"]
    assert of["split"] == pytest.approx(of["evaluated"], rel=1e-5)


@pytest.mark.parametrize(
    ("engine", "processes"), [("zero1", 2), ("zero2", 2), ("zero3", 2), ("fsdp2", 2), ("zero3", 4)]
)
def test_sequence(engine: str, processes: int, tmp_path: Path) -> None:
    """Four processes: two sequences of two ranks each."""
    output = tmp_path / "output"
    output.mkdir()
    succeed(launch(engine, WORKER, str(output), "sequence", scratch=tmp_path, processes=processes))
    every = [json.loads((output / f"results_{rank}.json").read_text()) for rank in range(processes)]
    check_verdicts(every)
    for results in every:
        check_sums(results, 10)
        if processes == 2:
            check_refusals(results)
        assert "in tiles" in results or "under ZeRO-3" in results["tiles"]["raised"]
    assert {results["llama, 96"]["physical"][0] for results in every} == {5 if processes == 2 else 3}
    check_steps(output, processes, every[0], parts=processes // 2)
    check_noise(output, processes, every[0])
