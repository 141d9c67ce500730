"""tools/check_models.py: small models that prove something, an oracle that agrees with the tests', statuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.modeling_outputs import CausalLMOutput

import dpft
from tests import oracle as tests_oracle
from tools.models import checking
from tools.models.building import HEADS, LISTS, Family, alone, build_batch, build_config, build_model, families
from tools.models.checking import CHECKED, CRASH, EXACT, NOT_BUILT, REFUSED, ROWS, STRATEGIES, WRONG, check, judge
from tools.models.command import failed, main
from tools.models.oracle import Expected, compare, dependence, expected
from tools.models.report import markdown, summary
from tools.models.shrink import kept_layers, shrunk

LLAMA = Family("llama", "causal_lm", "LlamaForCausalLM")
HYBRID = Family("qwen3_next", "causal_lm", "Qwen3NextForCausalLM")
REAL_WRAP = checking.wrap_any
PLANTED = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    return build_batch(LLAMA, build_config(LLAMA), list(ROWS))


@pytest.fixture(scope="module")
def right(batch: dict[str, Tensor]) -> Expected:
    return expected(build_model(LLAMA), batch)


@pytest.mark.parametrize("family", [LLAMA, HYBRID], ids=str)
def test_a_built_model_is_small_and_no_gradient_vanishes(family: Family) -> None:
    model = build_model(family)
    sizes = [p.numel() for p in model.parameters()]
    assert max(sizes) < 20_000
    assert all(p.dtype == torch.float64 for p in model.parameters())
    sums = expected(model, build_batch(family, model.config, list(ROWS))).sums
    assert list(sums) == [name for name, _ in model.named_parameters()]
    assert [name for name, g in sums.items() if not g.norm() > 1e-9] == []


def test_a_hybrid_keeps_a_layer_of_each_kind() -> None:
    assert build_config(HYBRID).layer_types == ["linear_attention", "full_attention"]
    assert kept_layers({"attention": "sssfsssf", "mlp": "dssssddd"}) == [0, 1, 3, 7]
    assert kept_layers({"attention": "ffff"}) == [0, 1]


def test_a_field_under_another_name_is_made_small_and_exceptions_are_kept() -> None:
    class Renamed(LlamaConfig):
        attribute_map = {"intermediate_size": "inner_size"}  # noqa: RUF012  # as transformers declares it

    small = shrunk(Renamed(), {"num_attention_heads": 8})
    assert (small["intermediate_size"], small["num_attention_heads"], small["hidden_size"]) == (40, 8, 32)


def test_every_list_has_families() -> None:
    assert set(LISTS) == {*HEADS, "heads"}
    assert {head: len(families(head)) > 30 for head in HEADS} == dict.fromkeys(HEADS, True)


def test_a_row_alone_has_no_padding(batch: dict[str, Tensor]) -> None:
    row = alone(batch, 2)
    assert {name: tuple(value.shape) for name, value in row.items()} == dict.fromkeys(batch, (1, ROWS[2]))
    assert (batch["labels"] == -100).sum() == sum(max(ROWS) - n for n in ROWS)


def test_the_oracle_agrees_with_that_of_the_tests(batch: dict[str, Tensor], right: Expected) -> None:
    exact = tests_oracle.oracle(build_model(LLAMA), batch)
    assert torch.allclose(exact.norms, right.norms, rtol=1e-10)
    assert tests_oracle.relative_error(right.sums, exact.clipped_sum(right.max_grad_norm)) < 1e-10
    assert (right.norms > right.max_grad_norm).sum() == 2  # of three


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_right_is_exact(batch: dict[str, Tensor], right: Expected, strategy: str) -> None:
    found = judge(build_model(LLAMA), batch, right, strategy)
    assert found["status"] == EXACT
    assert found["chose"] == ("one_pass" if strategy == "auto" else strategy)


def test_a_planted_mistake_is_wrong_and_its_parameter_is_named(
    batch: dict[str, Tensor], right: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    def grow(p: Tensor) -> None:
        assert p.grad is not None
        p.grad *= 1 + 2e-6

    def scaled(model: nn.Module, max_grad_norm: float, strategy: Any) -> nn.Module:
        model = REAL_WRAP(model, max_grad_norm, strategy)
        dict(model.named_parameters())[PLANTED].register_post_accumulate_grad_hook(grow)
        return model

    monkeypatch.setattr(checking, "wrap_any", scaled)
    found = judge(build_model(LLAMA), batch, right, "one_pass")
    assert (found["status"], found["where"]) == (WRONG, PLANTED)
    assert found["error"] == pytest.approx(2e-6, rel=0.01)


def test_a_norm_that_is_wrong_and_a_gradient_that_is_missing_are_wrong(right: Expected) -> None:
    assert compare(right.norms * 1.001, right.sums, right) == (pytest.approx(1e-3), "norms")
    without = {name: g for name, g in right.sums.items() if name != PLANTED}
    assert compare(right.norms, without, right) == (1.0, PLANTED)
    broken = {**right.sums, PLANTED: right.sums[PLANTED] * float("nan")}
    assert compare(right.norms, broken, right) == (float("inf"), PLANTED)
    assert compare(right.norms * float("nan"), right.sums, right) == (float("inf"), "norms")


def test_what_dpft_refuses_is_refused(batch: dict[str, Tensor], right: Expected) -> None:
    model = build_model(LLAMA)
    model.beside = nn.BatchNorm1d(3).double()
    found = judge(model, batch, right, "one_pass")
    assert found["status"] == REFUSED
    assert found["reason"].startswith("'beside' (BatchNorm1d) mixes examples")
    assert found["lacking"] == []


def raising(error: Exception) -> Any:
    def raise_it(*_: Any) -> nn.Module:
        raise error

    return raise_it


def test_the_parameters_without_a_rule_are_read_from_the_error(
    batch: dict[str, Tensor], right: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "2 trainable parameters have no per-example gradient rule:\n  a.scale: Own\n  a.c: Other (an expert)\nWrap"
    monkeypatch.setattr(checking, "wrap_any", raising(dpft.UnsupportedModuleError(text)))
    found = judge(build_model(LLAMA), batch, right, "auto")
    assert found["status"] == REFUSED
    assert found["lacking"] == [["a.scale", "Own"], ["a.c", "Other"]]


def test_another_error_is_a_crash(batch: dict[str, Tensor], right: Expected, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "wrap_any", raising(ValueError("first\nlast")))
    found = judge(build_model(LLAMA), batch, right, "auto")
    assert (found["status"], found["reason"]) == (CRASH, "ValueError: last")


class Mixing(nn.Module):
    """Adds the batch's mean to each row."""

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutput:
        x = nn.functional.one_hot(input_ids, 64).double()
        return CausalLMOutput(logits=x + x.mean(0, keepdim=True))


