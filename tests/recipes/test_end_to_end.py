"""The recipe itself: launched as a person launches it, killed, interrupted, resumed, and asked for what cannot be."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from transformers import AutoModelForCausalLM, AutoTokenizer

import llama_dp
from finetune import loop
from finetune.recipe import Recipe
from finetune.run import main as run
from tests.fixed_draws import fixed_draws

ROOT = Path(__file__).resolve().parents[2]
# One thread: this process may have imported torch without what finetune.environment sets before it.
SMALL = ["--expected-batch-size", "12", "--max-eval-examples", "8", "--sample-tokens", "4", "--seq-len", "48"]
SMALL += ["--cpu-threads", "1"]


def releases(folder: Path) -> int:
    lines = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    return sum("release" in line for line in lines)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_launched_demonstration_leaves_everything(tmp_path: Path) -> None:
    output = tmp_path / "run"
    words = [str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file", "accelerate_config.yaml"]
    words += ["recipes/llama_dp.py", "--output_dir", str(output), "--num-steps", "4", "--eval-every", "2", *SMALL]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    ended = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr[-3000:]
    for part in ("validation loss before: ", "validation loss after: ", "sample after: ", "epsilon "):
        assert part in ended.stdout
    for part in ("private: 100%", " of 8, ", "tokens/s", "% clipped"):
        assert part in ended.stderr

    model = AutoModelForCausalLM.from_pretrained(output)
    ids = AutoTokenizer.from_pretrained(output)("Return the", return_tensors="pt")["input_ids"]
    assert model(ids).logits.isfinite().all()
    assert releases(output) == 4
    note, *rows = metrics(output)
    assert "Not for publication" in note["note"]
    assert all(row["private"] is True for row in rows)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    spent = [row["epsilon"] for row in steps]
    assert spent == sorted(spent) and 0 < spent[-1] <= 8
    assert [row["step"] for row in rows if "validation_loss" in row] == [0, 2, 4]
    card = (output / "README.md").read_text()
    for part in (
        "## Privacy statement",
        "differential privacy, where neighbouring",
        "| Steps released / planned | 4 / 4 |",
        "chosen by the validation loss",
        "does **not** cover `metrics.jsonl`",
        "## Samples",
        "num_steps: 4",
        "one record is one example",
    ):
        assert part in card
    assert str(tmp_path) not in card
    height, width = imread(output / "training.png").shape[:2]
    assert height > 400 and width > 800
    assert [p.name for p in (output / "checkpoints").iterdir()] == ["step_4"]


@pytest.mark.slow
def test_a_killed_run_is_resumed_and_counts_what_it_spent(tmp_path: Path, records: str) -> None:
    """SIGKILL, at a moment that is not chosen; the checkpoint may be behind the ledger, which stands."""
    output, planned = tmp_path / "run", 40  # it must not be over before a busy machine comes to kill it
    words = ["--dataset", records, "--output-dir", str(output), "--num-steps", str(planned), "--eval-every", "0"]
    words += [*SMALL, "--checkpoint-every", "3"]
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen([sys.executable, "recipes/llama_dp.py", *words], cwd=ROOT, stdout=log, stderr=log)
    until = time.monotonic() + 120
    while not any((output / "checkpoints").glob("step_*")) and time.monotonic() < until and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    assert process.wait(30) == -signal.SIGKILL, (tmp_path / "log").read_text()[-3000:]
    spent = releases(output)
    assert 3 <= spent < planned

    with pytest.raises(SystemExit) as stop:  # the same command again, without saying that it is to go on
        llama_dp.main(words)
    assert stop.value.code == 2
    assert llama_dp.main([*words, "--resume-from-checkpoint"]) == 0
    assert releases(output) == planned
    resumed = next(row for row in metrics(output) if "resumed_from_step" in row)
    assert resumed["step"] == spent and resumed["resumed_from_step"] <= spent
    after = metrics(output)[metrics(output).index(resumed) + 1 :]
    assert [row["step"] for row in after if "loss" in row] == list(range(spent + 1, planned + 1))
    assert max(row["epsilon"] for row in after if "epsilon" in row) <= 8
    assert f"| Steps released / planned | {planned} / {planned} |" in (output / "README.md").read_text()
    assert len(list((output / "checkpoints").iterdir())) <= 2


def test_ctrl_c_ends_after_the_logical_batch_and_can_be_resumed(
    tmp_path: Path, records: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add = loop.History.add

    def press(history: loop.History, row: dict[str, Any]) -> None:
        add(history, row)
        if row["step"] == 2 and "loss" in row:
            os.kill(os.getpid(), signal.SIGINT)

    words = ["--dataset", records, "--output-dir", str(tmp_path), "--num-steps", "5", *SMALL]
    with monkeypatch.context() as patch:
        patch.setattr(loop.History, "add", press)
        assert llama_dp.main(words) == 130
    told = capsys.readouterr().out
    assert "interrupted after step 3 of 5, epsilon" in told and "--resume-from-checkpoint" in told
    assert releases(tmp_path) == 3
    gc.collect()  # the ledger's lock ends with the process, or with the objects of the first run
    assert llama_dp.main([*words, "--resume-from-checkpoint"]) == 0
    assert releases(tmp_path) == 5
    assert "resumed: weights of step 3, 3 steps released" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--clipping", "none"], ["--noise-multiplier", "0", "--compare-nonprivate"]])
def test_what_is_not_private_says_so_everywhere(
    words: list[str], tmp_path: Path, records: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*SMALL, *words]
    assert llama_dp.main(["--dataset", records, "--output-dir", str(tmp_path), "--num-steps", "2", *words]) == 0
    told = capsys.readouterr()
    assert "NOT PRIVATE" in told.out and "NOT PRIVATE: 100%" in told.err and "epsilon infinite" in told.err
    card = (tmp_path / "README.md").read_text()
    assert "WITHOUT PRIVACY" in card and "**NOT PRIVATE:" in card and "Treat the weights" in card
    assert "does **not** cover" not in card and "differential-privacy" not in card
    rows = metrics(tmp_path)
    assert "NOT PRIVATE" in rows[0]["note"]
    assert all(row["private"] is False and row.get("epsilon") is None for row in rows)
    assert any("nonprivate_validation_loss" in row for row in rows) is ("--compare-nonprivate" in words)


@pytest.mark.parametrize(
    "words", [["--bf16", "--gradient-checkpointing"], ["--lora-r", "2"]], ids=["bf16, checkpointing", "lora"]
)
def test_ways_to_train(words: list[str], tmp_path: Path, records: str) -> None:
    words = [*SMALL, *words]
    assert llama_dp.main(["--dataset", records, "--output-dir", str(tmp_path), "--num-steps", "2", *words]) == 0
    assert releases(tmp_path) == 2
    assert AutoModelForCausalLM.from_pretrained(tmp_path)
    rounded = [row["unchanged_share"] for row in metrics(tmp_path) if "unchanged_share" in row]
    if "--bf16" in words:
        assert rounded[0] is None and 0 < rounded[1] < 0.5  # at this learning rate few updates are lost
    else:
        assert not rounded


@pytest.mark.slow
def test_a_warning_is_written_and_said(tmp_path: Path, records: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--dataset", records, "--output-dir", str(tmp_path), "--num-steps", "3", "--learning-rate", "0", *SMALL]
    assert llama_dp.main(words) == 0
    (row,) = [row for row in metrics(tmp_path) if "warning" in row]
    assert row["step"] == 2 and "learning rate is 0" in row["warning"] and row["not_for_publication"] is False
    assert f"warning: {row['warning']}" in "".join(capsys.readouterr())


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(
    tmp_path: Path, records: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert llama_dp.main(["--dry-run", "--dataset", records, *SMALL]) == 0
    told = capsys.readouterr().out
    for part in ("noise multiplier", "epsilon", "24 steps", "logical batch", "one_pass", "32 x 48"):
        assert part in told
    for part in ("1 x 48 tokens", "linear 96 -> 256", "MiB held", "nothing was written"):
        assert part in told
    for strategy in ("without privacy", "one_pass", "two_pass"):
        assert re.search(rf"{strategy} +[\d.e-]+ s +[\d,.]+ MiB", told), strategy
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset", "absent.jsonl"], "no such file"),
        (["--lr-scheduler-type", "nosuch"], "nosuch"),
        (["--expected-batch-size", "5000"], "5000"),
        (["--target-delta", "2"], "target_delta"),
        (["--seq-len", "4096"], "1024 positions"),
        (["--text-column", "id"], "holds int"),
        (["--resume-from-checkpoint"], "no checkpoint"),
        (["--dry-run", "--clipping", "none", "--noise-multiplier", "1"], "bounds nothing"),
        (["--clipping", "ghost", "--strategy", "one_pass"], "by definition"),
        (["--with-tracking"], "pip install"),
        (["--report-to", "wandb"], "pip install wandb"),
        (["--report-to", "none,nosuch"], "'none'; expected none, all, or of"),
        (["--attn-implementation", "flash_attention_2"], "FlashAttention2"),
        (["--optim", "adamw_8bit"], "bitsandbytes"),
        (["--push-to-hub", "me/model"], "not logged in"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_ends_with_one_line_and_status_2(
    words: list[str],
    message: str,
    tmp_path: Path,
    records: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("finetune.engine.get_available_trackers", lambda: [])
    monkeypatch.setattr("finetune.publish.get_token", lambda: None)
    monkeypatch.setattr("transformers.trainer_optimizer.is_bitsandbytes_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        llama_dp.main([*SMALL, "--dataset", records, "--output-dir", str(tmp_path / "run"), *words])
    assert stop.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("llama_dp.py: error:") and message in last


def test_a_folder_of_somebody_is_not_written_into(
    tmp_path: Path, records: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        llama_dp.main([*SMALL, "--dataset", records, "--output-dir", str(tmp_path), "--overwrite-output-dir"])
    assert stop.value.code == 2 and "no ledger of a run" in capsys.readouterr().err
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("README.md", "mine")]


def test_starting_anew_keeps_the_ledger_of_what_was_spent(tmp_path: Path, records: str) -> None:
    words = [*SMALL, "--dataset", records, "--output-dir", str(tmp_path), "--num-steps", "1"]
    assert llama_dp.main(words) == 0
    gc.collect()
    assert llama_dp.main([*words, "--overwrite-output-dir"]) == 0
    assert releases(tmp_path) == 1
    assert sum("release" in json.loads(line) for line in (tmp_path / "earlier-1-ledger.jsonl").open()) == 1


@pytest.mark.slow
def test_the_best_weights_are_exported_also_of_a_run_that_was_resumed(
    tmp_path: Path, records: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Evaluations are numbered; the fourth of them, after step 2, is the best."""
    seen: dict[float, torch.Tensor] = {}
    losses = iter([9.0, 8.0, 1.0, 7.0, 6.0, 5.0, 1.0])  # before; steps 1 to 4; at the end; of what is put back

    class Scripted(Recipe):
        def measure(self, model: Any, materials: Any, accelerator: Any = None) -> dict[str, float]:
            loss = next(losses)
            seen.setdefault(loss, model.state_dict()["lm_head.weight"].clone())
            return {"loss": loss}

    add = loop.History.add

    def press(history: loop.History, row: dict[str, Any]) -> None:
        add(history, row)
        if row["step"] == 3 and "loss" in row:
            os.kill(os.getpid(), signal.SIGINT)

    words = ["--dataset", records, "--output-dir", str(tmp_path), "--num-steps", "5", "--save-best", *SMALL]
    words += ["--eval-every", "1", "--no-reload-check"]
    with monkeypatch.context() as patch:
        patch.setattr(loop.History, "add", press)
        assert run(Scripted(), "", words) == 130
    gc.collect()
    assert run(Scripted(), "", [*words, "--resume-from-checkpoint"]) == 0
    assert "the best weights are those of step 2; they are exported" in capsys.readouterr().out
    exported = AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight
    assert torch.equal(exported, seen[1.0]) and not torch.equal(exported, seen[5.0])
    card = (tmp_path / "README.md").read_text()
    assert "those of step 2, chosen by the lowest validation loss" in card and "that of all 5 steps" in card
    assert "| Steps released / planned | 5 / 5 |" in card and "| validation loss after, nats a token | 1 |" in card


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["adafactor", "sgd", "adamw_torch_fused"])
def test_optimisers(optim: str, tmp_path: Path, records: str) -> None:
    words = [*SMALL, "--optim", optim, "--attn-implementation", "eager", "--torch-dtype", "bfloat16"]
    words += ["--learning-rate", "0.1", "--dataset", records, "--output-dir", str(tmp_path), "--num-steps", "2"]
    assert llama_dp.main(words) == 0
    assert releases(tmp_path) == 2
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


