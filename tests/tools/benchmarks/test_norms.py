"""tools/benchmark_norms.py: its smoke preset from end to end, and a wrong kernel."""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tools.benchmarks import norm_times
from tools.benchmarks.norm_options import PRESETS
from tools.benchmarks.norm_tables import SEEDS, Layer
from tools.benchmarks.norm_times import Bench, einsum, exact, opacus
from tools.benchmarks.norms import Skipper, execute


def arguments(**given: Any) -> argparse.Namespace:
    """Parsed ones."""
    empty = dict.fromkeys(
        ("preset", "layers", "tokens", "rows", "dtype", "impls", "rounds", "seconds", "device", "json")
    )
    return argparse.Namespace(**{**empty, "threads": torch.get_num_threads(), **given})


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call is not repeated until it is long enough to time well."""
    monkeypatch.setattr(norm_times, "SHORT", 0.0)


def run(capsys: pytest.CaptureFixture[str], **given: Any) -> tuple[dict[str, Any], str]:
    """The file and the output of one run."""
    assert execute(arguments(**given)) == 0
    return json.loads(given["json"].read_text()), capsys.readouterr().out


@pytest.mark.slow  # asks git for the commit
@pytest.mark.usefixtures("quick")
def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, printed = run(capsys, preset="smoke", json=tmp_path / "norms.json")
    assert [r["tokens"] for r in report["results"]] == [64, 96, 64]
    for result in report["results"]:
        rows = {row["method"]: row for row in result["rows"]}
        expected = {"opacus", "einsum", *(f"torch:{m}" for m in ("auto", "gram", "feature", "materialise"))}
        assert set(rows) == expected
        for row in rows.values():
            assert row["rounds"] == 2 and row["seconds"]["median"] > 0 and row["error"] < 1e-5, row
        assert rows["opacus"]["times_opacus"] == {"median": 1.0, "min": 1.0, "max": 1.0}
        layer, tokens = Layer(**result["layer"]), result["tokens"]
        assert rows["opacus"]["peak_bytes"] >= 2 * 4 * layer.rows * tokens**2
        assert rows["einsum"]["peak_bytes"] >= 4 * layer.rows * layer.p * layer.d
    assert report["conditions"]["versions"]["opacus"] and "commit" in report["conditions"]
    assert (tmp_path / "norms.png").stat().st_size > 5000
    assert "5.55" in printed and "48 x 32, B=1, float32, T=96" in printed


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("planted", "said"),
    [
        (lambda x, g: 1.01 * einsum(x, g), "wrong, so not timed"),
        (lambda x, g: float("nan") * einsum(x, g), "wrong, so not timed"),
        (lambda x, g: torch.empty(1 << 50), "out of memory"),
    ],
)
def test_what_is_wrong_or_fails_is_a_row(planted: Any, said: str) -> None:
    bench = Bench(Layer(8, 8), 16, "cpu")
    found = bench.run({"opacus": opacus, "planted": planted}, 1, lambda name: "")
    right, wrong = found["rows"]
    assert "seconds" in right and "seconds" not in wrong and said in wrong["reason"]


@pytest.mark.slow  # asks git for the commit
@pytest.mark.usefixtures("quick")
def test_an_implementation_that_cannot_run_is_a_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether Triton can run here is not this test's business."""

    def refuses(x: Tensor, g: Tensor, method: str, impl: str) -> Tensor:
        raise ValueError(f"{impl} cannot run {method}")

    monkeypatch.setattr(norm_times, "linear_sq_norm", refuses)
    given = {"layers": ["8x8"], "tokens": [16], "impls": ["triton"], "rounds": 1, "json": tmp_path / "n.json"}
    report, printed = run(capsys, **given, device="cpu")
    rows = {row["method"]: row for row in report["results"][0]["rows"]}
    assert rows["triton:gram"]["reason"] == "ValueError: triton cannot run gram" and "seconds" in rows["opacus"]
    assert "triton cannot run auto" in printed


def test_exact_is_the_definition() -> None:
    x, g = (torch.randn((2, 5, 300 + k), generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    expected = torch.stack([(b.double().T @ a.double()).square().sum() for a, b in zip(x, g, strict=True)])
    torch.testing.assert_close(exact(x, g), expected, rtol=1e-13, atol=0.0)


def test_a_long_call_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_times, "LONG", 0.0)
    bench = Bench(Layer(8, 8), 16, "cpu")
    calls: list[int] = []

    def counted(x: Tensor, g: Tensor) -> Tensor:
        calls.append(1)
        return einsum(x, g)

    (row,) = bench.run({"einsum": counted}, 3, lambda name: "")["rows"]
    assert row["once"] and row["rounds"] == len(calls) == 1


def test_what_would_outlast_the_budget_is_skipped() -> None:
    layer = Layer(8, 8)
    skipper = Skipper(10.0)
    assert not skipper(layer, 100, "slow")
    skipper.learn(layer, {"tokens": 100, "rows": [{"method": "slow", "seconds": {"median": 1.0}}]})
    assert not skipper(layer, 200, "slow") and "some 16 s" in skipper(layer, 400, "slow")
    bench = Bench(layer, 400, "cpu")
    (row,) = bench.run({"slow": einsum}, 1, functools.partial(skipper, layer, 400))["rows"]
    assert row["reason"].startswith("not run: it would take some 16 s") and "seconds" not in row


def test_a_budget_that_ends_between_check_and_timing_is_said() -> None:
    answers = iter(["", "not run: spent"])
    (row,) = Bench(Layer(8, 8), 16, "cpu").run({"einsum": einsum}, 1, lambda name: next(answers))["rows"]
    assert row["reason"] == "not run: spent" and row["peak_bytes"] > 0 and "seconds" not in row


def test_presets_cover_the_issue() -> None:
    for preset in PRESETS.values():
        assert preset.layers and preset.seconds > 0
    lengths = {t for layer, some in PRESETS["cpu"].layers if layer == Layer(1024, 1024) for t in some}
    assert {4096, 16_384} | set(SEEDS) <= lengths
    gpu = PRESETS["gpu"].layers
    assert {tokens for _, some in gpu for tokens in some} == {512 << k for k in range(7)}
    assert max(layer.d for layer, _ in gpu) == 128_256 and "triton" in PRESETS["gpu"].impls
