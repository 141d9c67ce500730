"""The recipes' options for mechanism, sampler, clipping and account: what they mean, are refused for, and leave."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from transformers import AutoModelForCausalLM

import dpft
import llama_dp
from accelerate import Accelerator
from finetune.account import check_account
from finetune.advice import noise_of
from finetune.dry_run import dry_run
from finetune.loop import History
from finetune.materials import Materials
from finetune.noise import compared, plan_of, taken
from finetune.options import BASE_MODEL, Options
from finetune.parsing import parse
from finetune.privacy_options import MECHANISMS, SAMPLER_OF, SAMPLERS
from finetune.private import planned_schedule, privacy_config
from finetune.report import tags
from tests.engines.launching import launch, succeed

ROOT = Path(__file__).resolve().parents[2]
# Quick to calibrate, and to run on the ninety records of the fixture, of which about 80 are trained on.
SMALL = ["--expected-batch-size", "12", "--max-eval-examples", "8", "--sample-tokens", "0", "--seq-len", "48"]
SMALL += ["--cpu-threads", "1", "--target-delta", "1e-5", "--num-steps", "6", "--eval-every", "0"]
SMALL += ["--checkpoint-every", "0", "--no-reload-check"]
BANDMF = ["--mechanism", "bandmf", "--bands", "3"]
BLT = ["--mechanism", "blt", "--buffers", "2"]
NOISE = ["--noise-multiplier", "1.5"]
# dpft ledger verify FOLDER; dpft ledger show FOLDER --json
COMMANDS = """
import sys; from dpft.command_line import main
sys.exit(main(["ledger", "verify", sys.argv[1]]) or main(["ledger", "show", sys.argv[1], "--json"]))
"""


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The line with which the recipe refuses."""
    with pytest.raises(SystemExit) as stop:
        llama_dp.main(list(words))
    told = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and told[-1].startswith("llama_dp.py: error: ")
    return told[-1]