@pytest.mark.slow
def test_adamw_corrected_for_the_noise(tmp_path: Path, records: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SMALL, "--optim", "adamw_bc", "--dataset", records, "--num-steps", "2"]
    assert llama_dp.main([*words, "--output-dir", str(tmp_path / "run"), "--compare-nonprivate"]) == 0
    assert releases(tmp_path / "run") == 2 and "optim: adamw_bc" in (tmp_path / "run" / "README.md").read_text()
    with pytest.raises(SystemExit) as stop:
        llama_dp.main([*words, "--output-dir", str(tmp_path / "other"), "--bf16"])
    assert stop.value.code == 2 and "torch.bfloat16, in which the second moment" in capsys.readouterr().err


@pytest.mark.slow
def test_an_audited_run_says_so(tmp_path: Path, records: str) -> None:
    """Without noise and with a large step the canaries are learnt; the card has what that proves, and what it took.

    Which canaries are put in and drawn is fixed: what sixty of them prove depends on it.
    """
    output = tmp_path / "run"
    words = ["--dataset", records, "--output-dir", str(output), "--num-steps", "6", "--audit", "60", *SMALL]
    words += [
        "--clipping",
        "none",
        "--expected-batch-size",
        "60",
        "--learning-rate",
        "0.01",
        "--checkpoint-every",
        "3",
    ]
    with fixed_draws(0):
        assert llama_dp.main([*words, "--no-reload-check"]) == 0
    found = json.loads((output / "audit.json").read_text())
    assert found["canaries"] == 60 and len(found["members"]) + len(found["others"]) == 60
    assert found["claimed_epsilon"] is None and found["epsilon_lower"] > 0.5
    assert sum(found["members"]) / len(found["members"]) > sum(found["others"]) / len(found["others"])
    coins = json.loads((output / "canaries.json").read_text())["coins"]
    assert len(found["members"]) == sum(coins)
    card = (output / "README.md").read_text()
    for part in (
        "## Audit",
        "60 random canaries",
        "records of random tokens are in the training data, too",
        "audit.png",
    ):
        assert part in card
    assert imread(output / "audit.png").ndim == 3

    # a private run, resumed with the canaries that it began with
    output = tmp_path / "private"
    words[words.index(str(tmp_path / "run"))] = str(output)
    words[words.index("none")] = "flash"
    assert llama_dp.main([*words, "--noise-multiplier", "1.0", "--num-steps", "3", "--no-reload-check"]) == 0
    before = (output / "canaries.json").read_text()
    gc.collect()  # a ledger is open as long as its run is there
    assert llama_dp.main([*words, "--noise-multiplier", "1.0", "--resume-from-checkpoint"]) == 0
    assert (output / "canaries.json").read_text() == before
    assert "claimed: " in (output / "README.md").read_text()
    gc.collect()
    with pytest.raises(SystemExit):
        llama_dp.main([*words, "--noise-multiplier", "1.0", "--resume-from-checkpoint", "--audit", "61"])
