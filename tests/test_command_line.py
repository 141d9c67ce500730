"""``dpft`` on the command line."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import dpft
import dpft.command_line.environment
from dpft.command_line import main
from dpft.privacy import Ledger, privacy_report
from dpft.privacy.accounting.accountant import rounded_up

ROOT = Path(__file__).resolve().parent.parent
CONFIG = dpft.PrivacyConfig(noise_multiplier=1.0, target_delta=1e-5, expected_batch_size=10, num_steps=20)


def recompute() -> Any:
    """docs/recompute.py, as a module."""
    spec = importlib.util.spec_from_file_location("recompute", ROOT / "docs" / "recompute.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ledger(folder: Path, releases: int = 5, config: dpft.PrivacyConfig = CONFIG, **conditions: bool) -> Path:
    """A ledger as ``dpft.prepare`` begins one, with some releases."""
    schedule, path = config.resolve(1000), folder / "ledger.jsonl"
    with Ledger.open(
        path,
        "new",
        mechanism=schedule.mechanism,
        config=config.to_dict() | {"clipped": True, "seeded": False} | conditions,
        fingerprint=config.fingerprint(),
        schedule=schedule.to_dict(),
    ) as open_ledger:
        for _ in range(releases):
            open_ledger.record()
    return path


EPSILON = ["epsilon", "--sigma", "1", "--steps", "10", "--delta", "1e-5"]
DATA = ["--batch-size", "10", "--examples", "1000"]
# What differs from a Poisson-sampled run, in words of the command line and as a PrivacyConfig.
RUNS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "poisson": ([], {}),
    "rdp": (["--accountant", "rdp"], {"accountant": "rdp"}),
    "truncated_poisson": (
        ["--sampler", "truncated_poisson", "--max-batch-size", "60"],
        {"sampler": "truncated_poisson", "max_batch_size": 60},
    ),
    "fixed_size": (
        ["--sampler", "fixed_size", "--accountant", "rdp"],
        {"sampler": "fixed_size", "accountant": "rdp"},
    ),
    "shuffle": (["--sampler", "shuffle"], {"sampler": "shuffle"}),
    "balls_and_bins": (["--sampler", "balls_and_bins"], {"sampler": "balls_and_bins"}),
    "bandmf": (
        ["--mechanism", "bandmf", "--bands", "4"],
        {"mechanism": "bandmf", "bands": 4, "sampler": "cyclic_poisson"},
    ),
    "blt": (
        ["--mechanism", "blt", "--buffers", "2", "--sampler", "fixed_order"],
        {"mechanism": "blt", "buffers": 2, "sampler": "fixed_order"},
    ),
}


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(words) == 0
    return capsys.readouterr().out.strip()


def test_epsilon_is_the_published_value(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["epsilon", "--sigma", "1.0", "--rate", "0.01", "--steps", "10000", "--delta", "1e-5"]
    assert float(said(capsys, *words)) == pytest.approx(6.19, abs=0.01)
    assert float(said(capsys, *words, "--accountant", "rdp")) > 6.19


@pytest.mark.parametrize("name", RUNS)
def test_epsilon_is_that_of_the_configuration(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """And that of the outsider's script, which knows neither."""
    words, changes = RUNS[name]
    config = dpft.PrivacyConfig(
        noise_multiplier=1.5, target_delta=1e-5, expected_batch_size=40, num_steps=30, **changes
    )
    schedule = config.resolve(1000)
    told = said(
        capsys,
        *["epsilon", "--sigma", "1.5", "--batch-size", "40", "--examples", "1000", "--steps", "30"],
        *["--delta", "1e-5", *words],
    )
    assert told == rounded_up(schedule.epsilon)
    report = privacy_report(schedule, 30)
    segments = [(segment["mechanism"], segment["releases"]) for segment in report["segments"]]
    again = recompute().epsilon(segments, 1e-5, config.accountant, report["discretization"] or 1e-4)
    assert again == pytest.approx(float(told), rel=0.01)


def test_the_rate_of_poisson_is_that_of_batch_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["epsilon", "--sigma", "1.5", "--steps", "30", "--delta", "1e-5"]
    told = said(capsys, *words, "--rate", "0.04")
    assert told == said(capsys, *words, "--batch-size", "40", "--examples", "1000")


def test_a_reader_that_left_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert main(["env"]) == 0


