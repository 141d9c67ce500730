"""Every engine, launched as users launch it, gives the same private gradient and noise of the same law.

One launch an engine runs every case (``matrix_worker.py``), and then those of ``test_refusals_ranks.py``; what the
first wrote is judged here. The criterion for sums is the oracle's: 1e-5 relative in float32, twice plain PyTorch's own
error in bf16.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from dpft.privacy.samplers.sampler import FixedSizeSampler
from tests.engines.conftest import SITUATIONS, WORKER
from tests.engines.correlated_worker import MECHANISMS
from tests.engines.launching import ENGINES, launch, succeed
from tests.engines.matrix_worker import ADAM, CLIP, STEPS, Examples
from tests.engines.models import plain_llama
from tests.engines.test_correlated import check_same
from tests.oracle import oracle, plain_error, rows, trainable

pytestmark = pytest.mark.slow
# Noise is fresh on every run. Of a statistic's own deviation: each one goes red by chance once in 5 x 10^8 runs, as a
# normal one does. All 120 of the slow tests together: once in 4 x 10^6.
SIGMAS = 6.0


@cache
def reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters before and after the worker's five steps, by the oracle and Adam in float64."""
    model = plain_llama().double()
    before = {n: p.detach().clone() for n, p in trainable(model).items()}
    optimizer = torch.optim.Adam(model.parameters(), **ADAM)
    examples = Examples(STEPS["examples"])
    sampler = FixedSizeSampler(STEPS["examples"], STEPS["batch"], test_seed=STEPS["seed"])
    for step in range(STEPS["steps"]):
        drawn = rows(examples.batch, sampler.draw(step).tolist())
        total = oracle(model, drawn).clipped_sum(CLIP)
        for name, p in trainable(model).items():
            p.grad = total[name] / STEPS["batch"]
        optimizer.step()
    return before, {n: p.detach().clone() for n, p in trainable(model).items()}


@cache
def bf16_error() -> float:
    """Plain PyTorch's relative error of a sum in bf16, on the examples of the steps."""
    batch = Examples(STEPS["batch"]).batch
    exact = oracle(plain_llama(), batch)
    return plain_error(plain_llama().to(torch.bfloat16), batch, exact, factors=exact.factors(CLIP))


def flat(parameters: dict[str, Tensor]) -> Tensor:
    return torch.cat([p.double().flatten() for p in parameters.values()])


def check_sums(results: dict[str, Any], least: int) -> None:
    measured = {title: facts for title, facts in results.items() if "error" in facts}
    assert len(measured) >= least
    wrong = {title: facts for title, facts in measured.items() if not facts["error"] <= facts["limit"]}
    assert not wrong


def check_physical(every: list[dict[str, Any]]) -> None:
    """All ranks ran the same number of physical batches; together they took part with every example once."""
    for title, facts in every[0].items():
        assert all(other[title].get("physical") == facts.get("physical") for other in every), title
    if "five physical batches, two_pass" in every[0]:
        assert every[0]["a rank without an example, one_pass"]["physical"] == [1]
        assert every[0]["five physical batches, two_pass"]["physical"] == [5]


def check_verdicts(every: list[dict[str, Any]]) -> None:
    assert all(results["together"]["raised"] == "the disk is full" for results in every)
    if len(every) > 1:
        for results in every:
            assert "'C': rank 0 has 1.0, rank 1 has 2.0" in results["agree"]["raised"]


def check_steps(folder: Path, processes: int, results: dict[str, Any], parts: int | None = None) -> None:
    """``parts``: of how many a logical batch is drawn; None: one for each process."""
    before, after = reference()
    moved = flat(after) - flat(before)
    for title in (t for t in results if t.startswith("steps")):
        everyone = [torch.load(folder / f"{title}_{rank}.pt") for rank in range(processes)]
        for other in everyone:
            assert all(torch.equal(other[name], everyone[0][name]) for name in after), "the ranks' parameters differ"
        off = (flat(everyone[0]) - flat(after)).norm()
        if "float32" in title:
            assert off <= 1e-6 * flat(after).norm() and off <= 1e-5 * moved.norm(), title
        else:
            assert off <= 2 * bf16_error() * moved.norm(), (title, float(off / moved.norm()))
    counts = results["steps, float32, one_pass"]["physical"]
    assert len(counts) == STEPS["steps"] and ((parts or processes) == 1 or len(set(counts)) > 1)


