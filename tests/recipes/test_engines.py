"""The recipe under the engines, launched as a person launches it: trained, ended by a fault, resumed, exported."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engines.launching import ROOT, command, environment, launch, succeed

RECIPE = ROOT / "tests" / "engines" / "recipe_on_cpu.py"
SMALL = ["--expected-batch-size", "12", "--max-eval-examples", "8", "--sample-tokens", "2", "--seq-len", "48"]
STEPS = 40  # of the run that is interrupted: it must not be over before
SMALL += ["--max-physical-batch-size", "4", "--checkpoint-every", "2"]


def words_of(records: str, output: Path, *more: str) -> list[str]:
    return ["--dataset", records, "--output-dir", str(output), "--num-steps", "5", *SMALL, *more]


def releases(folder: Path) -> int:
    return sum("release" in json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines())


def whole(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("step_*"))


def check_result(output: Path, dtype: torch.dtype, steps: int = 5) -> None:
    """All that a run leaves is there. That the model's loss is that of the trained one, the recipe has checked."""
    assert releases(output) == steps
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.dtype == dtype
    assert model(torch.arange(8)[None]).logits.isfinite().all()
    assert f"| Steps released / planned | {steps} / {steps} |" in (output / "README.md").read_text()
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert sorted({row["step"] for row in rows if "loss" in row}) == list(range(1, steps + 1))
    assert whole(output)[-1] == f"step_{steps}"


@pytest.mark.slow
def test_fsdp2_lora_a_full_disk_ends_all_ranks_and_the_run_is_resumed(tmp_path: Path, records: str) -> None:
    """Rank 1 cannot write its part of the second checkpoint."""
    output = tmp_path / "run"
    words = words_of(records, output, "--lora-r", "2", "--bf16", "--gradient-checkpointing")
    ended = launch("fsdp2", RECIPE, "--fault", "full:1:4", *words, scratch=tmp_path, timeout=150)
    assert ended.returncode != 0
    assert "the checkpoint of step 4 could not be saved" in ended.stdout and "disk full" in ended.stdout
    assert whole(output) == ["step_2"] and releases(output) == 4
    told = succeed(launch("fsdp2", RECIPE, *words, "--resume-from-checkpoint", scratch=tmp_path, timeout=150))
    assert "resumed: weights of step 2, 4 steps released by the ledger" in told
    check_result(output, torch.float32)
    assert (output / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_zero3_a_rank_that_hangs_ends_the_run_and_one_process_goes_on(tmp_path: Path, records: str) -> None:
    """A limit of seconds, and then DeepSpeed's state in another number of processes."""
    output = tmp_path / "run"
    words = words_of(records, output)
    options = ["--fault", "hang:1:4", *words, "--rank-timeout", "15"]
    ended = launch("zero3", RECIPE, *options, scratch=tmp_path, timeout=150)
    assert ended.returncode != 0 and "hung for longer than --rank-timeout" in ended.stdout
    assert whole(output) == ["step_2"] and releases(output) == 4
    resume = [*words, "--resume-from-checkpoint"]
    told = succeed(launch("zero3", RECIPE, *resume, scratch=tmp_path, processes=1, timeout=150))
    assert "resumed: weights of step 2, 4 steps released by the ledger" in told
    check_result(output, torch.float32)
    assert not list((output / "checkpoints").glob("universal_*"))


@pytest.mark.slow
def test_ddp_is_interrupted_and_resumed_by_one_process(tmp_path: Path, records: str) -> None:
    """SIGINT to the launcher alone, as a terminal's Ctrl-C comes to it: ranks are in sessions of their own."""
    output = tmp_path / "run"
    words = words_of(records, output, "--bf16")
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command("ddp", RECIPE, *words, "--num-steps", str(STEPS)),
            cwd=tmp_path,
            env=environment(tmp_path),
            stdout=log,
            stderr=log,
        )
        until = time.monotonic() + 120
        while not whole(output) and time.monotonic() < until and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        code = process.wait(60)
    told = (tmp_path / "log").read_text()
    assert code != 0 and "interrupted after step" in told, told[-3000:]
    spent = releases(output)
    assert 2 <= spent < STEPS and f"step_{spent}" in whole(output)
    resume = ["--resume-from-checkpoint", "--num-steps", str(STEPS)]
    told = succeed(launch("ddp", RECIPE, *words, *resume, scratch=tmp_path, processes=1, timeout=150))
    assert f"resumed: weights of step {spent}, {spent} steps released" in told
    assert releases(output) == STEPS


@pytest.mark.slow
def test_zero2_lora_in_bfloat16(tmp_path: Path, records: str) -> None:
    output = tmp_path / "run"
    words = words_of(records, output, "--bf16", "--lora-r", "2")
    succeed(launch("zero2", RECIPE, *words, scratch=tmp_path, timeout=150))
    check_result(output, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_the_best_weights_are_put_back_into_every_engine(engine: str, tmp_path: Path, records: str) -> None:
    """At a learning rate that destroys the model more with each step. The recipe reloads what it exports."""
    output = tmp_path / "run"
    words = words_of(records, output, "--num-steps", "4", "--save-best", "--eval-every", "1", "--learning-rate", "3")
    told = succeed(launch(engine, RECIPE, *words, "--lr-scheduler-type", "constant", scratch=tmp_path, timeout=150))
    assert "the best weights are those of step 1;" in told or "the best weights are those of step 2;" in told
    check_result(output, torch.float32, steps=4)
    assert "chosen by the lowest validation loss" in (output / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "more"), [("sp2_fsdp2", ["--gradient-checkpointing"]), ("sp2_zero3", ["--lora-r", "2"])]
)
def test_tokens_spread_over_two_ranks(config: str, more: list[str], tmp_path: Path) -> None:
    """Documents of a folder, each one row, on which long_context is on: exported, reloaded, its loss the same."""
    folder, output = tmp_path / "documents", tmp_path / "run"
    folder.mkdir()
    for number in range(40):
        (folder / f"file{number}.md").write_text(f"Return the value number {number}, " + "or nothing " * (number % 9))
    words = words_of(str(folder), output, "--num-steps", "3", "--expected-batch-size", "4", "--max-eval-examples", "4")
    words += ["--long-context", "--pack", "documents", "--max-tokens-in-memory", "48", *more]
    told = succeed(launch(config, RECIPE, *words, scratch=tmp_path, timeout=200))
    assert "physical batches of one example instead of 4" in told
    check_result(output, torch.float32, steps=3)
    assert "tokens of each record; one record is one example" in (output / "README.md").read_text()
