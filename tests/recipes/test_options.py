"""The command line, its aliases, and the YAML file."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Adafactor

import dpft
from finetune.engine import trackers
from finetune.loop import check_optimizer, make_optimizer
from finetune.options import BASE_MODEL, Options
from finetune.parsing import as_words, build_parser, parse, read_yaml

CONFIGS = Path(__file__).resolve().parents[2] / "recipes" / "configs"


def test_the_defaults_are_the_demonstration() -> None:
    options = parse([])
    assert options == Options()
    assert options.model == str(BASE_MODEL) and options.dataset == "docstrings"
    assert options.target_epsilon == 8.0 and options.noise_multiplier is None and options.num_steps


@pytest.mark.parametrize(
    "words",
    [
        ["--model", "m", "--dataset", "d", "--learning-rate", "0.5", "--seq-len", "7", "--bf16"],
        ["--model_name_or_path", "m", "--dataset_name", "d", "--learning_rate", "0.5", "--max_length", "7", "--bf16"],
        ["--model-name-or-path", "m", "--dataset-name", "d", "--learning-rate=0.5", "--seq_len=7", "--bf16"],
    ],
)
def test_hyphens_underscores_and_names_of_trl(words: list[str]) -> None:
    options = parse(words)
    assert (options.model, options.dataset, options.learning_rate, options.seq_len) == ("m", "d", 0.5, 7)
    assert options.bf16 is True


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "seq-len: 64\nlearning_rate: 1e-4\nnum_steps: 5\nbf16: true\nlora_target_modules: [q_proj, v_proj]\n"
    )
    options = parse(["--config", str(file), "--seq-len", "32", "--no-bf16"])
    assert (options.seq_len, options.learning_rate, options.num_steps, options.bf16) == (32, 1e-4, 5, False)
    assert options.lora_target_modules == "q_proj,v_proj"


def test_an_alternative_on_the_command_line_replaces_the_one_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("target_epsilon: 3\nnum_steps: 5\n")
    options = parse(["--config", str(file), "--noise-multiplier", "0.5", "--num-epochs", "2"])
    assert (options.target_epsilon, options.noise_multiplier) == (None, 0.5)
    assert (options.num_steps, options.num_epochs) == (None, 2.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1\n", "closest is 'learning_rate'"),
        ("sequence_len: 1\n", "closest is 'seq_len'"),
        ("seq_len: long\n", "'long'.*expected int"),
        ("seq_len: 1.5\n", "expected int"),
        ("bf16: 1\n", "expected bool"),
        ("seq_len: true\n", "expected int"),
        ("clipping: flsh\n", "expected one of flash"),
        ("- a\n", "expected a mapping"),
        ("seq_len: 3\nmax_length: 4\n", "a second time"),
        ("a: [\n", "not YAML"),
    ],
)
def test_a_wrong_file_is_refused_with_what_to_do(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_yaml(str(file))
    with pytest.raises(SystemExit) as stop:
        parse(["--config", str(file)])
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["--no-such-option"],
        ["--config", "absent.yaml"],
        ["--target-epsilon", "1", "--noise-multiplier", "1"],
        ["--num-steps", "1", "--num-epochs", "1"],
        ["--rank-timeout", "0"],
        ["--seq-len", "1"],
        ["--max-physical-batch-size", "0"],
        ["--validation-share", "1"],
        ["--bf16", "--torch-dtype", "float32"],
        ["--torch-dtype", "float16"],
        ["--attn-implementation", "nosuch"],
        ["--optim", "lomo"],
        ["--with-tracking", "--report-to", "none"],
        ["--save-best", "--eval-every", "0"],
        ["--push-to-hub", "me/model", "--clipping", "none"],
        ["--push-to-hub", "me/model", "--noise-multiplier", "0"],
        ["--seq", "8"],  # no abbreviations: a new option must not change what an old command means
    ],
)
def test_what_cannot_be_meant_is_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit):
        parse(words)


def test_without_clipping_there_is_no_epsilon_to_aim_at() -> None:
    options = parse(["--clipping", "none"])
    assert (options.target_epsilon, options.noise_multiplier) == (None, 0.0)


def test_help_has_groups_and_shows_each_option_once() -> None:
    text = build_parser("What it does.").format_help()
    for group in ("model", "data", "privacy", "execution", "optimisation", "output"):
        assert f"\n{group}:\n" in text
    assert "--learning-rate" in text and "--learning_rate" not in text
    assert text.count("\n  --seq-len") == 1


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_the_files_kept_with_the_recipe_are_valid(path: Path) -> None:
    options = parse(["--config", str(path)])
    assert as_words(options)


def test_as_words_shows_only_what_differs() -> None:
    assert as_words(Options(seq_len=64)).keys() <= {"seq_len", "num_steps"}


def test_the_dtype_of_bf16() -> None:
    assert parse(["--torch-dtype", "bfloat16"]).bf16 and parse(["--dtype", "bfloat16", "--bf16"]).bf16
    assert not parse(["--torch-dtype", "float32"]).bf16


@pytest.mark.parametrize(
    ("words", "cls", "settings"),
    [
        ([], torch.optim.AdamW, {"lr": 5e-3, "betas": (0.8, 0.95), "eps": 1e-8, "weight_decay": 0.0}),
        (["--optim", "adamw_torch", "--weight-decay", "0.1"], torch.optim.AdamW, {"weight_decay": 0.1, "fused": None}),
        (
            ["--optim", "adamw_torch_fused", "--adam-beta1", "0.9"],
            torch.optim.AdamW,
            {"betas": (0.9, 0.95), "fused": True},
        ),
        (["--optim", "sgd", "--learning-rate", "0.5"], torch.optim.SGD, {"lr": 0.5, "momentum": 0}),
        (
            ["--optim", "adamw_bc"],
            dpft.AdamWBC,
            {"lr": 5e-3, "betas": (0.8, 0.95), "weight_decay": 0.0, "floor": 1.0},
        ),
        (["--optim", "adafactor"], Adafactor, {"lr": 5e-3, "relative_step": False, "scale_parameter": False}),
    ],
)
def test_the_optimiser_is_that_of_the_name(words: list[str], cls: type, settings: dict[str, Any]) -> None:
    model = torch.nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    optimizer = make_optimizer(parse(words), model)
    assert type(optimizer) is cls
    assert [p.shape for group in optimizer.param_groups for p in group["params"]] == [model.weight.shape]
    assert {name: optimizer.param_groups[0][name] for name in settings} == settings
    assert make_optimizer(parse(words), model, 0.25).param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize(
    ("optim", "engine", "fine"),
    [
        ("sgd", "zero2", True),
        ("adafactor", "whole", True),
        ("adafactor", "fsdp2", False),
        ("adamw_8bit", "zero3", False),
    ],
)
def test_optimisers_of_whole_tensors_are_refused_where_there_are_shards(
    optim: str, engine: str, fine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.loop.engine_name", lambda accelerator: engine)
    with contextlib.nullcontext() if fine else pytest.raises(ValueError, match=f"{optim} under {engine}"):
        check_optimizer(Options(optim=optim), None)  # type: ignore[arg-type]  # it only asks for the name


def test_trackers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.engine.get_available_trackers", lambda: ["wandb", "tensorboard"])
    found = [
        trackers(parse(words))
        for words in (
            [],
            ["--report-to", "none"],
            ["--with-tracking"],
            ["--report-to", "all"],
            ["--report-to", "tensorboard, wandb"],
        )
    ]
    assert found == [[], [], ["wandb", "tensorboard"], ["wandb", "tensorboard"], ["tensorboard", "wandb"]]
