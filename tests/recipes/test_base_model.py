"""The model kept with the recipe: small, loadable, better than chance, and described."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.data.examples import make_collate
from finetune.evaluation import choose_examples, sample_text, validation_loss
from finetune.options import BASE_MODEL


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(BASE_MODEL)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BASE_MODEL)


def test_it_is_small_and_described() -> None:
    names = {path.name for path in BASE_MODEL.iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= names
    assert sum(path.stat().st_size for path in BASE_MODEL.rglob("*") if path.is_file()) <= 8 * 2**20
    card = (BASE_MODEL / "README.md").read_text(encoding="utf-8")
    assert "held-out loss after training" in card and "pydoc_data" in card


def test_it_is_a_grouped_query_llama(model: Any) -> None:
    assert model.config.model_type == "llama"
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert model.config.vocab_size % 2 == 0


def test_the_tokenizer_gives_back_any_text(tokenizer: Any) -> None:
    text = "Return the päth,\n\tas bytes \x00 or 文字."
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_it_knows_english_better_than_chance(model: Any, tokenizer: Any) -> None:
    text = "The statement is used to define a function. The value of the expression is assigned to the object."
    examples = [{"input_ids": tokenizer(text)["input_ids"]}] * 2
    loss = validation_loss(model, examples, make_collate(tokenizer.pad_token_id))
    assert loss < 0.6 * math.log(model.config.vocab_size)


def test_validation_loss_does_not_depend_on_padding_and_leaves_the_mode(model: Any) -> None:
    examples = [{"input_ids": [1, 50, 60, 70]}, {"input_ids": [1, 80]}]
    model.train()
    short = validation_loss(model, examples, make_collate(0))
    assert model.training
    assert validation_loss(model, examples, make_collate(0, pad_to=32)) == pytest.approx(short, abs=1e-5)
    each = [validation_loss(model, [example], make_collate(0)) for example in examples]
    assert short == pytest.approx((3 * each[0] + each[1]) / 4, abs=1e-6)


def test_choose_examples_is_fixed_and_leaves_out_what_has_no_loss() -> None:
    rows = [{"input_ids": [1, 2]} for _ in range(30)]
    rows[3] = {"input_ids": [1]}
    assert choose_examples(rows, 10, 0) == choose_examples(rows, 10, 0)
    assert len(choose_examples(rows, 100, 0)) == 29


def test_sampling_is_seeded_and_touches_no_other_random_number(model: Any, tokenizer: Any) -> None:
    before = torch.random.get_rng_state()
    texts = {sample_text(model, tokenizer, "Return the", 8, seed) for seed in (0, 0)}
    assert torch.equal(before, torch.random.get_rng_state())
    assert len(texts) == 1 and texts.pop().startswith("Return the")
