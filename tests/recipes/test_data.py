"""From a name on the command line to batches: one record, one example."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM, AutoTokenizer

import dpft
from accelerate import Accelerator
from finetune.data.examples import make_collate, text_column, tokenise
from finetune.data.loading import load_texts
from finetune.options import BASE_MODEL

TEXTS = [f"Record {number}: " + "some words " * (number % 7) for number in range(60)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BASE_MODEL)


def test_built_in_docstrings_split_disjoint(docstrings: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.data.loading.stdlib_docstrings", lambda: docstrings)
    train, validation = load_texts("docstrings")
    assert not set(train["name"]) & set(validation["name"])
    assert not set(train["text"]) & set(validation["text"])


def test_tickets_are_split_by_customer() -> None:
    train, validation = load_texts("tickets", seed=1)
    assert not set(train["customer_id"]) & set(validation["customer_id"])


@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "csv", "parquet", "saved", "saved_dict"])
def test_local_files_and_folders(kind: str, tmp_path: Path) -> None:
    path, records = tmp_path / f"data.{kind}", Dataset.from_dict({"text": TEXTS})
    if kind == "txt":
        path.write_text("\n".join(TEXTS) + "\n")
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    elif kind == "json":
        path.write_text(json.dumps([{"text": text} for text in TEXTS]))
    elif kind == "csv":
        records.to_csv(str(path))
    elif kind == "parquet":
        records.to_parquet(str(path))
    elif kind == "saved":
        records.save_to_disk(str(path))
    else:
        DatasetDict({"train": records.select(range(50)), "validation": records.select(range(50, 60))}).save_to_disk(
            str(path)
        )
    train, validation = load_texts(str(path))
    assert len(train) + len(validation) == len(TEXTS)
    assert not set(train["text"]) & set(validation["text"])
    if kind == "saved_dict":
        assert len(validation) == 10
    assert text_column(train) == "text"


def test_a_missing_file_a_wrong_split_and_a_wrong_column_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        load_texts(str(tmp_path / "absent.jsonl"))
    saved = tmp_path / "saved"
    DatasetDict({"train": Dataset.from_dict({"body": TEXTS, "n": list(range(60))})}).save_to_disk(str(saved))
    with pytest.raises(ValueError, match="it has train"):
        load_texts(str(saved), split="training")
    train, _ = load_texts(str(saved))
    with pytest.raises(ValueError, match="body, n"):
        text_column(train)
    with pytest.raises(ValueError, match="holds int"):
        text_column(train, "n")
    assert text_column(train, "body") == "body"


def test_tokenise_keeps_one_row_for_each_record_and_cuts(tokenizer: Any) -> None:
    records = Dataset.from_dict({"text": ["short", "long " * 200, ""], "other": [1, 2, 3]})
    rows = tokenise(records, tokenizer, 16, "text")
    assert rows.column_names == ["input_ids"]
    ids = rows["input_ids"][:]
    assert len(ids) == 3
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert ids[0][0] == bos and ids[0][-1] == eos
    assert len(ids[1]) == 16 and ids[1][-1] != eos  # cut, so it does not end
    assert ids[2] == [bos, eos]


def test_collate_pads_masks_and_leaves_no_loss_on_padding() -> None:
    batch = make_collate(pad_token_id=9)([{"input_ids": [1, 2, 3]}, {"input_ids": [4]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[1, 2, 3], [4, -100, -100]]
    assert all(tensor.dtype == torch.long for tensor in batch.values())


def test_collate_does_not_take_a_text_token_for_padding() -> None:
    """Many models pad with their end token: a real one at the end of an example is still learnt."""
    batch = make_collate(pad_token_id=2)([{"input_ids": [1, 5, 2]}, {"input_ids": [1, 2]}])
    assert batch["labels"].tolist() == [[1, 5, 2], [1, 2, -100]]


def test_collate_with_a_fixed_length_and_an_empty_example() -> None:
    collate = make_collate(pad_token_id=0, pad_to=4)
    batch = collate([{"input_ids": []}, {"input_ids": [7, 8]}])
    assert batch["input_ids"].shape == (2, 4)
    assert batch["labels"][0].tolist() == [-100] * 4
    assert batch["attention_mask"][0].tolist() == [1, 0, 0, 0]  # no row may attend to nothing
    with pytest.raises(ValueError, match="5 tokens"):
        collate([{"input_ids": [1, 2, 3, 4, 5]}])
    assert make_collate(0, multiple_of=8)([{"input_ids": [1] * 9}])["input_ids"].shape == (1, 16)


def test_examples_stay_on_the_disk(tokenizer: Any, tmp_path: Path) -> None:
    """Larger than memory: what was saved is mapped, and so are the tokens that are made of it."""
    Dataset.from_dict({"text": TEXTS}).save_to_disk(str(tmp_path / "saved"))
    train, validation = load_texts(str(tmp_path / "saved"))
    tokens = tokenise(train, tokenizer, 16, "text")
    assert train.cache_files and tokens.cache_files, "it was read into memory"
    assert len(tokens) == len(train) and len(train) + len(validation) == len(TEXTS)


def test_a_stream_is_refused_with_the_reason() -> None:
    """Poisson sampling draws each example by itself, which needs random access."""
    model = AutoModelForCausalLM.from_pretrained(BASE_MODEL)
    privacy = dpft.PrivacyConfig(
        noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=4, num_steps=1, target_delta=1e-3
    )
    stream = Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()
    with pytest.raises(dpft.PrivacyConfigError, match=r"random access.*map-style"):
        dpft.prepare(Accelerator(cpu=True), model, torch.optim.SGD(model.parameters(), lr=0.1), stream, privacy)
