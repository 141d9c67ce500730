"""``synthesize_dp.py`` from end to end, and what it refuses."""

from __future__ import annotations

import gc
import json
import re
from pathlib import Path

import pytest
from datasets import Dataset, load_dataset

import synthesize_dp
from finetune.data.corpora import TROUBLES
from finetune.synthetic import records
from tests.engines.launching import ROOT, launch, succeed

SMALL = ["--num-steps", "2", "--expected-batch-size", "12", "--eval-every", "0", "--max-eval-examples", "8"]
SMALL += ["--seq-len", "48", "--generate", "30", "--max-new-tokens", "12", "--generation-batch-size", "8"]
SMALL += ["--min-chars", "2", "--classifier-steps", "2", "--cpu-threads", "1"]


def numbers(value: object) -> list[float]:
    """Every number in the file of private figures, but the first section's: it counts texts."""
    if isinstance(value, dict):
        return [number for inner in value.values() for number in numbers(inner)]
    if isinstance(value, list):
        return [number for inner in value for number in numbers(inner)]
    return [value] if isinstance(value, float) else []


def private_figures_in(card: str, figures: dict[str, object]) -> list[str]:
    """Figures that a card discloses, rounded in any usual way; those with no digits of their own (0, 0.5, 3) not."""
    found = []
    for number in numbers(figures):
        for words in {f"{number:.3g}", f"{number:.3f}", f"{number:.1%}", repr(number)}:
            if len(words.strip("0.%")) >= 3 and re.search(rf"(?<![\d.]){re.escape(words)}(?!\d)", card):
                found.append(words)
    return found


def check_folder(output: Path, columns: list[str]) -> Dataset:
    """What can be published is there, alone, and nothing in it is a private figure. Returns the data."""
    folder = output / "synthetic"
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "synthetic.parquet"]
    data = load_dataset("parquet", data_files=str(folder / "synthetic.parquet"), split="train")
    assert data.column_names == columns and 0 < len(data) <= 30
    card = (folder / "README.md").read_text()
    figures = json.loads((output / "measures_private.json").read_text())
    assert "Not for publication" in figures["note"]
    assert len(numbers(figures)) > 20 and not private_figures_in(card, figures)
    one = next(number for number in numbers(figures) if len(f"{number:.3g}".strip("0.")) >= 3)
    assert private_figures_in(f"{card}\nsimilarity {one:.3g}", figures)  # a planted one is found
    assert "## Privacy statement" in card and "post-processing" in card and str(output) not in card
    assert not private_figures_in((output / "README.md").read_text(), figures)
    return data


@pytest.mark.slow
def test_one_process_and_two_write_a_folder_that_can_be_published(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"body": f"The {w} number {n} is here.", "kind": w, "tag": n % 2} for n in range(90) for w in ("cat", "dog")
    ]
    (tmp_path / "mails.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--dataset", str(tmp_path / "mails.jsonl"), "--text-column", "body", *SMALL]
    words += ["--condition-on", "kind,tag", "--weights", "cat=3,dog=0", "--noise-multiplier", "0.5"]
    alone = [*words, "--output-dir", str(tmp_path / "one")]
    assert synthesize_dp.main(alone) == 0
    told = capsys.readouterr().out
    assert "becomes public" in told and "Not for publication" in told
    data = check_folder(tmp_path / "one", ["kind", "tag", "body"])
    assert set(data["kind"]) == {"cat"} and set(data["tag"]) == {"0", "1"}
    assert "taken from the private records" in (tmp_path / "one" / "synthetic" / "README.md").read_text()

    # other texts of the same model: no step is taken
    gc.collect()  # the ledger's lock ends with the objects of the first run
    ledger = (tmp_path / "one" / "ledger.jsonl").read_text()
    assert synthesize_dp.main([*alone, "--resume-from-checkpoint", "--weights", "cat=0,dog=1", "--no-measures"]) == 0
    assert set(check_folder(tmp_path / "one", ["kind", "tag", "body"])["kind"]) == {"dog"}
    releases = [line for line in ledger.splitlines() if line.startswith('{"release"')]
    again = (tmp_path / "one" / "ledger.jsonl").read_text().splitlines()
    assert [line for line in again if line.startswith('{"release"')] == releases and len(releases) == 2

    words += ["--values", "kind=cat,dog;tag=0,1", "--output-dir", str(tmp_path / "two")]
    recipe = ROOT / "tests" / "engines" / "recipe_on_cpu.py"
    told = succeed(launch("ddp", recipe, "--recipe", "synthesize_dp", *words, scratch=tmp_path, timeout=280))
    assert "becomes public" not in told
    assert len(check_folder(tmp_path / "two", ["kind", "tag", "body"])) > 15  # both ranks' share


@pytest.mark.slow
def test_where_parameters_are_sharded_rank_0_generates(tmp_path: Path) -> None:
    recipe, output = ROOT / "tests" / "engines" / "recipe_on_cpu.py", tmp_path / "out"
    words = ["--recipe", "synthesize_dp", *SMALL, "--no-compare-untuned", "--classifier", "none", "--lora-r", "2"]
    succeed(launch("fsdp2", recipe, *words, "--output-dir", str(output), scratch=tmp_path, timeout=280))
    assert set(check_folder(output, ["label", "text"])["label"]) <= {some.split(" {")[0] for some in TROUBLES}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--distribution", "private", "--weights", "a=1"], "got both --weights"),
        (["--distribution", "private", "--histogram-epsilon", "0"], "--histogram-epsilon is 0"),
        (["--distribution", "private", "--histogram-epsilon", "8"], "leaves nothing for the training"),
        (["--distribution", "private", "--noise-multiplier", "0"], "a training that is not private"),
        (["--distribution", "private", "--condition-on", "text"], "names 'text'"),
        (["--temperature", "0"], "--temperature is 0"),
        (["--weights", "a"], "no value and number"),
        (["--must-match", "("], "no regular expression"),
        (["--values", "a,b"], "is not among the 2 public ones"),
        (["--weights", "will not start=1"], "names 1 of the 5 values"),
        (["--max-new-tokens", "90"], "leaves"),
        (["--condition-on", "folder"], "the data has the columns text, label"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_refused_before_the_training(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(records, "TICKET_CUSTOMERS", 20)
    with pytest.raises(SystemExit) as stop:
        synthesize_dp.main([*words, "--output-dir", str(tmp_path / "run")])
    assert stop.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()
