"""Long texts: a folder as records, a document in rows that are one example, and the size of physical batches."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import dpft
import llama_dp
from accelerate import Accelerator
from finetune import evaluation
from finetune.data.documents import document_losses, longest, rows_of, token_counts, tokens_in_memory
from finetune.data.examples import make_collate
from finetune.data.loading import load_texts
from finetune.evaluation import validation_loss
from finetune.materials import choose_physical
from finetune.model import lengthen, load_model
from finetune.options import BASE_MODEL, Options
from finetune.parsing import as_words, parse
from finetune.private import Prepared
from finetune.recipe import Recipe
from tests.oracle import Float64

CONFIG = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
CONFIG |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}


def tiny() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**CONFIG, attn_implementation="eager"))


def documents(*lengths: int) -> list[dict[str, list[int]]]:
    draws = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(1, 61, (n,), generator=draws).tolist()} for n in lengths]


def oracle_gradients(document: list[int], row_tokens: int) -> tuple[float, list[Tensor]]:
    """Loss and gradient of one document in float64: its rows run alone, its tokens' losses averaged by hand."""
    model = tiny().double()
    with Float64():
        losses = []
        for start in range(0, max(1, len(document) - 1), row_tokens - 1):
            row = torch.tensor(document[start : start + row_tokens])
            chances = model(input_ids=row[None]).logits[0].log_softmax(-1)
            losses += [-chances[at, row[at + 1]] for at in range(len(row) - 1)]
        assert len(losses) == len(document) - 1  # each token but the first is predicted once
        loss = torch.stack(losses).mean()
        return loss.item(), list(torch.autograd.grad(loss, list(model.parameters())))


# Folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "documents"
    for number in range(40):
        path = root / f"part{number % 3}" / f"file{number:02}.{('py', 'md', 'TXT')[number % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"Document {number}\nwith lines, und Umlauten: äöü\n", encoding="utf-8")
    for name, content in {
        "part0/picture.png": b"\x89PNG",
        "part0/binary.txt": b"text\0text",
        "part0/latin.txt": "äöü".encode("latin-1"),
        ".git/description.txt": b"hidden",
        "part1/.secret.md": b"hidden",
    }.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(content)
    os.symlink(root / "part0" / "file00.py", root / "part0" / "link.py")
    return root


def test_each_text_file_of_a_folder_is_a_record(folder: Path) -> None:
    train, validation = load_texts(str(folder), validation_share=0.3)
    paths = [*train["path"], *validation["path"]]
    assert sorted(paths) == sorted(path.relative_to(folder).as_posix() for path in folder.glob("part?/file*"))
    assert list(train["path"]) == sorted(train["path"])
    where = train["path"].index("part1/file01.md") if "part1/file01.md" in train["path"] else None
    side = train if where is not None else validation
    found = side[list(side["path"]).index("part1/file01.md")]["text"]
    assert found == "Document 1\nwith lines, und Umlauten: äöü\n"
    assert train.cache_files, "it was read into memory"


def test_a_file_that_changed_is_read_anew(folder: Path) -> None:
    load_texts(str(folder))
    (folder / "part0" / "file00.py").write_text("changed since\n")
    assert any("changed since\n" in side["text"] for side in load_texts(str(folder)))


def test_a_folder_without_documents_says_what_is_one(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"without documents.*\.txt"):
        load_texts(str(tmp_path))


# Rows


@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 8, 9, 15, 16, 40])
def test_rows_predict_each_token_once(tokens: int) -> None:
    ids = list(range(tokens))
    rows = rows_of(ids, 8)
    assert all(len(row) <= 8 for row in rows)
    assert [token for row in rows for token in row[1:]] == ids[1:]
    assert all(first[-1] == second[0] for first, second in itertools.pairwise(rows))
    padded = make_collate(0, row_tokens=8)([{"input_ids": ids}])["input_ids"]
    assert padded.numel() == max(1, tokens_in_memory(tokens, 8))


