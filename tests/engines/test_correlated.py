"""Correlated noise under every engine: to the bit that of one process, however it is sharded, over resumes too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import dpft
from dpft.correlated_noise import CorrelatedNoise
from dpft.privacy.correlated.noise_secrets import NoiseSecret
from dpft.privacy.correlated.strategy import Strategy
from tests.engines.correlated_worker import BATCH, MECHANISMS, NUMBER, SIGMA, STARTS, STEPS
from tests.engines.launching import ENGINES, launch, succeed
from tests.engines.matrix_worker import CLIP
from tests.engines.models import plain_llama

pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("correlated_worker.py")


def weights(output: Path, title: str, number: int, ranks: int) -> list[torch.Tensor]:
    """After each step of a start, flat; they are the same on all ranks."""
    names = [output / f"correlated_{title}_{number}_{rank}.pt" for rank in range(ranks)]
    ours, *others = [[torch.cat([p.flatten() for p in row.values()]) for row in torch.load(n)] for n in names]
    assert len(ours) == STARTS[number]
    assert all(a.equal(b) for other in others for a, b in zip(ours, other, strict=True))
    return ours


def strategy_of(mechanism: str) -> Strategy:
    found = dpft.PrivacyConfig(**MECHANISMS[mechanism]).resolve(NUMBER).strategy
    assert found is not None
    return found


def of_one_process(
    output: Path, title: str, mechanism: str, starts: int, build: Callable[[], torch.nn.Module] = plain_llama
) -> list[list[torch.Tensor]]:
    """What SGD makes of the noise alone, which the file of secrets determines."""
    lines = (output / f"_correlated_{title}.jsonl.noise").read_text().splitlines()[1:]
    secrets = [NoiseSecret(line["first"], bytes.fromhex(line["secret"])) for line in map(json.loads, lines)]
    assert [secret.first for secret in secrets] == [sum(STARTS[:number]) for number in range(starts)]
    shapes = [p.shape for p in build().parameters()]
    found = []
    for number in range(starts):
        noise = CorrelatedNoise(strategy_of(mechanism), secrets[: number + 1])
        total, rows = torch.zeros(sum(shape.numel() for shape in shapes)), []
        for _ in range(STARTS[number]):
            with noise.release():
                drawn = [noise.add_(torch.zeros(shape), SIGMA * CLIP).flatten() for shape in shapes]
            total = total - torch.cat(drawn) / BATCH
            rows.append(total)
        found.append(rows)
    return found


def check_same(
    output: Path,
    title: str,
    mechanism: str,
    starts: int,
    ranks: list[int],
    build: Callable[[], torch.nn.Module] = plain_llama,
) -> None:
    expected = of_one_process(output, title, mechanism, starts, build)
    for number, count in enumerate(ranks):
        for ours, theirs in zip(weights(output, title, number, count), expected[number], strict=True):
            assert ours.equal(theirs)


def check_white(output: Path, mechanism: str, starts: int) -> None:
    """C w / (sigma C scale) of all released w are independent N(0, 1), over starts too."""
    rows = []
    for steps in (weights(output, mechanism, number, 1) for number in range(starts)):
        rows += [(before - after).double() for before, after in zip([torch.zeros(1), *steps], steps, strict=False)]
    strategy, n = strategy_of(mechanism), len(rows)
    c = strategy.coefficients(n)
    matrix = np.array([[c[i - j] if i >= j else 0.0 for j in range(n)] for i in range(n)])
    white = matrix @ torch.stack(rows).numpy() * BATCH / (SIGMA * CLIP * strategy.scale)
    count = white.shape[1]
    error = np.sqrt((1 + np.eye(n)) / count)
    assert (np.abs(white @ white.T / count - np.eye(n)) / error).max() < 6
    halves = white[:, : count // 2] @ white[:, -(count // 2) :].T / (count // 2)
    assert np.abs(halves).max() < 6 / np.sqrt(count // 2)


@pytest.mark.parametrize("engine", ENGINES)
def test_noise_is_that_of_one_process_over_a_resume(engine: str, launched: Callable[[str], Path]) -> None:
    output, ranks = launched(engine), 1 if engine == "single" else 2
    for mechanism in MECHANISMS:
        check_same(output, mechanism, mechanism, 2, [ranks] * 2)
        check_white(output, mechanism, 2)
    if engine == "fsdp2":
        check_same(output, "offloaded", "bandmf", 2, [ranks] * 2)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3"])
def test_a_resume_with_another_number_of_processes(
    engine: str, launched: Callable[[str], Path], tmp_path: Path
) -> None:
    output = tmp_path / "output"
    output.mkdir()
    for path in launched(engine).glob("*correlated_*"):
        shutil.copy(path, output)
    succeed(launch(engine, WORKER, str(output), scratch=tmp_path, processes=3))
    for mechanism in MECHANISMS:
        check_same(output, mechanism, mechanism, 3, [2, 2, 3])
        check_white(output, mechanism, 3)
        assert len(of_one_process(output, mechanism, mechanism, 3)[2]) == STEPS - sum(STARTS[:2])
