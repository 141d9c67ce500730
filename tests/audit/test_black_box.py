"""The black-box audit: of scores with a known leak, and its canaries."""

from __future__ import annotations

import json
import secrets
from pathlib import Path

import numpy as np
import pytest

from dpft.audit import BlackBoxAudit, Canaries, black_box, draw_canaries, plot


def attacked(shift: float, claimed: float | None = 1.0, count: int = 2000, seed: int = 0) -> BlackBoxAudit:
    """Losses of members that fall by ``shift`` deviations more than those of others."""
    rng = np.random.default_rng(seed)
    coins = rng.random(count) < 0.5
    before = rng.normal(10, 3, count)
    after = before - rng.normal(size=count) - shift * coins
    return black_box(before, after, coins, claimed_epsilon=claimed, delta=1e-6)


def test_what_leaks_is_found_and_what_does_not_is_not() -> None:
    for seed in range(20):
        assert attacked(0.0, seed=seed).epsilon_lower < 0.5
    leaking = attacked(4.0)
    assert leaking.epsilon_lower > 3 and leaking.violated
    assert not attacked(4.0, claimed=8.0).violated
    assert "refuted" in leaking.statement and "2000 random canaries" in leaking.statement
    assert "no finite epsilon" in attacked(4.0, claimed=None).statement


def test_bound_is_below_the_truth_of_randomised_response(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each canary's score is its coin with probability e^eps / (1 + e^eps): exactly (eps, 0)-DP.

    Equal scores are ordered by chance, which is fixed here: up to 5 in 100 may be above, and 6 were once.
    """
    above = 0
    for seed in range(100):
        monkeypatch.setattr(secrets, "randbits", lambda bits, seed=seed: seed)
        rng = np.random.default_rng(seed)
        coins = rng.random(1000) < 0.5
        scores = np.where(rng.random(1000) < 1 / (1 + np.exp(-1.0)), coins, ~coins).astype(float)
        above += black_box(scores, np.zeros(1000), coins, claimed_epsilon=1.0, delta=0.0).epsilon_lower > 1.0
    assert above <= 5


def test_order_of_the_canaries_is_no_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal scores, members first: nothing may be proven from the order.

    The order of equal scores is by chance, which is fixed here: at 95 % confidence, chance alone proves a little in
    up to 5 of 100 audits. Guessing in the order of the canaries would prove more than 3 in every one.
    """
    coins = [True] * 500 + [False] * 500
    above = 0
    for seed in range(100):
        monkeypatch.setattr(secrets, "randbits", lambda bits, seed=seed: seed)
        proven = black_box([1.0] * 1000, [1.0] * 1000, coins, claimed_epsilon=1.0, delta=1e-6).epsilon_lower
        assert proven < 0.5
        above += proven > 0
    assert above <= 5


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="expected one of each"):
        black_box([1.0], [1.0, 2.0], [True], claimed_epsilon=1.0, delta=1e-6)


def test_canaries_are_random_and_survive_a_file() -> None:
    canaries = draw_canaries(400, tokens=8, vocabulary=50)
    assert {len(record) for record in canaries.records} == {8}
    assert {token for record in canaries.records for token in record} <= set(range(50))
    assert 120 < sum(canaries.coins) == len(canaries.included) < 280
    assert Canaries.from_dict(json.loads(json.dumps(canaries.to_dict()))) == canaries
    assert draw_canaries(4, tokens=8, vocabulary=50) != draw_canaries(4, tokens=8, vocabulary=50)
    with pytest.raises(ValueError, match="expected at least"):
        draw_canaries(0, tokens=8, vocabulary=50)


def test_picture(tmp_path: Path) -> None:
    plot(attacked(1.0), tmp_path / "audit.png")
    assert (tmp_path / "audit.png").read_bytes().startswith(b"\x89PNG")
