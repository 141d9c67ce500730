"""tools/check_models.py: small models that prove something, an oracle that agrees with the tests', statuses."""

from __future__ import annotations

import builtins
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
from tools.models.adapters import ADAPTERS, TRAINED_TOKENS, Adapter
from tools.models.building import HEADS, ROWS, Family, alone, build_batch, build_config, build_model, families
from tools.models.checking import CHECKED, CRASH, EXACT, NOT_BUILT, REFUSED, STRATEGIES, WRONG, check, conduct, judge
from tools.models.command import main
from tools.models.lists import LISTS, subjects
from tools.models.oracle import Expected, compare, dependence, expected
from tools.models.precision import DOUBLE, SINGLE, Precision
from tools.models.quantised import QUANTISATIONS, QuantisedBase
from tools.models.report import is_bad, markdown, notes, section_of, summary, trimmed
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
    assert set(LISTS) == {*HEADS, "heads", "adapters", "all"}
    assert {head: len(families(head)) > 30 for head in HEADS} == dict.fromkeys(HEADS, True)
    assert len(subjects("adapters")) == len(ADAPTERS) + len(QUANTISATIONS)
    parts = [subject for name in ("causal_lm", "heads", "adapters") for subject in subjects(name)]
    assert [*map(str, parts)] == [*map(str, subjects("all"))]
    assert len({(subject.name, subject.head) for subject in parts}) == len(parts)


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


