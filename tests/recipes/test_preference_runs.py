"""preference_dp.py from end to end, as a launcher starts it: two processes, adapters, a resumed run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.engines.launching import ROOT, launch, succeed

RECIPE = ROOT / "tests" / "engines" / "recipe_on_cpu.py"
SMALL = ["--seq-len", "24", "--expected-batch-size", "24", "--num-steps", "4", "--max-eval-examples", "10"]
SMALL += ["--sample-tokens", "0", "--max-physical-batch-size", "4", "--learning-rate", "0.01", "--eval-every", "2"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of ninety pairs, with which lengths differ."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [
        {"prompt": f"Return {n}", "chosen": " or None" * (1 + n % 4), "rejected": " and raise" * (1 + n % 3)}
        for n in range(90)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def evaluations(output: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "validation_loss" in row]


def check(output: Path) -> None:
    """The start model's margins are 0, the trained one's are not; that the model reloads, the recipe has checked."""
    first, *_, last = evaluations(output)
    assert first["validation_loss"] == pytest.approx(math.log(2), abs=1e-6) and first["validation_accuracy"] == 0.5
    assert last["validation_accuracy"] > 0.5 and last["validation_margin"] > 0.01
    releases = [json.loads(line) for line in (output / "ledger.jsonl").read_text().splitlines()]
    assert sum("release" in line for line in releases) == 4
    card = (output / "README.md").read_text()
    assert "one preference pair is one example" in card and "validation accuracy after" in card
    AutoModelForCausalLM.from_pretrained(output)


@pytest.mark.slow
def test_ddp_with_adapters(pairs: str, tmp_path: Path) -> None:
    output = tmp_path / "run"
    words = ["--dataset", pairs, "--output-dir", str(output), *SMALL, "--lora-r", "4", "--loss-type", "ipo"]
    words += ["--checkpoint-every", "0", "--beta", "0.5", "--sft-weight", "0.1"]
    ended = launch("ddp", RECIPE, "--recipe", "preference_dp", *words, scratch=tmp_path)
    succeed(ended)
    first, *_, last = evaluations(output)
    assert first["validation_accuracy"] == 0.5 and last["validation_margin"] != 0
    assert (output / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_fsdp2_is_resumed_with_the_start_models_log_probabilities(pairs: str, tmp_path: Path) -> None:
    """Those of the weights of the checkpoint would make all margins 0 again."""
    output = tmp_path / "run"
    words = ["--recipe", "preference_dp", "--dataset", pairs, "--output-dir", str(output), *SMALL]
    succeed(launch("fsdp2", RECIPE, *words, "--checkpoint-every", "4", scratch=tmp_path, timeout=140))
    check(output)
    before = evaluations(output)[-1]
    again = launch("fsdp2", RECIPE, *words, "--resume-from-checkpoint", scratch=tmp_path, timeout=140)
    assert "resumed: weights of step 4, 4 steps released by the ledger" in succeed(again)
    after = evaluations(output)[-1]
    for name in ("loss", "margin", "accuracy", "likelier"):
        assert after[f"validation_{name}"] == pytest.approx(before[f"validation_{name}"], abs=1e-5)
    check(output)
