"""sft_dp.py: the gradient is that of the assistant's tokens, and the recipe as a person runs it."""

from __future__ import annotations

import gc
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import dpft
import llama_dp
import sft_dp
from finetune.chats import ChatOptions
from finetune.data.chat import Chat
from finetune.data.chat_template import PLAIN, render
from finetune.data.conversations import Conversation
from finetune.data.dialogues import docstring_chats
from finetune.data.examples import make_collate
from finetune.options import BASE_MODEL
from finetune.parsing import parse
from tests import oracle
from tests.engines.launching import ROOT, launch, succeed

LAUNCHED = ROOT / "tests" / "engines" / "recipe_on_cpu.py"
SMALL = ["--expected-batch-size", "12", "--max-eval-examples", "8", "--sample-tokens", "3", "--seq-len", "48"]
SMALL += ["--cpu-threads", "1"]
CLIP = 0.5


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    found = AutoTokenizer.from_pretrained(BASE_MODEL)
    found.chat_template = PLAIN
    return found


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of ninety conversations of one or two exchanges."""
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    rows = []
    for n in range(90):
        turn = [
            {"from": "human", "value": f"Which number is {n}?"},
            {"from": "gpt", "value": f"It is {n}, or nothing."},
        ]
        rows.append({"conversations": turn * (1 + n % 2), "id": n})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# The gradient


def tiny() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 1024, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
    return LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation="eager"))


def by_hand(tokenizer: Any, talk: list[dict[str, str]]) -> dict[str, Tensor]:
    """Gradient of one conversation in float64: each answer's tokens and its end, found by their text, averaged."""
    ids, answers = tokenizer(render(tokenizer, talk), add_special_tokens=False)["input_ids"], []
    for message in talk:
        if message["role"] == "assistant":
            words = tokenizer(message["content"] + "<eos>", add_special_tokens=False)["input_ids"]
            at = next(i for i in range(len(ids)) if ids[i : i + len(words)] == words)
            answers += range(at, at + len(words))
    model = tiny().double()
    with oracle.Float64():
        chances = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        loss = -torch.stack([chances[at - 1, ids[at]] for at in answers]).mean()
        names = [name for name, _ in model.named_parameters()]
        return dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))


TALKS = [
    [
        ("user", "What is this?"),
        ("assistant", "A number."),
        ("user", "Which one?"),
        ("assistant", "The third of them."),
    ],
    [("system", "Answer in one word."), ("user", "Why is it not there?"), ("assistant", "Nothing.")],
]
MESSAGES = [[{"role": role, "content": content} for role, content in talk] for talk in TALKS]


@pytest.mark.parametrize("strategy", ["one_pass", "two_pass"])
def test_the_clipped_sum_is_that_of_the_assistants_tokens(strategy: Any, tokenizer: Any) -> None:
    """Beside them in the batch: a conversation that is cut before its answer, which has no loss and stays."""
    lost = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    grads = [by_hand(tokenizer, talk) for talk in MESSAGES]
    norms = torch.stack([torch.stack([g.norm() for g in grad.values()]).norm() for grad in grads])
    limit = float(norms.mean())  # one is clipped, one is not
    factors = (limit / norms).clamp(max=1.0)
    expected = {name: sum(f * grad[name] for f, grad in zip(factors, grads, strict=True)) for name in grads[0]}

    def found(train_on: str) -> tuple[dict[str, Tensor], Tensor]:
        chat, shorter = Chat(tokenizer, 100, train_on), Chat(tokenizer, 4)
        examples = [chat.encode(Conversation(messages)) for messages in MESSAGES]
        batch = make_collate(0)([*examples, shorter.encode(Conversation(lost))])
        assert set(batch["labels"][2].tolist()) == {-100}
        model = dpft.wrap(tiny().train(), max_grad_norm=limit, strategy=strategy)
        sft_dp.SFT().losses(model, batch).backward()
        return oracle.grads_of(model), dpft.stats(model).norms

    sums, measured = found("assistant")
    assert oracle.relative_error(sums, expected) < 1e-5
    torch.testing.assert_close(measured[:2].double(), norms, rtol=1e-5, atol=0)
    assert measured[2] == 0
    for other in ("all", "completion"):  # what the comparison must tell apart
        assert oracle.relative_error(found(other)[0], expected) > 1e-2


def test_labels_are_padded_and_must_be_as_many_as_the_tokens() -> None:
    examples = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4], "labels": [4]}]
    assert make_collate(9)(examples)["labels"].tolist() == [[-100, 2, 3], [4, -100, -100]]
    rows = make_collate(9, row_tokens=2)(examples)
    assert rows["input_ids"].tolist() == [[1, 2], [2, 3], [4, 9]]
    assert rows["labels"].tolist() == [[-100, 2], [2, 3], [4, -100]]
    with pytest.raises(ValueError, match="one for each token"):
        make_collate(9)([{"input_ids": [1, 2], "labels": [1]}])


