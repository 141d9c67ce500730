"""What a private step sends and holds under FSDP2, counted beside plain training (tools/measure_engines.py)."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.engines.launching import ROOT, launch, succeed

pytestmark = pytest.mark.slow
WORKER = ROOT / "tools" / "engines/worker.py"
SHAPES = {"width": 64, "layers": 2, "tokens": 16, "vocab": 64, "rows": 2, "sequence": 1}
EMBEDDING = 4 * 64 * 64  # bytes of the one weight of which a backward needs only the gradient
LARGEST = 4 * 64 * 176  # bytes of the largest gradient, of an MLP's matrix
VERDICTS = 1024  # bytes of counts and verdicts a step, which are no gradients
LOOSE = 16 * 1024  # bytes of norms, factors and the batch, which are held and are no gradients


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[tuple[str, int], dict[str, Any]]]:
    """Bytes of all parameters; by strategy and physical batches, what a step cost rank 0."""
    folder = tmp_path_factory.mktemp("costs")
    each = [(s, 1) for s in ("plain", "one_pass", "two_pass")] + [("one_pass", 2), ("two_pass", 2)]
    cases = [{"strategy": s, "checkpointing": False, "physical": k} for s, k in each]
    succeed(launch("fsdp2", WORKER, json.dumps({**SHAPES, "cases": cases}), str(folder), scratch=folder))
    ranks = [json.loads((folder / f"costs_{rank}.json").read_text()) for rank in range(2)]
    for mine, other in zip(ranks[0]["results"], ranks[1]["results"], strict=True):
        assert mine["bytes"] == other["bytes"]
    return 4 * ranks[0]["parameters"], dict(zip(each, ranks[0]["results"], strict=True))


def test_costs(counted: tuple[int, dict[tuple[str, int], dict[str, Any]]]) -> None:
    whole, facts = counted
    plain = facts["plain", 1]["bytes"]
    assert plain["reduce_scatter"] == whole, "the counter has not seen what FSDP2 sends"
    for strategy in ("one_pass", "two_pass"):
        sent = facts[strategy, 1]["bytes"]
        # Whatever else goes round is too small to be a gradient.
        others = sum(n for kind, n in sent.items() if kind not in ("reduce_scatter", "all_gather"))
        assert others <= VERDICTS, "whole gradients went round"
        assert sent["reduce_scatter"] == plain["reduce_scatter"], "not the gradient bytes of plain training"

    gathered = {s: facts[s, 1]["bytes"]["all_gather"] for s in ("plain", "one_pass", "two_pass")}
    assert [facts[s, 1]["traversals"] for s in gathered] == [1, 1, 2]
    assert gathered["one_pass"] == gathered["plain"]
    # The second traversal gathers each weight that a backward uses, once.
    assert gathered["two_pass"] - gathered["one_pass"] == whole - EMBEDDING


@pytest.mark.parametrize("strategy", ["one_pass", "two_pass"])
def test_sums_are_sharded(strategy: str, counted: tuple[int, dict[tuple[str, int], dict[str, Any]]]) -> None:
    """Between two physical batches a rank holds its shard of the sums, and nothing that is on its way."""
    whole, facts = counted
    limit = whole // 2 + LOOSE
    assert limit < 0.9 * whole
    assert whole // 2 <= facts[strategy, 2]["held_between"] <= limit