def test_rows_of_several_documents_name_their_document() -> None:
    batch = make_collate(0, row_tokens=4)(documents(3, 10, 0, 4))
    assert batch["example_ids"].tolist() == [0, 1, 1, 1, 2, 3]
    assert batch["input_ids"].shape == (6, 4)
    assert batch["labels"][4].tolist() == [-100] * 4


@pytest.mark.parametrize("strategy", ["one_pass", "two_pass"])
def test_losses_and_norms_of_documents_in_rows_are_the_oracles(strategy: Any) -> None:
    """A document's loss is one mean over the tokens of all its rows, however many the last of them has."""
    examples = documents(5, 20, 9, 8, 17)
    expected = [oracle_gradients(example["input_ids"], 8) for example in examples]
    clip = 0.5 * min(float(torch.cat([g.flatten() for g in grads]).norm()) for _, grads in expected)
    summed = [torch.zeros_like(g) for g in expected[0][1]]
    norms = []
    for _, grads in expected:
        norms.append(float(torch.cat([g.flatten() for g in grads]).norm()))
        summed = [total + g * min(1.0, clip / norms[-1]) for total, g in zip(summed, grads, strict=True)]
    model = dpft.wrap(tiny(), max_grad_norm=clip, strategy=strategy)
    batch = make_collate(0, row_tokens=8)(examples)
    loss = Prepared(model, torch.optim.SGD(model.parameters()), None, Recipe().losses).loss(
        {**batch, "example_weight": torch.ones(len(examples))}
    )
    loss.backward()
    assert loss.item() == pytest.approx(sum(value for value, _ in expected) / len(expected), rel=1e-5)
    torch.testing.assert_close(dpft.stats(model).norms.double(), torch.tensor(norms).double(), rtol=1e-5, atol=0)
    for parameter, total in zip(model.parameters(), summed, strict=True):
        assert (parameter.grad.double() - total).norm() <= 1e-5 * total.norm()


def test_a_mean_of_row_means_would_be_another_loss() -> None:
    """What the test above must tell apart."""
    batch = make_collate(0, row_tokens=8)(documents(17, 10))
    with torch.no_grad():
        logits = tiny()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    of_documents = document_losses(logits, batch["labels"], batch["example_ids"])
    of_rows = document_losses(logits, batch["labels"], torch.arange(len(logits)))
    assert abs(of_documents[1] - of_rows[3:].mean()) > 1e-3 * of_documents[1]