@pytest.mark.parametrize("precision", [DOUBLE, SINGLE], ids=lambda precision: precision.name)
def test_a_planted_mistake_is_wrong_and_its_parameter_is_named(
    batch: dict[str, Tensor], precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = getattr(torch, precision.name)
    right = expected(build_model(LLAMA).to(dtype), batch, precision)
    assert judge(build_model(LLAMA).to(dtype), batch, right, "one_pass", precision)["status"] == EXACT
    mistake = 2 * precision.tolerance

    def grow(p: Tensor) -> None:
        assert p.grad is not None
        p.grad *= 1 + mistake

    def scaled(model: nn.Module, max_grad_norm: float, strategy: Any) -> nn.Module:
        model = REAL_WRAP(model, max_grad_norm, strategy)
        dict(model.named_parameters())[PLANTED].register_post_accumulate_grad_hook(grow)
        return model

    monkeypatch.setattr(checking, "wrap_any", scaled)
    found = judge(build_model(LLAMA).to(dtype), batch, right, "one_pass", precision)
    assert (found["status"], found["where"]) == (WRONG, PLANTED)
    assert found["error"] == pytest.approx(mistake, rel=0.05)


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
    row = check(Family("gemma4_assistant", "causal_lm", "Gemma4AssistantForCausalLM"))
    assert (row["status"], "another model's" in row["reason"]) == (NOT_BUILT, True)
    assert not is_bad(row)


def adapter(name: str) -> Adapter:
    (found,) = (each for each in ADAPTERS if each.name == name)
    return found


def test_an_adapter_is_checked_and_its_base_is_frozen() -> None:
    """What it trains are tokens that its batch must have, and that no other batch of the table has."""
    pytest.importorskip("peft")
    subject = adapter("trainable tokens")
    row = check(subject)
    assert row["parameters"] == 1 and "frozen" not in row
    assert {strategy: found["status"] for strategy, found in row["strategies"].items()} == dict.fromkeys(
        STRATEGIES, EXACT
    )
    assert row["depends_on"] == "" and row["without_gradient"] == []
    batch = subject.make_batch(build_config(LLAMA), subject.lengths())
    assert [int(ids[1 + i]) for i, ids in enumerate(batch["input_ids"])] == list(TRAINED_TOKENS)


def test_rows_of_one_length_are_named_and_a_mode_is_kept() -> None:
    subject = adapter("Lily")
    batch = subject.make_batch(build_config(LLAMA), subject.lengths())
    assert batch["attention_mask"].all()
    assert conduct(build_model(LLAMA).eval(), batch) == {"mode": "eval", "depends_on": "padding"}


@pytest.mark.parametrize(
    ("subject", "library"),
    [
        (adapter("LoRA"), "peft"),
        (QuantisedBase("nf4"), "bitsandbytes"),
        (QuantisedBase("torchao int8"), "torchao"),
    ],
    ids=str,
)
def test_without_its_library_a_row_is_not_built(subject: Any, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *arguments: Any, **more: Any) -> Any:
        if name.partition(".")[0] == library:
            raise ImportError(name)
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    monkeypatch.setattr("importlib.import_module", missing)
    row = check(subject)
    assert (row["status"], row["reason"]) == (NOT_BUILT, f"{library} is not installed")


def made_up(**status: str) -> dict[str, Any]:
    """A row as :func:`check` makes it."""
    base = {"error": 0.5, "where": "a.weight", "reason": "why", "chose": "two_pass"}
    strategies: dict[str, Any] = {s: {**base, "status": status.get(s, EXACT)} for s in STRATEGIES}
    for found in strategies.values():
        found["lacking"] = [["a.scale", "Own"]] if found["status"] == REFUSED else []
    row = {"name": "odd", "head": "causal_lm", "class": "Odd", "status": CHECKED, "mode": "train", "frozen": 0}
    row |= {"depends_on": "padding", "without_gradient": ["b"], "parameters": 3}
    return {**row, "strategies": strategies, "cost": {"strategy": "one_pass", "flops": 30, "plain_flops": 20}}


@pytest.mark.parametrize(
    ("status", "fails"),
    [({}, False), ({"one_pass": REFUSED}, False), ({"auto": WRONG}, True), ({"auto": CRASH}, True)],
)
def test_wrong_and_crash_fail_the_command_and_stand_out(status: dict[str, str], fails: bool) -> None:
    row = trimmed(made_up(**status))
    assert is_bad(row) is fails
    assert is_bad({"status": CRASH}) and not is_bad({"status": NOT_BUILT})
    found = {"versions": {"torch": "2", "transformers": "5"}, "python": "3", "commit": "0" * 40, "dirty": False}
    text = markdown({"conditions": found, "list": "causal_lm", "rows": [row]})
    assert ("**WRONG**" in text, "**CRASH**" in text) == (status == {"auto": WRONG}, status == {"auto": CRASH})
    assert "| 1.50 x |" in text and "*padding*" in text and "1 of 3 without gradient" in text
    assert ("**WRONG or CRASH**: odd." in text) is fails
    assert ("### Not exact in every strategy" in text) == bool(status)
    assert ("lacks Own.scale" in text) == ("one_pass" in status)
    assert ("| exact: two-pass |" in text) == (status == {"one_pass": REFUSED})
    assert "`auto` chose two-pass 1 times" in text
    assert any(line.startswith(("WRONG odd", "CRASH odd")) for line in summary([row])) is fails


def test_each_section_has_its_rows_and_its_own_summary() -> None:
    rows = [
        {**made_up(**({"one_pass": REFUSED} if head == "adapter" else {})), "head": head}
        for head in ("causal_lm", "masked_lm", "adapter")
    ]
    found = {"versions": {"torch": "2", "peft": None}, "python": "3", "commit": None, "dirty": True}
    text = markdown({"conditions": found, "list": "all", "rows": [trimmed(row) for row in rows]})
    for row in rows:
        part = text.split(f"\n## {section_of(row)}\n")[1].split("\n## ")[0]
        assert "1 listed, 1 checked" in part
        assert ("| odd (masked LM) |" in part) == (row["head"] == "masked_lm")
        assert ("### Without a rule" in part) == (row["head"] == "adapter")
    assert "torch 2, Python 3, commit unknown, with changes" in text
    assert text.count("| 1 | 1 | 1 exact | 1 exact | 1 exact | 1 exact |") == 2
    assert "| 1 | 1 | 1 refused | 1 exact | 1 exact | 1 exact |" in text


def test_a_row_is_trimmed_of_what_says_nothing() -> None:
    row = trimmed(made_up(one_pass=REFUSED, two_pass=REFUSED, auto=WRONG))
    assert row["strategies"]["one_pass"]["lacking"] and row["strategies"]["one_pass"]["reason"] == "why"
    assert row["strategies"]["two_pass"] == {"status": REFUSED}
    assert notes(row)[0] == "lacks Own.scale"
    other = made_up(one_pass=REFUSED, auto=REFUSED)
    other["strategies"]["auto"]["reason"] = "Another. With advice."
    assert notes(trimmed(other))[:2] == ["lacks Own.scale", "auto: Another"]
    assert (row["strategies"]["auto"]["where"], row["strategies"]["auto"]["error"]) == ("a.weight", 0.5)
    assert row["strategies"]["per_example"].keys().isdisjoint({"error", "where", "chose"})
    assert row["largest_error"] == 0.5


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
    rows = json.loads(json_file.read_text())["rows"]
    assert [(row["name"], row["status"]) for row in rows] == [
        ("gemma4_assistant", NOT_BUILT),
        ("llama", CHECKED),
    ]
    assert {rows[1]["strategies"][s]["status"] for s in STRATEGIES} == {EXACT}
    assert 1.0 <= rows[1]["cost"]["flops"] / rows[1]["cost"]["plain_flops"] < 1.05
    assert "| llama | 1." in table.read_text()
    assert main(None, ["--only", "llama", "--seconds", "0.01"]) == 1
    assert "CRASH llama: stopped after 0 s" in capsys.readouterr().out
