"""``--distribution private``: counts are paid beside the training, drawn once, and stated together with it."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from datasets import load_dataset

import dpft
import synthesize_dp
from finetune.output import ACCOUNT, DISTRIBUTION, LEDGER, _choose_output, _clear
from finetune.private import privacy_config
from finetune.synthetic import histogram
from finetune.synthetic.conditions import in_proportion
from finetune.synthetic.options import SynthesisOptions
from tests.recipes.test_synthesize import SMALL
from tests.training import Training

NAMES = ["label: a\n", "label: b\n", "label: c\n"]


def schedule(**changes: Any) -> Any:
    values: dict[str, Any] = {"expected_batch_size": 10, "target_delta": 1e-5, "num_steps": 20, **changes}
    return dpft.PrivacyConfig(**values).resolve(200)


def made(folder: Path, target: float | None = None, users: bool = False) -> dpft.Account:
    given = {"noise_multiplier": 1.0} if target is None else {"target_epsilon": target - 0.5 - histogram.MARGIN}
    planned = schedule(**given)
    account = dpft.Account.open(histogram.create_account(folder, planned, 0.5, target, users, "**letters**"))
    account.reserve(
        "run",
        [(planned.mechanism, 20)],
        "a training",
        ledger=folder / "ledger.jsonl",
        item="user" if users else "example",
    )
    return account


def draw(folder: Path, values: list[str], **changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"epsilon": 0.5, "categories": NAMES, "users": None, "rows": 8, **changes}
    return histogram.counts(folder, values=values, **options)


@pytest.mark.parametrize("target", [None, 3.0])
def test_training_and_counts_fit_into_the_budget_tightly(tmp_path: Path, target: float | None) -> None:
    account = made(tmp_path, target)
    draw(tmp_path, [NAMES[0]] * 7)
    assert [(release.epsilon, count) for release, count in account.uses()[1:]] == [(0.5, 1)]
    assert account.epsilon == pytest.approx(account.spent() if target is None else target)
    assert account.epsilon * 0.9 < account.spent() <= account.epsilon  # one beside the other, and not their sum
    assert account.epsilon < schedule(noise_multiplier=account.uses()[0][0].noise_multiplier).epsilon + 0.52
    assert sorted(path.name for path in tmp_path.iterdir()) == [ACCOUNT, DISTRIBUTION]
    text = account.markdown()
    assert "texts of each condition" in text and "pure epsilon 0.5" in text and "| Records | letters |" in text


def test_the_account_has_the_adjacency_of_the_training(tmp_path: Path) -> None:
    for more in ({"sampler": "shuffle"}, {"sampler": "cyclic_poisson", "mechanism": "bandmf", "bands": 2}):
        planned = schedule(noise_multiplier=4.0, **more)
        folder = tmp_path / more["sampler"]
        folder.mkdir()
        account = dpft.Account.open(histogram.create_account(folder, planned, 0.5, None, False, "letters"))
        account.reserve("run", [(planned.mechanism, 20)], "a training", ledger=folder / "ledger.jsonl")
        assert draw(folder, [NAMES[0]])["adjacency"] == account.protects.adjacency == "zero_out"
        assert account.spent() <= account.epsilon


def test_counts_are_drawn_once(tmp_path: Path) -> None:
    account = made(tmp_path)
    found = draw(tmp_path, [NAMES[0]] * 40 + [NAMES[2]] * 20)
    assert draw(tmp_path, [NAMES[1]] * 1000) == found and len(account.entries()) == 2
    assert abs(found["counts"][NAMES[0]] - 40) < 60 and "epsilon 0.5, delta 0" in found["statement"]
    for changes in ({"epsilon": 1.0}, {"categories": NAMES[:2]}):
        with pytest.raises(ValueError, match="each histogram is paid"):
            draw(tmp_path, [], **changes)
    (tmp_path / DISTRIBUTION).unlink()
    with pytest.raises(ValueError, match="is gone"):
        draw(tmp_path, [])
    assert len(account.entries()) == 2


def test_starting_anew_replaces_no_earlier_ledger_or_account(tmp_path: Path) -> None:
    """Also where the first of them was moved away."""
    for number in range(4):
        (tmp_path / LEDGER).write_text('{"release":1}\n' * (number + 1))
        (tmp_path / ACCOUNT).write_text(str(number))
        _clear(tmp_path, tmp_path / LEDGER, overwrite=True)
        if number == 1:
            for name in (LEDGER, ACCOUNT):
                (tmp_path / f"earlier-1-{name}").unlink()
    kept = {path.name: path.read_text().count("release") or path.read_text() for path in tmp_path.iterdir()}
    assert kept == {
        **{f"earlier-{place}-{LEDGER}": number + 1 for place, number in ((1, 2), (2, 1), (3, 3))},
        **{f"earlier-{place}-{ACCOUNT}": str(number) for place, number in ((1, 2), (2, 1), (3, 3))},
    }


@pytest.mark.parametrize("releases", [0, 2])
def test_starting_anew_leaves_no_reservation_of_the_run_that_died(tmp_path: Path, releases: int) -> None:
    """Its ledger goes, or gets another name: settle() would not find it any more."""
    account, folder = dpft.Account.create(tmp_path / "account.jsonl", epsilon=30.0, delta=1e-3), tmp_path / "run"
    training = Training(folder / LEDGER, account=account, test_seed=None)
    if releases:
        training.train(releases)
    training.run.ledger.close()  # which is all that the end of a process does
    options: Any = SimpleNamespace(
        output_dir=str(folder), overwrite_output_dir=True, resume_from_checkpoint=None, account=str(account.path)
    )
    assert _choose_output(options, "llama_dp") == folder and not (folder / LEDGER).exists()
    assert [(entry.open, sum(count for _, count in entry.uses)) for entry in account.entries()] == [(False, releases)]


def test_a_user_counts_for_the_rows_that_the_noise_is_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scales = []
    monkeypatch.setattr("dpft.evaluation.discrete_laplace", lambda scale: scales.append(scale) or 0)
    account = made(tmp_path, users=True)
    found = draw(tmp_path, [NAMES[0]] * 50 + [NAMES[1]], users=["one"] * 50 + ["other"], rows=4)
    assert found["counts"] == {NAMES[0]: 4, NAMES[1]: 1, NAMES[2]: 0} and scales[-3:] == [4 / 0.5] * 3
    assert [entry.item for entry in account.entries()] == ["user", "user"] and "unit user" in found["statement"]
    with pytest.raises(dpft.AccountingError):
        (tmp_path / "b").mkdir()
        made(tmp_path / "b", users=True)
        draw(tmp_path / "b", [NAMES[0]])  # records of whom nobody says whose they are


def test_shares_are_the_counts() -> None:
    assert histogram.shares({"counts": {"a": 5, "b": -3, "c": 15}}) == [5, 0, 15]
    assert histogram.shares({"counts": {"a": -5, "b": 0}}) == [1, 1]
    assert in_proportion(10, [5, 0, 15]) == [3, 0, 7] and in_proportion(4, [1, 1, 1]) == [2, 1, 1]


def test_the_training_gets_what_the_counts_leave() -> None:
    whole, rest = (
        privacy_config(SynthesisOptions(target_epsilon=3.0, distribution=name)).target_epsilon
        for name in ("uniform", "private")
    )
    assert whole == 3.0 and rest == pytest.approx(3.0 - 0.5 - histogram.MARGIN)


def test_the_noisy_counts_have_their_law(tmp_path: Path) -> None:
    """Over many conditions of one draw: mean 0, and the variance of the discrete Laplace distribution of scale 2."""
    made(tmp_path)
    names = [f"label: {number}\n" for number in range(2000)]
    found = histogram.counts(tmp_path, 0.5, names * 3, names, None, 8)["counts"]
    noise = np.array([found[name] - 3 for name in names])
    ratio = np.exp(-0.5)
    variance = 2 * ratio / (1 - ratio) ** 2
    assert abs(noise.mean()) < 5 * np.sqrt(variance / 2000)
    assert noise.var() == pytest.approx(variance, rel=0.3)


@pytest.mark.slow
def test_the_run_and_its_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"body": f"The {w} number {n}.", "kind": w, "of": n % 50} for n in range(100) for w in ("cat", "dog", "dog")
    ]
    (tmp_path / "mails.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--dataset", str(tmp_path / "mails.jsonl"), "--text-column", "body", *SMALL, "--no-measures"]
    words += ["--condition-on", "kind", "--distribution", "private", "--target-epsilon", "6", "--target-delta", "1e-5"]
    words += ["--user-column", "of", "--records-per-user", "2", "--histogram-epsilon", "2"]
    output = tmp_path / "out"
    words += ["--output-dir", str(output)]
    with pytest.raises(SystemExit):
        synthesize_dp.main(words)
    assert "Name them by --values" in capsys.readouterr().err
    words += ["--values", "cat,dog,cow"]
    assert synthesize_dp.main(words) == 0
    account = dpft.Account.open(output / ACCOUNT)
    training, counted = account.entries()
    assert [release.epsilon for release, _ in counted.uses] == [2.0] and counted.item == training.item == "user"
    assert account.spent() <= account.epsilon == 6.0 and dict(account.statement())["unit"].startswith("user")
    card = (output / "synthetic" / "README.md").read_text()
    assert "(6, 1e-05)-differential privacy" in card and "what **both** cost together" in card
    assert card.index("## Privacy account") < card.index("## Privacy statement") < card.index("noisy counts of the")
    assert "one user changes their sum by at most 2" in card and "and not from the private records" not in card
    data = load_dataset("parquet", data_files=str(output / "synthetic" / "synthetic.parquet"), split="train")
    found = json.loads((output / DISTRIBUTION).read_text())["counts"]
    assert set(data["kind"]) <= {name.split(": ")[1].strip() for name, count in found.items() if count > 0}

    gc.collect()  # the ledger's lock ends with the objects of the first run
    assert synthesize_dp.main([*words, "--resume-from-checkpoint", "--generate", "12"]) == 0
    assert json.loads((output / DISTRIBUTION).read_text())["counts"] == found
    assert len(account.entries()) == 2 and account.spent() <= 6.0
