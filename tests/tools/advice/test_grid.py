"""The grid of trainings is continued where its file ends, and a training reports what it was."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from typing import Any

import pytest

from tools.advice.command import left
from tools.advice.grids import curve, settings
from tools.advice.training import Setting, train


def test_what_is_left_counts_repetitions() -> None:
    tried = settings()
    assert max(Counter(tried).values()) == 2
    done: list[dict[str, Any]] = [{**asdict(setting), "loss_after": 4.0} for setting in tried[:5]]
    assert len(left(tried, done)) == len(tried) - 5
    assert Counter(left(tried, [])) == Counter(tried)
    twice = next(setting for setting, times in Counter(tried).items() if times == 2)
    assert left(tried, [asdict(twice)]).count(twice) == 1


def test_the_curve_varies_epsilon_alone() -> None:
    points = curve()
    assert len({point.epsilon for point in points}) == len(points) >= 3
    assert len({replace(point, epsilon=1.0) for point in points}) == 1


@pytest.mark.slow
def test_a_training_spends_its_epsilon_and_learns() -> None:
    found = train(Setting(8.0, 128, 3, 5e-3), 8)
    assert 7.9 < found["epsilon_spent"] <= 8
    assert found["noise_multiplier"] > 0.3 and found["examples"] > 1000
    assert found["loss_after"] < found["loss_before"]
    assert found["clipped"] == [1.0, 1.0] and min(found["median_norm"]) > 1