def check_noise(folder: Path, processes: int, results: dict[str, Any]) -> None:
    for title in (t for t in results if t.startswith("noise")):
        assert results[title]["examples"] == 0
        sizes = results[title]["sizes"]
        draws = [torch.load(folder / f"noise_{title.split(', ')[1]}_{rank}.pt") for rank in range(processes)]
        for other in draws:
            assert torch.equal(other, draws[0]), "replicas were given different noise"
        z = draws[0]
        steps, count = z.shape
        # A draw, or a change of a parameter, may round to zero: about once in 10^7.
        assert count == sum(sizes) and bool((z != 0).any(0).all()) and int((z == 0).sum()) <= 3, "not noised"
        assert abs(float(z.mean())) < SIGMAS / math.sqrt(z.numel())
        assert abs(float(z.var()) - 1) < SIGMAS * math.sqrt(2 / z.numel())
        # Its skewness at 60,000 draws is 0.12, which makes its tail at 6 deviations exp(0.12 x 6^3 / 6) = 75 times the
        # normal one; at 7 deviations it is 1,000 times 1.3e-12.
        assert abs(float((z**4).mean()) - 3) < 7 * math.sqrt(96 / z.numel())
        for part in z.split(sizes, dim=1):
            # By the chi-square law itself: of 32 elements' 96 draws it has 600 times the normal tail. 315 of these are
            # red once in 1.6 x 10^7 runs. With half the noise the smallest parameter has 1e-15.
            total, law = float(part.square().sum()), stats.chi2(part.numel())
            assert min(law.cdf(total), law.sf(total)) > 1e-10, "of one parameter"
        for first in range(steps):
            for second in range(first):
                assert abs(float((z[first] * z[second]).mean())) < SIGMAS / math.sqrt(count), "steps are correlated"
        # Shards are halves: of the whole, or of every parameter.
        halves = [z[:, : count // 2], z[:, count - count // 2 :]]
        by_parameter = [part.split(part.shape[1] // 2, dim=1)[:2] for part in z.split(sizes, dim=1)]
        for a, b in [halves, [torch.cat(list(half), 1) for half in zip(*by_parameter, strict=True)]]:
            assert abs(float((a * b).mean())) < SIGMAS / math.sqrt(a.numel()), "ranks drew the same noise"


def test_hybrid_sharding(tmp_path: Path) -> None:
    """HSDP, two replicas of two shards: sums over all four ranks; noise distinct in shards, the same in replicas."""
    output = tmp_path / "output"
    output.mkdir()
    succeed(launch("fsdp2", WORKER, str(output), "hybrid", scratch=tmp_path, processes=4))
    every = [json.loads((output / f"results_{rank}.json").read_text()) for rank in range(4)]
    for results in every:
        wrong = [t for t, facts in results.items() if "error" in facts and not facts["error"] <= facts["limit"]]
        assert not wrong
    check_noise(output, 4, every[0])
    for mechanism in MECHANISMS:
        check_same(output, mechanism, mechanism, 2, [4, 4])


@pytest.mark.parametrize("engine", ENGINES)
def test_engine(engine: str, launched: Callable[[str], Path]) -> None:
    output = launched(engine)
    processes = 1 if engine == "single" else 2
    every = [json.loads((output / f"results_{rank}.json").read_text()) for rank in range(processes)]
    check_physical(every)
    check_verdicts(every)
    for results in every:
        check_sums(results, 8 + (2 * 6 + 2 if engine in SITUATIONS else 0))
    check_steps(output, processes, every[0])
    check_noise(output, processes, every[0])
