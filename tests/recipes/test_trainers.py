"""The recipes on Trainer and TRL: what they leave, what they refuse; and the small encoder that is kept with them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

import dpft
from finetune.data.labelled import ENCODER
from tests.engines.launching import ROOT, environment
from tools.base_model.encoder import masked


def run(recipe: str, tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "recipes" / recipe), "--output_dir", str(tmp_path / "out"), *words]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment(tmp_path), timeout=240, cwd=tmp_path
    )


def results(tmp_path: Path) -> list[dict[str, Any]]:
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert "covered by no epsilon" in content["note"]
    found: list[dict[str, Any]] = content["results"]
    return found


@pytest.mark.slow
def test_sft(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    records = [{"prompt": f"Name a number after {i}.", "completion": f" {i + 1}."} for i in range(40)]
    (tmp_path / "records.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    words = ["--dataset", "records.jsonl", "--max_steps", "2", "--expected_batch_size", "8"]
    paid = dpft.Account.create(tmp_path / "account.jsonl", epsilon=100.0, delta=1e-5, composition="pld")
    words += ["--account", str(paid.path)]
    done = run("trainer_sft.py", tmp_path, *words, "--noise_multiplier", "1.0", "--max_length", "32")
    assert done.returncode == 0, done.stderr[-3000:]
    (entry,) = paid.entries()
    assert not entry.open and [count for _, count in entry.uses] == [2]
    assert len(results(tmp_path)) == 3 and results(tmp_path)[1]["epsilon"] > 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    refused = run("trainer_sft.py", tmp_path, *words, "--mechanism", "blt")
    assert refused.returncode == 2 and "give buffers exactly with" in refused.stderr.splitlines()[-1]
    refused = run("trainer_sft.py", tmp_path, *words, "--noise_multiplier", "1.0", "--target_epsilon", "3")
    assert refused.returncode == 2 and "give exactly one of them" in refused.stderr.splitlines()[-1]
    refused = run("trainer_sft.py", tmp_path, *words, "--packing", "true")
    assert refused.returncode == 2 and "packing=True" in refused.stderr.splitlines()[-1]


def test_the_encoder_is_small_described_and_better_than_chance() -> None:
    assert sum(path.stat().st_size for path in ENCODER.iterdir()) <= 4 * 2**20
    assert "held-out loss after training" in (ENCODER / "README.md").read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(ENCODER)
    model = AutoModelForMaskedLM.from_pretrained(ENCODER).eval()
    text = "The statement is used to define a function. The value of the expression is assigned to the object."
    ids = torch.tensor([tokenizer(text)["input_ids"]] * 16)
    inputs, labels = masked(ids, tokenizer.mask_token_id, len(tokenizer), torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = float(model(input_ids=inputs, labels=labels).loss)
    assert loss < 0.8 * math.log(model.config.vocab_size)
