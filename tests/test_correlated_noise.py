"""Noise that is correlated over the steps: its covariance, over resumes too, and that no noise is drawn twice.

The secrets are fixed, so every statistic is the same on every run.
"""

from __future__ import annotations

import copy
import math
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dpft
from dpft import LedgerError, WrapError
from dpft.correlated_noise import BLOCK_ON_HOST, CorrelatedNoise
from dpft.noise import Place
from dpft.privacy.correlated.noise_secrets import NoiseSecret, begin, secrets_path
from dpft.privacy.correlated.strategy import Strategy

STEPS = 9
STRATEGIES = [
    Strategy(kind="bandmf", steps=STEPS, min_separation=4, weights=(1.0, 0.7, 0.6, 0.5)),
    Strategy(kind="blt", steps=STEPS, min_separation=3, weights=(0.2, 0.4), decays=(0.99, 0.6)),
    Strategy(kind="bandmf", steps=STEPS, min_separation=1, weights=(1.0,)),
]
strategies = pytest.mark.parametrize("strategy", STRATEGIES, ids=["bandmf", "blt", "independent"])


def secret(first: int, number: int = 0) -> NoiseSecret:
    return NoiseSecret(first, f"secret {first} {number}".encode())


def release(noise: CorrelatedNoise, shapes: Sequence[tuple[int, ...]], std: float = 1.0) -> list[Tensor]:
    with noise.release():
        return [noise.add_(torch.zeros(shape), std).clone() for shape in shapes]


def matrix(strategy: Strategy) -> np.ndarray:
    c = strategy.coefficients()
    return np.array([[c[i - j] if i >= j else 0.0 for j in range(STEPS)] for i in range(STEPS)])


def check_law(rows: np.ndarray, strategy: Strategy, std: float) -> None:
    """The rows, ``[steps, values]``, have covariance std^2 C^{-1} C^{-T} over the steps."""
    inverse = np.linalg.inv(matrix(strategy)) * std * strategy.scale
    expected = inverse @ inverse.T
    count = rows.shape[1]
    found = rows @ rows.T / count
    diagonal = np.diag(expected)
    error = np.sqrt((expected**2 + np.outer(diagonal, diagonal)) / count)  # of a Gaussian's sample covariance
    assert (np.abs(found - expected) / error).max() < 5
    assert np.abs(rows.mean(1) / np.sqrt(diagonal / count)).max() < 5
    # What the accounting is about: C w = z is independent over the steps.
    white = matrix(strategy) @ rows / (std * strategy.scale)
    assert np.abs(white @ white.T / count - np.eye(STEPS)).max() < 5 * np.sqrt(2 / count)


@strategies
def test_covariance_over_the_steps(strategy: Strategy) -> None:
    noise = CorrelatedNoise(strategy, [secret(0)])
    drawn = [
        torch.cat([part.flatten() for part in release(noise, [(200, 300), (40_000,)], 0.3)]) for _ in range(STEPS)
    ]
    rows = torch.stack(drawn).double().numpy()
    check_law(rows, strategy, 0.3)
    with pytest.raises(AssertionError):
        check_law(rows, strategy, 0.3 * 1.02)
    if len(strategy.weights) > 1:
        with pytest.raises(AssertionError):  # a step that is swapped with the next
            check_law(rows[[0, 2, 1, *range(3, STEPS)]], strategy, 0.3)


@strategies
def test_values_tensors_shards_and_starts_are_independent(strategy: Strategy) -> None:
    one, other = CorrelatedNoise(strategy, [secret(0)]), CorrelatedNoise(strategy, [secret(0, 1)])
    parts = [Place(0, 0, 60_000), Place(0, 30_000, 60_000), Place(1, 0, 30_000)]
    drawn = []
    for _ in range(STEPS):
        with one.release():
            shards = [one.add_(torch.zeros(30_000), 1.0, place) for place in parts]
        drawn.append([*shards, *release(other, [(30_000,)])])
    series = torch.stack([torch.stack(parts) for parts in drawn]).double().numpy()  # [steps, 4, values]
    flat = series.transpose(1, 0, 2).reshape(4 * STEPS, -1)
    correlation = np.corrcoef(flat).reshape(4, STEPS, 4, STEPS)
    for a in range(4):
        for b in range(a):
            assert np.abs(correlation[a, :, b]).max() < 5 / np.sqrt(30_000)
    shifted = np.corrcoef(np.concatenate([flat[:, 1:], flat[:, :-1]]))[: 4 * STEPS, 4 * STEPS :]
    assert np.abs(shifted).max() < 5 / np.sqrt(30_000)