def test_a_ledger_is_shown_verified_and_stated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = ledger(tmp_path)
    report = privacy_report(CONFIG.resolve(1000), Ledger.read(path))
    found = json.loads(said(capsys, "ledger", "show", str(path), "--json"))
    assert found["releases"] == 5 and float(found["epsilon"]) == report["epsilon_spent"]
    assert "5 of 20 planned" in said(capsys, "ledger", "show", str(tmp_path))  # the folder of the run
    assert said(capsys, "ledger", "verify", str(path)).startswith("whole: 5 releases")
    card = said(capsys, "card", str(tmp_path), "--tuning", "chosen beforehand")
    assert card == dpft.privacy_statement_markdown(report | {"tuning": "chosen beforehand"}).strip()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"item": "user (all records with one value of column 'who', of which at most 8 are used)"},
        {"mechanism": "bandmf", "bands": 3, "sampler": "cyclic_poisson"},
    ],
    ids=["example", "item", "bandmf"],
)
def test_a_ledger_and_its_card_have_one_unit_and_one_mechanism(
    changes: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dpft.PrivacyConfig(**{**CONFIG.to_dict(), **changes})
    path = str(ledger(tmp_path, config=config))
    shown = said(capsys, "ledger", "show", path)
    card = dict(re.findall(r"^\| ([^|]+?) \| (.+?) \|$", said(capsys, "card", path), re.MULTILINE))
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in shown.splitlines())
    assert lines["privacy unit"] == card["Privacy unit"]
    assert lines["mechanism"] == card["Mechanism"]
    assert json.loads(said(capsys, "ledger", "show", path, "--json"))["unit"] == card["Privacy unit"]
    assert ("unit example" in lines["start 1"]) is ("item" not in changes)
    assert lines["start 1"].endswith("strategy bandmf of 3 bands") is ("bands" in changes)