def test_the_names_are_those_of_dpft() -> None:
    hints = get_type_hints(dpft.PrivacyConfig)
    assert set(SAMPLERS) == set(get_args(hints["sampler"])) and set(MECHANISMS) == set(get_args(hints["mechanism"]))
    assert set(SAMPLER_OF) == set(MECHANISMS)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {"mechanism": "dp_sgd", "sampler": "poisson", "accountant": "pld", "adaptive_clip": None}),
        (BANDMF, {"mechanism": "bandmf", "bands": 3, "sampler": "cyclic_poisson"}),
        ([*BLT, "--sampler", "fixed_order"], {"mechanism": "blt", "buffers": 2, "sampler": "fixed_order"}),
        (["--sampler", "balls_and_bins"], {"sampler": "balls_and_bins", "expected_batch_size": 512}),
        (
            ["--sampler", "truncated_poisson", "--max-batch-size", "600"],
            {"sampler": "truncated_poisson", "max_batch_size": 600},
        ),
        (["--sampler", "fixed_size", "--accountant", "rdp"], {"sampler": "fixed_size", "accountant": "rdp"}),
        (["--adaptive-clip", "0.4"], {"adaptive_clip": dpft.AdaptiveClip(quantile=0.4)}),
        (
            ["--adaptive-clip", "0.4", "--adaptive-clip-rate", "0.1", "--adaptive-clip-noise", "30"],
            {"adaptive_clip": dpft.AdaptiveClip(quantile=0.4, learning_rate=0.1, count_noise=30)},
        ),
        (["--clip-groups", "layer"], {"clip_groups": "layer"}),
        (["--clip-groups", "model.embed_tokens=1, others=3"], {"clip_groups": (("model.embed_tokens", 1), ("", 3))}),
        (["--secure-noise"], {"secure_rng": True}),
        (["--secure-rng"], {"secure_rng": True}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_options_reach_the_configuration(words: list[str], expected: dict[str, Any]) -> None:
    config = privacy_config(parse(words))
    assert {name: getattr(config, name) for name in expected} == expected


def test_every_setting_of_the_configuration_is_an_option() -> None:
    """But these, which a recipe sets itself, or leaves at their defaults."""
    left = {"sample_rate", "clip_function", "clip_gamma", "unit", "examples_per_user", "item"}
    assert {f.name for f in fields(dpft.PrivacyConfig)} - {f.name for f in fields(Options)} == left


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mechanism", "bandmf"], "give bands exactly with mechanism='bandmf', such as bands=8"),
        (["--bands", "3"], "give bands exactly with mechanism='bandmf'"),
        (["--mechanism", "blt"], "give buffers exactly with mechanism='blt'"),
        ([*BLT, "--sampler", "poisson"], "blt with fixed_order"),
        (["--sampler", "cyclic_poisson"], "bandmf with cyclic_poisson"),
        ([*BANDMF, "--secure-noise"], "Leave one of them out"),
        (["--max-batch-size", "9"], "max_batch_size is the cap of sampler='truncated_poisson'"),
        (["--sampler", "truncated_poisson"], "give both or neither"),
        (["--sampler", "shuffle", "--expected-batch-size", "9.5"], "expected a whole number"),
        (["--adaptive-clip", "1"], "expected a share in (0, 1)"),
        (["--adaptive-clip", "0.5", "--sampler", "shuffle"], "leave adaptive_clip out"),
        (["--adaptive-clip", "0.5", "--clip-groups", "layer"], "Leave one out"),
        (["--adaptive-clip-rate", "0.5"], "--adaptive-clip-rate is of --adaptive-clip"),
        (["--adaptive-clip-noise", "5"], "--adaptive-clip-noise is of --adaptive-clip"),
        (["--clip-groups", "layers"], "'layers'; expected layer, or a weight"),
        (["--clip-groups", "a=1,a=2"], "once"),
        (["--clip-groups", "a=x"], "'a=x'"),
        (["--clip-groups", "a=-1"], "finite weight > 0"),
        (["--account", " "], "--account is empty"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_does_not_apply_is_refused_in_one_line_before_anything_is_loaded(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, "--dataset", "absent.jsonl", *words)


def account(path: Path, epsilon: float = 2.0, **options: Any) -> dpft.Account:
    return dpft.Account.create(path / "account.jsonl", epsilon=epsilon, delta=1e-5, **options)


def paying(account: dpft.Account, *words: str) -> str | None:
    """What is said of a run of twenty steps of 12 of 80 records."""
    options = parse([*SMALL, "--num-steps", "20", *NOISE, "--account", str(account.path), *words])
    return check_account(options, planned_schedule(options, 80), Accelerator(cpu=True))


def test_a_run_that_fits_is_told_what_is_left_and_one_that_does_not_what_fits(tmp_path: Path) -> None:
    paid = account(tmp_path, 4.0)
    left = paying(paid)
    assert left is not None and "0 of epsilon 4 at delta 1e-05 is spent" in left and "the 20 steps of this" in left
    assert not paid.entries()  # asking reserves nothing
    mechanism = planned_schedule(parse([*SMALL, *NOISE]), 80).mechanism
    paid.reserve("another run", [(mechanism, paid.max_steps(mechanism) - 10)], "another training")
    with pytest.raises(ValueError, match=r"20 steps with noise multiplier 1\.5 do not fit") as refusal:
        paying(paid)
    told = str(refusal.value)
    assert "Of such steps 10 fit" in told
    assert "1 reservations are open: dpft account settle" in told and "Nothing was released" in told
    enough = re.search(r"all of them with --noise-multiplier (\d+\.\d+)", told)
    assert enough is not None and paying(paid, "--noise-multiplier", str(float(enough[1]) * 1.001))
    assert paying(paid, "--resume-from-checkpoint") is None  # its own reservation is there: dpft.prepare replaces it


def test_a_spent_account_fits_nothing(tmp_path: Path) -> None:
    paid = account(tmp_path)
    mechanism = planned_schedule(parse([*SMALL, *NOISE]), 80).mechanism
    paid.finish(paid.spend([], "a training"), [(mechanism, 2000)])  # what was released counts
    with pytest.raises(ValueError, match=r"Of such steps 0 fit .*; no noise makes all of them fit"):
        paying(paid)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (BANDMF, "no theorem composes them"),
        (["--user-column", "who"], "counts what each example loses, and the examples of this run are users"),
        (["--sampler", "shuffle"], "no theorem composes them"),
        (["--noise-multiplier", "0"], "no account can pay for it"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_no_theorem_composes_is_not_paid(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"--account .*{message}"):
        paying(account(tmp_path), *words)


@pytest.mark.parametrize(
    ("words", "header"), [(BANDMF, {"adjacency": "zero_out"}), (["--user-column", "who"], {"unit": "user"})]
)
def test_other_accounts_pay_for_it(words: list[str], header: dict[str, Any], tmp_path: Path) -> None:
    left = paying(account(tmp_path, 8.0, **header), *words)
    assert left is not None and "the 20 steps of this run fit" in left


def test_a_missing_account_is_named(tmp_path: Path, records: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(capsys, *SMALL, *NOISE, "--dataset", records, "--account", str(tmp_path / "absent.jsonl"))
    assert "--account" in told and "absent.jsonl" in told


def test_a_card_names_the_mechanism_in_its_tags() -> None:
    assert [tags(name) for name in ("dp_sgd", "bandmf", None)] == [
        "differential-privacy, dp-sgd, dpft",
        "differential-privacy, bandmf, dpft",
        "not-private, dpft",
    ]


@pytest.mark.slow
def test_what_correlated_noise_takes_is_said_before(capsys: pytest.CaptureFixture[str]) -> None:
    model, accelerator = AutoModelForCausalLM.from_pretrained(BASE_MODEL), Accelerator(cpu=True)
    options = parse([*SMALL, *BLT, *NOISE, "--max-physical-batch-size", "1"])
    schedule, plan = planned_schedule(options, 80), plan_of(model, options, accelerator)
    assert not isinstance(plan, str) and plan.noise is not None and plan.noise.vectors == 2
    parameters = sum(p.numel() for p in model.parameters())
    assert plan.noise.kept_bytes == 2 * 4 * parameters
    words = taken("blt", schedule, plan)
    assert f"keeps 2 vectors, {8 * parameters / 2**20:.1f} MiB" in words and f"{parameters:,} values" in words
    assert "keeps 2 vectors of the size" in taken("blt", schedule, "not predicted: no causal LM")
    assert "keeps" not in taken("dp_sgd", schedule, plan_of(model, parse([*SMALL, *NOISE]), accelerator))
    found = compared(options, schedule, 80)
    assert found is not None
    own, other = map(float, re.findall(r"([\d.]+) C", found))
    assert own == pytest.approx(schedule.noise_in_sums, rel=1e-3)
    assert other > 0 and compared(parse([*SMALL, *NOISE]), planned_schedule(parse([*SMALL, *NOISE]), 80), 80) is None
    advised = noise_of(options, model, 80, accelerator)
    assert advised[0].startswith("mechanism          blt, keeps 2") and advised[1].endswith(found)
    too_many = noise_of(parse([*SMALL, "--mechanism", "bandmf", "--bands", "7"]), model, 80, accelerator)
    assert len(too_many) == 1 and "not with this batch" in too_many[0] and "at most 6 bands" in too_many[0]
    materials: Any = Materials(None, range(80), [], None, None)  # type: ignore[arg-type]  # only their number is read
    dry_run(options, materials, model, accelerator, "of the account")
    told = capsys.readouterr().out
    assert f"earlier noise {8 * parameters / 2**20:.1f}" in told and "noise in all       " in told
    assert f"noise of a batch   {words.partition(' values')[0]}" in told
    assert "account            of the account" in told


# ------------------------------------------------------------------------------------------------ whole runs
def stated(folder: Path) -> float:
    """The epsilon of a run, on which its card, its metrics, the command line and the outsider's script agree."""
    shown = subprocess.run([sys.executable, "-c", COMMANDS, str(folder)], capture_output=True, text=True, check=True)
    whole, found = shown.stdout.split("\n", 1)
    assert whole.startswith("whole: 6 releases")
    spent = float(json.loads(found)["epsilon"])
    card = (folder / "README.md").read_text()
    rows = dict(re.findall(r"^\| ([^|]+?) \| (.+?) \|$", card, re.MULTILINE))
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert spent <= float(rows["Epsilon spent"]) <= spent * 1.001
    assert spent <= last["epsilon"] <= spent * 1.05
    spec = importlib.util.spec_from_file_location("recompute", ROOT / "docs" / "recompute.py")
    assert spec is not None and spec.loader is not None
    recompute = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recompute)
    assert recompute.main(folder / "README.md") == 0
    return spent


def ledger(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's ledger: the header, and a line for each release."""
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


def examples(folder: Path) -> int:
    """Of a run, by its ledger."""
    return int(ledger(folder)[0]["schedule"]["dataset_size"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "mechanism"),
    [
        (BANDMF, "banded matrix factorisation"),
        (BLT, "BLT matrix factorisation"),
        (["--sampler", "balls_and_bins"], "each example in one random batch of every epoch"),
        (["--sampler", "fixed_size", "--accountant", "rdp", "--noise-multiplier", "4"], "subsampled Gaussian"),
        (["--sampler", "truncated_poisson", "--max-batch-size", "20"], "subsampled Gaussian"),
        (["--clip-groups", "layer", "--secure-noise"], "subsampled Gaussian"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_run_states_its_mechanism_and_an_epsilon_that_can_be_recomputed(
    words: list[str], mechanism: str, tmp_path: Path, records: str
) -> None:
    noise = NOISE if "--noise-multiplier" not in words else []
    assert llama_dp.main([*SMALL, *noise, *words, "--dataset", records, "--output-dir", str(tmp_path)]) == 0
    options = parse([*SMALL, *noise, *words])
    planned = privacy_config(options).resolve(examples(tmp_path))
    assert stated(tmp_path) == pytest.approx(planned.epsilon, rel=1e-9)
    assert not list(tmp_path.glob("_*"))  # nobody can draw the noise again
    card = (tmp_path / "README.md").read_text()
    assert mechanism in card and f"tags: [{tags(options.mechanism)}]" in card


@pytest.mark.slow
def test_a_clip_norm_that_adapts_is_in_metrics_ledger_and_card(tmp_path: Path, records: str) -> None:
    words = [*SMALL, *NOISE, "--adaptive-clip", "0.5", "--dataset", records, "--output-dir", str(tmp_path)]
    assert llama_dp.main(words) == 0
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    norms = [row["clip_norm"] for row in rows if "loss" in row]
    adapted = [line["next_clip_norm"] for line in ledger(tmp_path) if "release" in line]
    assert norms == [1.0, *adapted[:5]] and len(set(norms)) > 1
    assert "follows the 0.5-quantile" in (tmp_path / "README.md").read_text()
    plain = privacy_config(parse([*SMALL, *NOISE])).resolve(examples(tmp_path))
    assert stated(tmp_path) == pytest.approx(plain.epsilon, rel=1e-9)


@pytest.mark.slow
def test_two_runs_pay_from_one_account_until_it_refuses(
    tmp_path: Path, records: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paid = account(tmp_path, 1.8, composition="pld")
    words = [*SMALL, *NOISE, "--dataset", records, "--account", str(paid.path)]
    assert llama_dp.main([*words, "--output-dir", str(tmp_path / "first")]) == 0
    (entry,) = paid.entries()
    mechanism, count = entry.uses[0]
    assert not entry.open and count == 6
    assert stated(tmp_path / "first") > 0
    card = (tmp_path / "first" / "README.md").read_text()
    assert paid.account_id in card and str(tmp_path) not in card
    told = refused(capsys, *words, "--output-dir", str(tmp_path / "second"))
    assert "6 steps with noise multiplier 1.5 do not fit" in told and not (tmp_path / "second").exists()
    # prepare refuses too, should another use have come in between
    monkeypatch.setattr("finetune.run.check_account", lambda *_: None)
    told = refused(capsys, *words, "--output-dir", str(tmp_path / "second"))
    assert "does not fit into the account" in told
    assert not [line for line in ledger(tmp_path / "second") if "release" in line]
    assert paid.entries() == (entry,) and paid.max_steps(mechanism, limit=6) < 6


@pytest.mark.slow
@pytest.mark.parametrize(("mechanism", "extra"), [(BLT, []), ([], ["--account", "{account}"])], ids=["blt", "account"])
def test_an_interrupted_run_goes_on(
    mechanism: list[str],
    extra: list[str],
    tmp_path: Path,
    records: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The noise goes on from its secrets; the account has what was released meanwhile, and then all of it."""
    paid = account(tmp_path, 4.0)
    output = tmp_path / "run"
    words = [*SMALL, *NOISE, *mechanism, *(word.format(account=paid.path) for word in extra), "--dataset", records]
    words += ["--output-dir", str(output), "--checkpoint-every", "1"]
    add = History.add

    def press(history: History, row: dict[str, Any]) -> None:
        add(history, row)
        if row["step"] == 2 and "loss" in row:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(History, "add", press)
        assert llama_dp.main(words) == 130
    released = sum("release" in line for line in ledger(output))
    assert 2 <= released < 6
    assert [(e.open, [n for _, n in e.uses]) for e in paid.entries()] == [(False, [released])] * bool(extra)
    assert (output / "_ledger.jsonl.noise").exists() is bool(mechanism)
    assert llama_dp.main([*words, "--resume-from-checkpoint"]) == 0
    assert ("_ledger.jsonl.noise is deleted" in capsys.readouterr().out) is bool(mechanism)
    assert [(e.open, sum(n for _, n in e.uses)) for e in paid.entries()] == [(False, 6)] * bool(extra)
    stated(output)


@pytest.mark.slow
def test_two_ranks_pay_once_and_have_one_clip_norm(tmp_path: Path, records: str) -> None:
    paid = account(tmp_path, 4.0)
    words = [*SMALL, *NOISE, "--adaptive-clip", "0.5", "--dataset", records, "--output-dir", str(tmp_path / "run")]
    recipe = ROOT / "tests" / "engines" / "recipe_on_cpu.py"
    succeed(launch("ddp", recipe, *words, "--account", str(paid.path), scratch=tmp_path, timeout=200))
    assert [(e.open, sum(n for _, n in e.uses)) for e in paid.entries()] == [(False, 6)]
    stated(tmp_path / "run")
