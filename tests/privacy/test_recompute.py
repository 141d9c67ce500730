"""`docs/recompute.py` finds the epsilon of every statement that dpft makes, without dpft, and finds wrong ones."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import dpft
from dpft.privacy.ledger import LedgerContent

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "recompute.py"
N = 2000
BASE: dict[str, Any] = {
    **{"noise_multiplier": 1.0, "target_delta": 1e-5, "expected_batch_size": 100, "num_steps": 60},
}
# What differs from BASE, and the releases of each start of the run.
STATEMENTS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "poisson": ({}, (60,)),
    "poisson of a low rate": ({"sample_rate": 1e-4, "expected_batch_size": 1}, (60,)),
    "poisson by rdp": ({"accountant": "rdp"}, (60,)),
    "poisson, all": ({"sample_rate": 1.0, "noise_multiplier": 9.0}, (60,)),
    "users": ({"unit": "user", "examples_per_user": 3, "noise_multiplier": 3.0}, (60,)),
    "users, all": ({"unit": "user", "examples_per_user": 3, "sample_rate": 1.0, "noise_multiplier": 40.0}, (30, 30)),
    "users by rdp": ({"unit": "user", "examples_per_user": 3, "noise_multiplier": 3.0, "accountant": "rdp"}, (60,)),
    "users as examples": ({"item": dpft.by_user([0] * 4, [0, 0, 1, 1], rows=2).item}, (60,)),
    "truncated_poisson": ({"sampler": "truncated_poisson", "max_batch_size": 160}, (60,)),
    "truncated_poisson by rdp": (
        {"sampler": "truncated_poisson", "max_batch_size": 120, "accountant": "rdp"},
        (40, 20),
    ),
    "fixed_size": ({"sampler": "fixed_size", "accountant": "rdp", "noise_multiplier": 2.0}, (40, 20)),
    "shuffle": ({"sampler": "shuffle"}, (60,)),
    "shuffle by rdp": ({"sampler": "shuffle", "accountant": "rdp"}, (60,)),
    "shuffle, resumed": ({"sampler": "shuffle"}, (25, 30)),
    "balls_and_bins": ({"sampler": "balls_and_bins"}, (60,)),
    "balls_and_bins, resumed": ({"sampler": "balls_and_bins", "noise_multiplier": 0.7}, (25, 30)),
    "balls_and_bins, two batches": ({"sampler": "balls_and_bins", "expected_batch_size": 1000}, (20,)),
    "bandmf": ({"mechanism": "bandmf", "bands": 5, "sampler": "cyclic_poisson"}, (60,)),
    "bandmf by rdp": ({"mechanism": "bandmf", "bands": 5, "sampler": "cyclic_poisson", "accountant": "rdp"}, (60,)),
    "bandmf, ended early": ({"mechanism": "bandmf", "bands": 5, "sampler": "cyclic_poisson"}, (20, 21)),
    "blt": ({"mechanism": "blt", "buffers": 3, "sampler": "fixed_order"}, (60,)),
    "blt by rdp": ({"mechanism": "blt", "buffers": 3, "sampler": "fixed_order", "accountant": "rdp"}, (60,)),
    "blt, ended early": ({"mechanism": "blt", "buffers": 3, "sampler": "fixed_order"}, (20, 21)),
    "adaptive clip": ({"adaptive_clip": dpft.AdaptiveClip(quantile=0.6)}, (60,)),
    "clip groups": ({"clip_groups": "layer"}, (60,)),
    "secure noise": ({"secure_rng": True}, (60,)),
}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recompute", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def report_of(changes: dict[str, Any], starts: tuple[int, ...]) -> dict[str, Any]:
    """The report of a run of these starts."""
    schedule = dpft.PrivacyConfig(**{**BASE, **changes}).resolve(N)
    events = tuple((schedule.mechanism, count) for count in starts)
    norms = (1.0,) * sum(starts)
    return dpft.privacy_report(schedule, LedgerContent("a run", {}, events, 0, False, norms), clipping="flat")


def test_it_does_not_use_dpft() -> None:
    names = set()
    for node in ast.walk(ast.parse(SCRIPT.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    ours = {"__future__", "collections", "json", "math", "pathlib", "re", "sys", "typing"}
    assert names - ours == {"dp_accounting", "numpy", "scipy"}


@pytest.mark.slow
@pytest.mark.parametrize("name", STATEMENTS)
def test_every_statement(name: str, script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = report_of(*STATEMENTS[name])
    (tmp_path / "privacy_report.json").write_text(json.dumps(report))
    (tmp_path / "README.md").write_text("# A model\n\n" + dpft.privacy_statement_markdown(report))
    for file in ("privacy_report.json", "README.md"):
        assert script.main(tmp_path / file) == 0, capsys.readouterr().out
    for stated, found in (script.of_report(report), script.of_card((tmp_path / "README.md").read_text())):
        # That of balls-and-bins is another bound on the same loss; a card has four digits.
        assert found == pytest.approx(stated, rel=6e-3 if "balls" in name else 5e-4)
    # A statement that is too good by 3 % does not pass.
    report["epsilon_spent"] *= 0.97
    (tmp_path / "privacy_report.json").write_text(json.dumps(report))
    assert script.main(tmp_path / "privacy_report.json") == 1


def test_one_statement_and_its_forgeries(script: ModuleType, tmp_path: Path) -> None:
    report = report_of({"num_steps": 5}, (5,))
    stated, found = script.of_report(report)
    assert found == pytest.approx(stated, rel=1e-6)
    for name, value in (("noise_multiplier", 0.9), ("sample_rate", 0.06)):
        forged = json.loads(json.dumps(report))
        forged["segments"][0]["mechanism"][name] = value
        (tmp_path / "forged.json").write_text(json.dumps(forged))
        assert script.main(tmp_path / "forged.json") == 1
    (tmp_path / "none.json").write_text(json.dumps({**report, "epsilon_spent": "inf"}))
    (tmp_path / "none.md").write_text("# A model without a statement\n")
    assert script.main(tmp_path / "none.json") == script.main(tmp_path / "none.md") == 2


@pytest.mark.parametrize("name", ["bandmf", "blt"])
def test_less_noise_than_the_strategy_needs_is_seen(
    name: str, script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """z's deviation is noise multiplier x scale x C, and the scale must be the sensitivity of the matrix."""
    changes, _ = STATEMENTS[name]
    report = report_of({**changes, "num_steps": 40}, (40,))
    scale = float(report["sensitivity"].split()[0])
    card = dpft.privacy_statement_markdown(report)
    less = re.sub(r"noise multiplier x [\d.]+ x C", f"noise multiplier x {scale / 1.1:.10g} x C", card)
    (tmp_path / "README.md").write_text(less)
    (tmp_path / "report.json").write_text(
        json.dumps({**report, "sensitivity": report["sensitivity"].replace(f"{scale:.6g}", f"{scale / 1.1:.6g}")})
    )
    assert less != card
    for file in ("README.md", "report.json"):
        assert script.main(tmp_path / file) == 2
        assert "sensitivity of the strategy" in capsys.readouterr().out
    (tmp_path / "README.md").write_text(card)
    assert script.main(tmp_path / "README.md") == 0