def test_the_demonstration_asks_for_each_docstring() -> None:
    rows = docstring_chats(Dataset.from_list([{"name": "json.dumps", "text": "Serialize."}]))
    assert rows[0] == {
        "messages": [
            {"role": "user", "content": "What is json.dumps?"},
            {"role": "assistant", "content": "Serialize."},
        ]
    }
    assert parse([], "", ChatOptions).train_on == "assistant"


# The recipe


def check_result(output: Path, steps: int) -> None:
    ledger = [json.loads(line) for line in (output / "ledger.jsonl").read_text().splitlines()]
    assert sum("release" in line for line in ledger) == steps
    assert AutoModelForCausalLM.from_pretrained(output)(torch.arange(8)[None]).logits.isfinite().all()
    assert AutoTokenizer.from_pretrained(output).chat_template  # with which the model was trained
    card = (output / "README.md").read_text()
    for part in ("one conversation is one example", "recipes/sft_dp.py", "nats a token of the assistant"):
        assert part in card
    assert str(output.parent) not in card


@pytest.mark.slow
def test_ddp_on_two_processes(chats: str, tmp_path: Path) -> None:
    output = tmp_path / "run"
    words = ["--recipe", "sft_dp", "--dataset", chats, "--output-dir", str(output), "--num-steps", "3", *SMALL]
    told = succeed(launch("ddp", LAUNCHED, *words, scratch=tmp_path, timeout=200))
    assert told.count("a record as the model reads it (synthetic") == 1
    assert "«It has eight legs.<eos>»" in told and "sample after: " in told
    check_result(output, 3)


@pytest.mark.slow
def test_lora_in_one_process_with_a_template_of_its_own(
    chats: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text(PLAIN.replace("Assistant:", "It:").replace("message.role | capitalize", "message.role[:1]"))
    output = tmp_path / "run"
    words = ["--dataset", chats, "--num-steps", "2", "--lora-r", "2", "--chat-template", str(template), *SMALL]
    words += ["--train-on", "all", "--format", "sharegpt", "--prompt", "Which number is 3?"]
    assert sft_dp.main([*words, "--output-dir", str(output)]) == 0
    check_result(output, 2)
    card = (output / "README.md").read_text()
    assert "chat_template: mine.jinja" in card and "Which number is 3?" in card
    assert (output / "adapter" / "adapter_model.safetensors").exists()
    of_adapter = (output / "adapter" / "README.md").read_text()
    assert "## Privacy statement" in of_adapter and "## Measured" not in of_adapter
    told = capsys.readouterr().out
    assert "«<bos>u:" in told and '"u:\\nWhich number is 3?\\nIt:\\n' in told  # sampled from the template


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_4_bits_are_trained_exported_and_resumed(records: str, tmp_path: Path) -> None:
    """The recipe checks that the exported model has the loss of the trained one; a resumed one begins where it was."""
    words = ["--dataset", records, "--output-dir", str(tmp_path), "--num-steps", "4", "--lora-r", "4", *SMALL]
    words += ["--load-in-4bit", "--noise-multiplier", "0.1", "--learning-rate", "0.01", "--checkpoint-every", "4"]
    assert llama_dp.main(words) == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(exported.config, "quantization_config") and exported.dtype == torch.float32

    def losses() -> list[float]:
        rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        return [row["validation_loss"] for row in rows if "validation_loss" in row]

    first = losses()
    assert first[-1] < first[0] - 1
    gc.collect()
    assert llama_dp.main([*words, "--resume-from-checkpoint"]) == 0
    assert losses()[-1] == pytest.approx(first[-1], abs=1e-5)


def one_line(words: list[str], output: Path, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        sft_dp.main([*SMALL, "--output-dir", str(output), *words])
    assert stop.value.code == 2 and not output.exists()
    (last,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert last.startswith("sft_dp.py: error:")
    return last


def test_what_cannot_be_done_ends_with_one_line(
    chats: str, records: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    assert "text, id; expected those of a format" in one_line(["--dataset", records], output, capsys)
    assert "expected messages" in one_line(["--dataset", chats, "--format", "messages"], output, capsys)
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.role }}{% endfor %}")
    found = one_line(["--dataset", chats, "--chat-template", str(tmp_path / "t.jinja")], output, capsys)
    assert "--chat-template" in found
    assert "absent.jinja" in one_line(["--dataset", chats, "--chat-template", "absent.jinja"], output, capsys)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b"}\n' * 50 + '{"prompt": "xyzzy", "completion": null}\n')
    found = one_line(["--dataset", str(bad)], output, capsys)
    assert "record 51 (" in found and "'completion' holds NoneType" in found and "xyzzy" not in found
    assert "no validation record" in one_line(["--dataset", chats, "--seq-len", "4"], output, capsys)
    monkeypatch.setattr("finetune.model.importlib.util.find_spec", lambda name: None)
    found = one_line(["--dataset", chats, "--lora-r", "2", "--load-in-4bit"], output, capsys)
    assert "pip install bitsandbytes" in found
    with pytest.raises(SystemExit):
        sft_dp.main(["--load-in-4bit"])
    assert "give --lora-r" in capsys.readouterr().err