def test_a_model_that_mixes_its_rows_is_seen(batch: dict[str, Tensor]) -> None:
    assert dependence(build_model(LLAMA), batch) < 1e-12
    assert dependence(Mixing(), batch) > 0.1


def test_a_family_that_is_not_built_says_why() -> None:
    row = check("gemma4_assistant", "causal_lm", "Gemma4AssistantForCausalLM")
    assert (row["status"], "another model's" in row["reason"]) == (NOT_BUILT, True)
    assert not failed(row)


def made_up(**status: str) -> dict[str, Any]:
    """A row as :func:`check` makes it."""
    base = {"error": 0.5, "where": "a.weight", "reason": "why", "lacking": [["a.scale", "Own"]], "chose": "two_pass"}
    strategies = {s: {**base, "status": status.get(s, EXACT)} for s in STRATEGIES}
    row = {"model_type": "odd", "head": "causal_lm", "class": "Odd", "status": CHECKED, "mode": "train", "frozen": 0}
    row |= {"dependence": 1.0, "dependence_unpadded": 0.0, "without_gradient": ["b"], "parameters": 3}
    return {**row, "strategies": strategies, "cost": {"strategy": "one_pass", "flops": 30, "plain_flops": 20}}


@pytest.mark.parametrize(
    ("status", "fails"),
    [({}, False), ({"one_pass": REFUSED}, False), ({"auto": WRONG}, True), ({"auto": CRASH}, True)],
)
def test_wrong_and_crash_fail_the_command_and_stand_out(status: dict[str, str], fails: bool) -> None:
    row = made_up(**status)
    assert failed(row) is fails
    assert failed({"status": CRASH}) and not failed({"status": NOT_BUILT})
    found = {"versions": {"torch": "2", "transformers": "5"}, "python": "3", "commit": "0" * 40, "dirty": False}
    text = markdown({"conditions": found, "list": "causal_lm", "families": [row]})
    assert ("**WRONG**" in text, "**CRASH**" in text) == (status == {"auto": WRONG}, status == {"auto": CRASH})
    assert "1.50 x one-pass" in text and "*padding*" in text and "1 of 3 without gradient" in text
    assert ("lacks Own.scale" in text) == ("one_pass" in status)
    assert ("| exact: two-pass |" in text) == ("auto" not in status)
    assert any(line.startswith(("WRONG odd", "CRASH odd")) for line in summary([row])) is fails


def test_mistakes_on_the_command_line_are_found(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--only", "lama"], ["--jobs", "0"], ["--markdown", "table.txt"]):
        with pytest.raises(SystemExit) as stopped:
            main(None, arguments)
        assert stopped.value.code == 2
        assert capsys.readouterr().err.startswith("check_models: ")


@pytest.mark.slow
def test_the_command_writes_both_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    json_file, table = tmp_path / "models.json", tmp_path / "models.md"
    only = ["--only", "llama", "gemma4_assistant"]
    assert main(None, [*only, "--json", str(json_file), "--markdown", str(table)]) == 0
    rows = json.loads(json_file.read_text())["families"]
    assert [(row["model_type"], row["status"]) for row in rows] == [
        ("gemma4_assistant", NOT_BUILT),
        ("llama", CHECKED),
    ]
    assert {rows[1]["strategies"][s]["status"] for s in STRATEGIES} == {EXACT}
    assert 1.0 <= rows[1]["cost"]["flops"] / rows[1]["cost"]["plain_flops"] < 1.05
    assert "| llama | exact | exact | exact | exact: one-pass |" in table.read_text()
    assert main(None, ["--only", "llama", "--seconds", "0.01"]) == 1
    assert "CRASH llama: stopped after 0 s" in capsys.readouterr().out