@strategies
def test_a_resume_has_the_noise_of_the_steps_before_it(strategy: Strategy) -> None:
    """Three starts, of which one released nothing: covariance over all steps, no draw made twice, state to the bit."""
    shapes = [(100, 300), (20_000,)]
    secrets, rows, states = [secret(0)], [], []
    for first, last in ((0, 4), (4, 4), (4, 5), (5, STEPS)):
        secrets = [*secrets, secret(first, len(secrets))] if first else secrets
        noise = CorrelatedNoise(strategy, secrets)
        rows += [torch.cat([part.flatten() for part in release(noise, shapes)]) for _ in range(first, last)]
        assert noise.position == last
        if first != last:
            states.append(noise)
    check_law(torch.stack(rows).double().numpy(), strategy, 1.0)
    before, after = states[1], CorrelatedNoise(strategy, [*secrets[:-1], secret(5, 9)])
    with after.release():
        for index, shape in enumerate(shapes):
            again = after._earlier(Place(index, 0, math.prod(shape)), torch.zeros(shape))
            kept = list(zip(before._tensors[index]._kept, again._kept, strict=True))
            assert all(a.equal(b) for a, b in kept) and len(kept) == min(5, strategy.memory)
            after.add_(torch.zeros(shape), 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_does_not_depend_on_the_shards(dtype: torch.dtype) -> None:
    """Two parameters of several blocks: whole, and cut at places that no block ends at, resumed with other cuts."""
    sizes = [2 * BLOCK_ON_HOST + 100, 3 * BLOCK_ON_HOST]
    cuts = {
        3: [[0, 5, BLOCK_ON_HOST - 1, 2 * BLOCK_ON_HOST + 3], [0, 0, BLOCK_ON_HOST + 1, 3 * BLOCK_ON_HOST]],
        STEPS: [[0, 2 * BLOCK_ON_HOST], [0, BLOCK_ON_HOST, BLOCK_ON_HOST + 7]],
    }
    strategy, secrets, first = STRATEGIES[0], [secret(0)], 0
    whole = CorrelatedNoise(strategy, secrets)
    for last, starts in cuts.items():
        owners = [CorrelatedNoise(strategy, secrets) for _ in range(max(map(len, starts)))]
        if first:
            whole = CorrelatedNoise(strategy, secrets)
        for _ in range(first, last):
            with whole.release():
                expected = [whole.add_(torch.zeros(size, dtype=dtype), 0.5) for size in sizes]
            found = [torch.zeros(size, dtype=dtype) for size in sizes]
            for rank, owner in enumerate(owners):
                with owner.release():
                    for number, bounds in enumerate(starts):
                        if rank < len(bounds):
                            begin, end = [*bounds, sizes[number]][rank : rank + 2]
                            owner.add_(found[number][begin:end], 0.5, Place(number, begin, sizes[number]))
            assert all(a.equal(b) and (a != 0).all() for a, b in zip(found, expected, strict=True))
        secrets, first = [*secrets, secret(last)], last


def test_a_child_that_was_forked_does_not_repeat_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = CorrelatedNoise(STRATEGIES[0], [secret(0)])
    monkeypatch.setattr(noise, "_pid", os.getpid() + 1)
    with pytest.raises(RuntimeError, match="would repeat its draws"), noise.release():
        noise.add_(torch.zeros(2), 1.0)


@strategies
def test_what_a_resume_without_the_earlier_noise_would_break_is_seen(strategy: Strategy) -> None:
    """The plant: new noise after step 5 is uncorrelated with the old."""
    if len(strategy.weights) == 1:
        pytest.skip("independent noise keeps nothing")
    parts = [CorrelatedNoise(strategy, [secret(0)]), CorrelatedNoise(strategy, [secret(0, 1)])]
    rows = [release(parts[step >= 5], [(50_000,)])[0] for step in range(STEPS)]
    with pytest.raises(AssertionError):
        check_law(torch.stack(rows).double().numpy(), strategy, 1.0)


def test_a_start_never_repeats_the_noise_of_another() -> None:
    """Even where ledger and secrets were put back to an earlier copy: its own secret is new."""
    drawn = [
        release(CorrelatedNoise(STRATEGIES[0], [secret(0), NoiseSecret(1, os.urandom(32))]), [(4,)])[0]
        for _ in range(2)
    ]
    assert not drawn[0].equal(drawn[1])


def test_steps_are_kept_apart_and_complete() -> None:
    strategy = STRATEGIES[0]
    noise = CorrelatedNoise(strategy, [secret(0)])
    with pytest.raises(WrapError, match="within a release only"):
        noise.add_(torch.zeros(2), 1.0)
    release(noise, [(2,), (3,)])
    for wrong in ([(2,)], [(2,), (3,), (4,)], [(3,), (2,)]):
        other = CorrelatedNoise(strategy, [secret(0)])
        release(other, [(2,), (3,)])
        with pytest.raises(WrapError, match=r"at the first release"):
            release(other, wrong)
        with pytest.raises(WrapError, match="was not finished"):
            release(other, [(2,), (3,)])
    noise = CorrelatedNoise(strategy, [secret(0)])
    with pytest.raises(ValueError, match="expected a finite number >= 0"), noise.release():
        noise.add_(torch.zeros(2), -1.0)
    noise = CorrelatedNoise(strategy, [secret(0)], torch.device("meta"))
    with pytest.raises(WrapError, match="drawn on cpu, and the file of secrets says meta"), noise.release():
        noise.add_(torch.zeros(2), 1.0)
    noise = CorrelatedNoise(strategy, [secret(0)])
    with pytest.raises(ValueError, match="which would round it"), noise.release():
        noise.add_(torch.zeros(2, dtype=torch.bfloat16), 1.0)
    for copier in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied"):
            copier(noise)
    whole = CorrelatedNoise(strategy, [secret(0)])
    for _ in range(STEPS):
        release(whole, [(1,)])
    with pytest.raises(WrapError, match="step 10 of correlated noise that was made for 9"):
        release(whole, [(1,)])


def test_float64_and_views() -> None:
    noise, same = (CorrelatedNoise(STRATEGIES[1], [secret(0)]) for _ in range(2))
    for _ in range(2):
        wide, whole = torch.zeros(6, dtype=torch.float64), torch.zeros(2, 6)
        with noise.release():
            noise.add_(wide, 1.0)
            noise.add_(whole[:, ::2], 1.0)
            assert noise.add_(wide, 0.0) is wide
        parts = release(same, [(6,), (2, 3)])
        assert wide.dtype == torch.float64 and (wide != 0).all()
        assert whole[:, ::2].equal(parts[1]) and not whole[:, 1::2].any()


@strategies
def test_optimizer_releases_the_sum_with_the_noise_of_the_step(strategy: Strategy) -> None:
    """(sum + sigma C scale C^{-1} z) / b, for each parameter, also where nothing was drawn."""
    p, q = nn.Parameter(torch.zeros(20_000)), nn.Parameter(torch.zeros(100, 200, dtype=torch.bfloat16))
    noise = CorrelatedNoise(strategy, [secret(0)])
    optimizer = dpft.DPOptimizer(torch.optim.SGD([p, q], lr=0.0), 2.0, 0.5, 4.0, noise=noise)
    rows = []
    for step in range(STEPS):
        if step % 3:
            p.grad = torch.full_like(p, 8.0)
        optimizer.step()
        assert p.grad is not None and q.grad is not None and q.grad.dtype == torch.bfloat16
        rows.append(p.grad.double() * 4 - (8 if step % 3 else 0))
        optimizer.zero_grad()
    check_law(torch.stack(rows).numpy(), strategy, 2.0 * 0.5)
    assert "noise" not in str(optimizer.state_dict())


# ------------------------------------------------------------------------------------------- the file of secrets
ENVIRONMENT = {"the device": "cpu", "numpy": "1"}
BLT = STRATEGIES[1]


def start(ledger: Path, count: int, **changes: Any) -> tuple[NoiseSecret, ...]:
    options: dict[str, Any] = {"run_id": "a", "strategy": BLT, "environment": ENVIRONMENT, "starts": [], **changes}
    return begin(ledger, count=count, secret=f"secret {count}".encode(), **options)


def test_secrets_are_written_for_the_owner_alone_and_read_again(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    umask = os.umask(0)
    try:
        assert start(ledger, 0) == (secret_of(0),)
    finally:
        os.umask(umask)
    path = secrets_path(ledger)
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    assert start(ledger, 3) == (secret_of(0), secret_of(3))
    assert path.stat().st_mode & 0o777 == 0o600
    assert start(ledger, 3) == (secret_of(0), secret_of(3), secret_of(3))
    assert b"secret".hex() not in repr(secret_of(0)) and "secret 0" not in repr(secret_of(0))


def secret_of(count: int) -> NoiseSecret:
    return NoiseSecret(count, f"secret {count}".encode())


def test_without_a_release_an_earlier_start_is_forgotten(tmp_path: Path) -> None:
    start(tmp_path / "ledger", 0, run_id="another")
    assert start(tmp_path / "ledger", 0) == (secret_of(0),)
    assert start(tmp_path / "ledger", 2) == (secret_of(0), secret_of(2))


def test_a_line_that_a_crash_cut_is_dropped_and_any_other_damage_refused(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    start(ledger, 0)
    whole = secrets_path(ledger).read_bytes()
    start(ledger, 3)
    longer = secrets_path(ledger).read_bytes()
    for end in range(len(whole), len(longer)):
        secrets_path(ledger).write_bytes(longer[:end])
        assert start(ledger, 3) == (secret_of(0), secret_of(3))
    header = whole.index(b"\n") + 1
    for end in (0, 5, header - 1, header, len(whole) - 1):
        secrets_path(ledger).write_bytes(whole[:end])
        with pytest.raises(LedgerError, match=r"damaged|do not fit"):
            start(ledger, 3)
    for place in range(0, len(longer), 7):
        changed = bytearray(longer)
        changed[place] ^= 1
        secrets_path(ledger).write_bytes(changed)
        with pytest.raises(LedgerError, match="damaged"):
            start(ledger, 3)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"run_id": "b"}, "have run_id 'a', and this run has 'b'"),
        ({"strategy": STRATEGIES[0]}, "have strategy"),
        ({"environment": {**ENVIRONMENT, "numpy": "2"}}, "numpy was '1' when the run began and is '2'"),
        ({"environment": {"the device": "cpu"}}, "numpy was '1' when the run began and is None"),
        ({"count": 2}, "do not fit the ledger: starts at .0, 3. releases, and the ledger counts 2"),
        # A copy from before the second start: its noise would be drawn from the first one's secret.
        ({"starts": [0, 2]}, "starts at .0, 3. releases, and the ledger has others at .2."),
    ],
    ids=str,
)
def test_secrets_of_another_run(changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    start(tmp_path / "ledger", 0)
    start(tmp_path / "ledger", 3)
    with pytest.raises(LedgerError, match=match):
        start(tmp_path / "ledger", **{"count": 4, **changes})


def test_a_run_without_its_secrets_ends(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="the ledger counts 3 releases, and later steps take back a part"):
        start(tmp_path / "ledger", 3)
    (tmp_path / "_ledger.noise").mkdir()
    with pytest.raises(LedgerError, match="cannot open"):
        start(tmp_path / "ledger", 3)
