"""The advice for a terminal and as a picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import dpft
from finetune.advice import lines, picture


def setting(batch: int, steps: int, share: float) -> Any:
    """Of the class of ``dpft.advise``'s settings, made up."""
    kind = get_type_hints(dpft.Advice)["setting"]
    return kind(batch, steps, 0.8, 8.0, batch / 512, batch * steps / 512, 0.8 / batch, 3.0, 9e2, share, 64, 1e9, None)


@pytest.fixture
def advice() -> dpft.Advice:
    chosen = setting(32, 40, 0.6)
    words = "These are the words that give a reason in a line that is longer than what a terminal shows in one line: "
    return dpft.Advice(
        examples=512,
        target_epsilon=8.0,
        target_delta=1e-6,
        tokens=64,
        parameters=403_104,
        trainable=403_104,
        method="full",
        clip_norm=1.0,
        learning_rate=5e-3,
        setting=chosen,
        alternatives={"twice the batch": setting(64, 40, 0.8)},
        grid=[chosen, setting(64, 40, 0.8), setting(32, 20, 0.4)],  # a cell is missing
        reasons={n: words + n for n in ("batch", "steps", "clip_norm", "learning_rate", "method")},
        notes=["a note"],
    )


def test_lines_are_options_with_reasons_and_costs(advice: dpft.Advice) -> None:
    found = lines(advice)
    text = "\n".join(found)
    for option in (
        f"--expected-batch-size {advice.batch}",
        f"--num-steps {advice.steps}",
        f"--max-grad-norm {advice.clip_norm:g}",
        f"--learning-rate {advice.learning_rate:g}",
    ):
        assert option in text
    assert max(map(len, found)) <= 119
    assert "twice the batch" in text and advice.table() in text
    assert all(note in text for note in advice.notes)
    for reason in advice.reasons.values():
        assert reason in " ".join(text.split())


def test_a_picture_needs_a_grid(advice: dpft.Advice, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="grid=True"):
        picture(replace(advice, grid=[]), tmp_path / "x.png")


def test_the_picture_is_of_the_grid(advice: dpft.Advice, tmp_path: Path) -> None:
    picture(advice, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
