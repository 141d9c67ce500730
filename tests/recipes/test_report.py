"""The picture, the card, and the checks of the loop that need no training."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch

import dpft
from finetune.loop import History, Interrupt, StaleWeightsError, WeightWatch, describe
from finetune.options import Options
from finetune.recipe import Recipe
from finetune.report import Report, write_report

PLAN = dpft.PrivacyConfig(
    noise_multiplier=1.0, target_delta=1e-6, max_grad_norm=1.0, expected_batch_size=8, num_steps=4
).resolve(100)
ROWS = [
    {"step": 0, "validation_loss": 4.6, "epsilon": 0.0},
    *({"step": n, "loss": 4.6 - n / 10, "epsilon": n**0.5, "clipped_share": 1.0} for n in range(1, 5)),
    {"step": 4, "validation_loss": 4.2, "epsilon": 2.0},
]


@pytest.mark.parametrize("private", [True, False])
def test_the_report_holds_statement_figures_samples_and_picture(private: bool, tmp_path: Path) -> None:
    data = tmp_path / "secret place" / "records.jsonl"
    data.parent.mkdir()
    data.write_text("{}")
    options = Options(dataset=str(data), output_dir=str(tmp_path), num_steps=4)
    report = Report(
        Recipe(),
        options,
        "## Privacy statement\n\nsaid\n",
        {"validation loss after": 4.2, "logical steps": 4},
        {"before": "Return the", "after": "Return the <b>path</b>\nof it"},
        private=private,
    )
    write_report(tmp_path, report, PLAN, ROWS)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    for part in ("## Privacy statement", "ledger.jsonl", "4.2", "> Return the &lt;b>path"):
        assert part in card
    assert ("does **not** cover" in card) is private
    assert ("WITHOUT PRIVACY" in card and "NOT PRIVATE" in card and "not-private" in card) is not private
    assert "secret place" not in card and str(tmp_path) not in card
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_of_nothing_is_drawn_too(tmp_path: Path) -> None:
    write_report(tmp_path, Report(Recipe(), Options(), "", {}, {}, private=True), PLAN, [])
    assert (tmp_path / "training.png").stat().st_size > 1000


def test_history_is_written_as_it_comes_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    history = History(path)
    history.start(private=True)
    for row in ROWS:
        history.add(dict(row))
    note, *rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [row | {"private": True} for row in ROWS]
    assert "without noise" in note["note"]
    path.write_text(path.read_text() + '{"step": 5, "lo')  # killed while writing
    again = History(path)
    again.read()
    assert again.rows == [note, *rows]
    again.add({"step": 6})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()][-2:] == [4, 6]


def test_weights_that_do_not_move_are_noticed() -> None:
    model = torch.nn.Linear(3, 2)
    stale = [torch.nn.Parameter(p.detach().clone()) for p in model.parameters()]
    for parameters, moves in ((stale, False), (list(model.parameters()), True)):
        watch = WeightWatch(model)
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimizer.step()
        if moves:
            watch.check()
        else:
            with pytest.raises(StaleWeightsError, match="moved none of 2"):
                watch.check()


def test_the_first_interrupt_asks_and_the_second_stops() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupt().listening() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_end_of_the_progress_bar() -> None:
    row = {"loss": 4.25, "epsilon": 3.214, "tokens_per_second": 12345.6, "clipped_share": 0.97}
    assert describe(row, 8.0) == "loss 4.250, epsilon 3.21 of 8, 12,346 tokens/s, 97% clipped"
    row = {"loss": None, "epsilon": None, "tokens_per_second": 0.0, "clipped_share": None}
    assert describe(row, 8.0) == "empty batch, epsilon infinite, 0 tokens/s"