@pytest.mark.parametrize(
    ("conditions", "reason"),
    [({"seeded": True}, "noise seed known; sampling seed known"), ({"clipped": False}, "gradients were not clipped")],
)
def test_what_the_ledger_says_is_not_private_is_never_stated_as_private(
    conditions: dict[str, bool], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(ledger(tmp_path, 5, CONFIG, **conditions))
    card = said(capsys, "card", path, "--clipping", "flash")
    assert f"**NOT PRIVATE: {reason}.**" in card and "Training satisfied" not in card
    shown = said(capsys, "ledger", "show", path)
    assert shown.startswith(f"NOT PRIVATE        {reason}\n") and "epsilon spent      inf" in shown
    assert json.loads(said(capsys, "ledger", "show", path, "--json"))["epsilon"] == "inf"


def test_a_torn_release_counts_and_a_damaged_ledger_is_not_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = ledger(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    assert "whole: 5 releases, 1 of them torn" in said(capsys, "ledger", "verify", str(path))
    path.write_bytes(whole.replace(b'"release":3', b'"release":4'))
    assert main(["ledger", "verify", str(path)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_plan_reads_the_configuration_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 50, **sizes}))
    told = said(capsys, "plan", str(tmp_path), "--seq-len", "64", "--batch-size", "2", "--hardware", "a100")
    assert "2 x 64 tokens" in told and "a100" in told and "one_pass" in told and "noise" not in told
    told = said(capsys, "plan", str(tmp_path), "--seq-len", "64", "--mechanism", "bandmf", "--bands", "5")
    assert "noise (bandmf): keeps 4 vectors" in told and "earlier noise" in told


def test_the_environment_names_what_is_there_and_what_an_extra_brings(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = dpft.command_line.environment.version
    monkeypatch.setattr("dpft.command_line.environment.version", lambda name: None if name == "peft" else real(name))
    lines = dict(line.split(None, 1) for line in said(capsys, "env").splitlines())
    assert lines["torch"] == real("torch") and lines["peft"].startswith("not installed; pip install 'dpft[peft]'")


def test_the_recipes_are_copied_and_never_over_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    told = said(capsys, "recipes", "--to", "my folder")
    assert "cd 'my folder' && accelerate launch recipes/llama_dp.py" in told
    for name in ("accelerate_config.yaml", "recipes/llama_dp.py", "recipes/assets/base_model/model.safetensors"):
        assert (tmp_path / "my folder" / name).read_bytes() == (ROOT / name).read_bytes()
    assert not list(tmp_path.rglob("__pycache__"))
    (tmp_path / "accelerate_config.yaml").write_text("mine")
    (tmp_path / "file").touch()
    for folder, message in (
        (".", "accelerate_config.yaml exists"),
        ("my folder", "recipes exists"),
        ("file", "a file"),
    ):
        assert main(["recipes", "--to", folder]) == 2
        told = capsys.readouterr().err.strip()
        assert len(told.splitlines()) == 1 and message in told
    assert (tmp_path / "accelerate_config.yaml").read_text() == "mine"
    assert not (tmp_path / "recipes").exists()


def test_a_package_without_recipes_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dpft.command_line.recipes.source", lambda: tmp_path)
    assert main(["recipes", "--to", str(tmp_path / "new")]) == 2
    assert "has no recipes" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["epsilon", "--sigma", "1"], "required: --steps, --delta"),
        ([*EPSILON], "neither --rate nor --batch-size"),
        ([*EPSILON, "--batch-size", "4"], "--batch-size and --examples belong together"),
        ([*EPSILON, "--batch-size", "4", "--examples", "9", "--rate", "0.1"], "--rate follows from"),
        ([*EPSILON, "--rate", "0.1", "--sampler", "shuffle"], "shuffle needs --batch-size and --examples"),
        ([*EPSILON, "--rate", "0.1", "--mechanism", "blt"], "fixed_order needs --batch-size"),
        ([*EPSILON, "--rate", "0.1", "--max-batch-size", "9"], "needs --batch-size and --examples"),
        ([*EPSILON, *DATA, "--mechanism", "bandmf"], "give bands exactly with"),
        ([*EPSILON, *DATA, "--bands", "2"], "give bands exactly with"),
        ([*EPSILON, *DATA, "--mechanism", "blt", "--buffers", "2", "--sampler", "poisson"], "blt with fixed_order"),
        ([*EPSILON, *DATA, "--mechanism", "bandmf", "--bands", "200"], "at most 100 bands"),
        ([*EPSILON, *DATA, "--sampler", "fixed_size"], "accountant='rdp'"),
        (["plan", "absent_model", "--bands", "2"], "give bands exactly with"),
        (["plan", "absent_model", "--mechanism", "blt", "--buffers", "2", "--secure-noise"], "secure_rng=True"),
        (["epsilon", "--sigma", "x", "--rate", "1", "--steps", "1", "--delta", "1"], "invalid float value: 'x'"),
        (["epsilon", "--sigma", "-1", "--rate", "0.1", "--steps", "1", "--delta", "1e-5"], "noise_multiplier=-1.0"),
        (["epsilon", "--sigma", "1", "--rate", "2", "--steps", "1", "--delta", "1e-5"], "sample_rate"),
        (["epsilon", "--sigma", "1", "--rate", "0.1", "--steps", "0", "--delta", "1e-5"], "--steps is 0"),
        (["epsilon", "--sigma", "1", "--rate", "0.1", "--steps", "1", "--delta", "1"], "--delta is 1"),
        (["ledger", "show", "absent.jsonl"], "absent.jsonl"),
        (["ledger", "keep", "absent.jsonl"], "invalid choice: 'keep'"),
        (["card", "."], "no ledger in the folder"),
        (["plan", "absent_model"], "absent_model"),
        (["plan", "absent_model", "--batch-size", "many"], "--batch-size is 'many'"),
        (["plan", "absent_model", "--hardware", "abacus"], "invalid choice: 'abacus'"),
        (["nosuch"], "invalid choice: 'nosuch'"),
        ([], "COMMAND"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_input_is_one_line(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status = main(words)
    except SystemExit as stop:  # of argparse
        status = int(stop.code or 0)
    told = capsys.readouterr().err.strip()
    assert status == 2 and len(told.splitlines()) == 1 and message in told, told


def test_an_account_is_created_shown_and_settled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "account.jsonl")
    words = ["account", "create", path, "--epsilon", "4", "--delta", "1e-5", "--records", "letters"]
    assert "epsilon 4 at delta 1e-05, rdp" in said(capsys, *words)
    assert main(words) == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1
    words = ["create", str(tmp_path / "users.jsonl"), "--epsilon", "4", "--delta", "1e-5", "--unit", "user"]
    said(capsys, "account", *words, "--examples-per-user", "3")
    assert dpft.Account.open(tmp_path / "users.jsonl").protects[1:] == ("user", 3)
    account, schedule = dpft.Account.open(path), CONFIG.resolve(1000)
    content = Ledger.read(ledger(tmp_path))
    planned = [(schedule.mechanism, schedule.num_steps)]
    account.reserve(content.run_id, planned, "a training", ledger=tmp_path / "ledger.jsonl")
    account.reserve("other", planned, "another training")
    assert said(capsys, "account", "show", path) == account.markdown().strip()
    assert said(capsys, "account", "settle", path).splitlines() == [
        f"settled {content.run_id}",
        "1 reservations are open",
    ]
    found = json.loads(said(capsys, "account", "show", path, "--json"))
    assert found == account.statement() and found["uses"][0]["releases"][0].startswith("5 x poisson")
    assert main(["account", "show", str(tmp_path / "ledger.jsonl")]) == 2


def test_a_card_has_the_notes_of_its_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As `loader.privacy.report()` has them: rows that were not checked, and an account that counts other uses."""
    ledger(tmp_path)
    assert main(["card", str(tmp_path)]) == 0 and "isolation" not in capsys.readouterr().out
    (tmp_path / "ledger.jsonl").unlink()
    ledger(tmp_path, isolated=False, account="some-account")  # type: ignore[arg-type]  # not as annotated
    assert main(["card", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "isolation='off'" in said and "paid from the account some-account" in said