def test_the_loss_of_one_long_text_is_that_from_its_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bare, and wrapped, where the head computes it in chunks."""
    examples, collate = documents(40, 50, 9), make_collate(0)
    expected = validation_loss(tiny(), examples, collate)
    monkeypatch.setattr(evaluation, "TOKENS_AT_ONCE", 20)
    assert validation_loss(tiny(), examples, collate) == pytest.approx(expected, rel=1e-5)
    wrapped = dpft.wrap(dpft.long_context(tiny()), max_grad_norm=1.0)
    assert validation_loss(wrapped, examples, collate) == pytest.approx(expected, rel=1e-5)


# Options


def physical(words: list[str], spread: int = 1) -> Options:
    examples = Dataset.from_dict({"input_ids": [example["input_ids"] for example in documents(3, 20, 11)]})
    accelerator: Any = SimpleNamespace(parallelism_config=SimpleNamespace(sp_size=spread), print=print)
    materials: Any = SimpleNamespace(train=examples)
    return choose_physical(parse(words), materials, accelerator)


@pytest.mark.parametrize(
    ("words", "size"),
    [
        ([], 32),
        (["--max-tokens-in-memory", "65"], 3),  # 65 // 20
        (["--max-tokens-in-memory", "10"], 1),
        (["--max-tokens-in-memory", "65", "--max-physical-batch-size", "7"], 7),
        (["--max-tokens-in-memory", "65", "--pack", "documents", "--seq-len", "8"], 2),  # 3 rows of 8
        (["--max-tokens-in-memory", "65", "--pack", "documents", "--seq-len", "99"], 3),
    ],
)
def test_tokens_in_memory_choose_the_physical_batch(words: list[str], size: int) -> None:
    assert physical(words).max_physical_batch_size == size


def test_lengths_are_those_of_the_selected_examples() -> None:
    examples = Dataset.from_dict({"input_ids": [example["input_ids"] for example in documents(3, 20, 11, 0)]})
    assert longest(examples) == 20
    assert longest(examples.select([0, 2])) == 11
    assert longest(examples.select([3])) == 0
    assert token_counts(examples.select([3, 0])) == [0, len(examples[0]["input_ids"])]
    assert token_counts(documents(3, 7)) == [3, 7]
    assert token_counts(Dataset.from_list([{"chosen": [1]}])) is None


def test_a_spread_sequence_is_one_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert physical(["--max-physical-batch-size", "4"], spread=2).max_physical_batch_size == 1
    assert "physical batches of one example instead of 4" in capsys.readouterr().out
    with pytest.raises(ValueError, match="one long row"):
        physical(["--pack", "documents", "--max-tokens-in-memory", "65", "--seq-len", "8"], spread=2)


@pytest.mark.parametrize(
    "words",
    [
        ["--pack", "documents"],
        ["--pack", "records"],
        ["--max-tokens-in-memory", "1"],
        ["--rope-theta", "0"],
        ["--pack", "documents", "--max-tokens-in-memory", "999", "--seq-len", "8", "--strategy", "per_example"],
    ],
)
def test_what_cannot_be_meant_is_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit):
        parse(words)


def test_the_card_has_no_size_that_follows_from_the_records() -> None:
    words = as_words(parse(["--max-tokens-in-memory", "65"]))
    assert words["max_tokens_in_memory"] == 65 and "max_physical_batch_size" not in words


@pytest.mark.parametrize("lora", [0, 2])
def test_long_context_and_more_positions(lora: int) -> None:
    words = ["--seq-len", "2000", "--long-context", "--lora-r", str(lora)]
    with pytest.raises(ValueError, match=r"1024 positions.*--rope-theta"):
        load_model(parse(words), torch.float32)
    options = parse([*words, "--rope-theta", "500000"])
    model = lengthen(load_model(options, torch.float32), options, Accelerator(cpu=True))
    plain = AutoModelForCausalLM.from_pretrained(BASE_MODEL)
    assert model.config.max_position_embeddings == 2000
    assert model.config.rope_parameters["rope_theta"] == 500000
    ids = torch.arange(60)[None]
    with torch.no_grad():
        assert not torch.allclose(model.eval()(ids).logits, plain(ids).logits, atol=1e-3)
    dpft.long_context(model, off=True)


@pytest.mark.slow
def test_the_recipe_trains_on_documents_in_rows(records: str, tmp_path: Path) -> None:
    """With adapters, in long context, beside the same without privacy; the model is reloaded, its loss the same."""
    output = tmp_path / "run"
    words = ["--dataset", records, "--seq-len", "12", "--pack", "documents", "--max-tokens-in-memory", "96"]
    words += ["--num-steps", "3", "--expected-batch-size", "12", "--max-eval-examples", "4", "--sample-tokens", "2"]
    words += ["--long-context", "--lora-r", "2", "--compare-nonprivate", "--cpu-threads", "1"]
    assert llama_dp.main([*words, "--output-dir", str(output)]) == 0
    card = (output / "README.md").read_text()
    assert "At most 96 tokens of each record" in card and "in rows of at most 12 tokens" in card
    assert "max_physical_batch_size" not in card
    assert AutoModelForCausalLM.from_pretrained(output)(torch.arange(8)[None]).logits.isfinite().all()
    assert llama_dp.main([*words, "--dry-run"]) == 0