def test_noise_that_no_theorem_covers_is_refused(script: ModuleType) -> None:
    banded = {"sampler": "cyclic_poisson", "noise_multiplier": 1.0, "sample_rate": 0.1}
    strategy = {"steps": 20, "min_separation": 2, "weights": [1.0, 0.5, 0.3], "decays": []}
    with pytest.raises(ValueError, match="more bands than"):
        script.epsilon([({**banded, "strategy": strategy}, 20)], 1e-5, "pld")
    buffered = {"sampler": "fixed_order", "noise_multiplier": 1.0, "dataset_size": 100, "batch_size": 10}
    strategy = {"steps": 20, "min_separation": 10, "weights": [1.0, 0.5], "decays": [0.9, 0.5]}
    with pytest.raises(ValueError, match="negative or increases"):
        script.epsilon([({**buffered, "strategy": strategy}, 20)], 1e-5, "pld")
    with pytest.raises(ValueError, match="too little noise"):
        m = {"sampler": "balls_and_bins", "noise_multiplier": 0.4, "dataset_size": 100, "batch_size": 20}
        script.epsilon([(m, 5)], 1e-5, "pld")
    with pytest.raises(ValueError, match="come round earlier"):
        script.epsilon([({**buffered, "strategy": {**strategy, "min_separation": 11}}, 20)], 1e-5, "pld")
    cut = {"noise_multiplier": 1.0, "sample_rate": 0.1, "dataset_size": 1000}
    mixed = [({**cut, "sampler": "truncated_poisson", "max_batch_size": 120}, 5), ({**cut, "sampler": "poisson"}, 5)]
    with pytest.raises(ValueError, match="truncated_poisson has no RDP here"):
        script.epsilon(mixed, 1e-5, "rdp")
