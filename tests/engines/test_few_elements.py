"""Three ranks, some of which own nothing of a parameter: sums are the oracle's, each element is noised once."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from tests.engines.few_elements_worker import MECHANISM, NUMBER, STEPS, few_elements
from tests.engines.launching import launch, succeed
from tests.engines.matrix_worker import CLIP, Examples
from tests.engines.test_correlated import check_same
from tests.oracle import Grads, oracle, relative_error

pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("few_elements_worker.py")
RANKS = 3


@cache
def clipped_sum() -> Grads:
    return oracle(few_elements(), Examples(NUMBER).batch).clipped_sum(CLIP)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_parameters_of_fewer_elements_than_ranks(engine: str, tmp_path: Path) -> None:
    output = tmp_path / "output"
    output.mkdir()
    succeed(launch(engine, WORKER, str(output), scratch=tmp_path, processes=RANKS))
    small = {n: p.numel() for n, p in few_elements().named_parameters() if p.numel() < 5}
    assert sorted(small.values()) == [1, 2, 4]
    for rank in range(RANKS):
        released = torch.load(output / f"sum_{rank}.pt")
        assert relative_error(released, clipped_sum()) <= 1e-5
        for name in small:  # which are lost in the norm of all
            assert relative_error({name: released[name]}, {name: clipped_sum()[name]}) <= 1e-5, name
        steps = torch.load(output / f"noise_{rank}.pt")
        assert len(steps) == STEPS
        for step in steps:  # the constant that stands for noise, of one deviation: once, in each element
            for name, p in few_elements().named_parameters():
                torch.testing.assert_close(step[name], torch.ones_like(p.detach()), rtol=1e-3, atol=0)
    check_same(output, "few", MECHANISM, 1, [RANKS], few_elements)
