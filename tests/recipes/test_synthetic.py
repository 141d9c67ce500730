"""Synthetic data: conditions, generation, checks, measures, the data card; the recipe from end to end."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.data.examples import make_collate
from finetune.options import BASE_MODEL
from finetune.synthetic.checks import Rules, check, first_of_similar, valid
from finetune.synthetic.conditions import (
    Conditions,
    conditions_of,
    parse_columns,
    parse_values,
    parse_weights,
    tokenise_conditioned,
    without_prompt_loss,
)
from finetune.synthetic.generation import Sampling, generate

TWO = Conditions({"label": ("a", "b"), "kind": ("x", "y", "other")})
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


def sentence(draw: random.Random, words: int = 30) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(words))


# --- conditions


def test_the_header_names_the_values_and_what_is_not_public_is_other_or_refused() -> None:
    assert TWO.header({"label": "b", "kind": "x", "text": "not read"}) == "label: b | kind: x\n"
    assert TWO.header({"label": "b", "kind": "secret"}) == "label: b | kind: other\n"
    with pytest.raises(ValueError, match="is not among the 2 public ones") as refused:
        TWO.header({"label": "secret", "kind": "x"})
    assert "secret" not in str(refused.value)  # a private value


def test_columns_that_tell_records_apart_are_refused() -> None:
    with pytest.raises(ValueError, match="10,100 combinations"):
        Conditions({"name": tuple(map(str, range(101))), "day": tuple(map(str, range(100)))})


@pytest.mark.parametrize("values", [(), ("a", "a"), ("a | kind: b",), ("a\nb",), ("a\u2028b",), (" ",)])
def test_a_value_that_makes_headers_ambiguous_is_refused(values: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="column 'label'"):
        Conditions({"label": values})


def test_counts_follow_weights_and_add_up() -> None:
    assert TWO.counts(6) == [1] * 6
    assert TWO.counts(8) == [2, 2, 1, 1, 1, 1]
    one = Conditions({"label": ("a", "b", "c")})
    assert one.counts(10, {"a": 3, "b": 1, "c": 0}) == [8, 2, 0]  # 7.5 and 2.5: of equal remainders the first
    assert TWO.counts(8, {"a": 3, "b": 1}) == [2, 2, 2, 1, 1, 0]
    assert all(sum(one.counts(n, {"a": 0.2, "b": 0.7, "c": 0.1})) == n for n in range(40))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1.0}, "1 of the 2 values"),
        ({"a": 0.0, "b": 0.0}, "one above 0"),
        ({"z": 1.0}, "a value of 0 columns"),
        ({"a": -1.0, "b": 1.0}, "at least 0"),
    ],
)
def test_weights_that_are_incomplete_or_of_nothing_are_refused(weights: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TWO.counts(10, weights)


def test_words_of_the_command_line() -> None:
    assert parse_columns("label, kind") == ("label", "kind")
    assert parse_values("a, b", ["label"]) == {"label": ("a", "b")}
    assert parse_values("kind=x;label=a,b", ["label", "kind"]) == {"label": ("a", "b"), "kind": ("x",)}
    assert parse_values('{"label": ["one, two", 3]}', ["label"]) == {"label": ("one, two", "3")}
    assert parse_weights("a=3,b=1") == {"a": 3.0, "b": 1.0} and parse_weights(None) is None
    for words in ("", "label,label"):
        with pytest.raises(ValueError, match="--condition-on"):
            parse_columns(words)
    for words in ('{"label": ', '{"label": "a"}'):
        with pytest.raises(ValueError, match="--values"):
            parse_values(words, ["label"])
    with pytest.raises(ValueError, match="of each of those"):
        parse_values("label=a", ["label", "kind"])
    with pytest.raises(ValueError, match="no value and number"):
        parse_weights("a:3")


def test_values_taken_from_the_data_come_with_a_warning() -> None:
    data = Dataset.from_dict({"text": ["t"] * 3, "label": [2, 1, 2]})
    found, warning = conditions_of([data], ["label"], None)
    assert found.values == {"label": ("1", "2")} and "becomes public" in warning
    found, warning = conditions_of([data], ["label"], "1,2,3")
    assert found.values == {"label": ("1", "2", "3")} and not warning
    with pytest.raises(ValueError, match="the data has the columns text, label"):
        conditions_of([data], ["folder"], None)


def test_the_loss_is_of_the_text_and_the_header_is_what_generation_begins_with() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)
    data = Dataset.from_dict({"text": ["Return the value.", "word " * 90], "label": ["a", "b"], "kind": ["x", "y"]})
    examples = tokenise_conditioned(data, TWO, tokenizer, 40, "text")
    batch = without_prompt_loss(make_collate(0))([examples[0], examples[1]])
    for i, row in enumerate(data):
        head = tokenizer(TWO.header(row))["input_ids"]
        assert batch["input_ids"][i, : len(head)].tolist() == head
        labels = batch["labels"][i]
        assert (labels[: len(head)] == -100).all()
        learnt = labels[labels != -100].tolist()
        assert learnt == examples[i]["input_ids"][len(head) :]
        assert tokenizer.decode(learnt, skip_special_tokens=True) == row["text"][: len(tokenizer.decode(learnt))] or i
    assert examples[0]["input_ids"][-1] == tokenizer.eos_token_id and len(examples[1]["input_ids"]) == 40
    with pytest.raises(ValueError, match="a header has"):
        tokenise_conditioned(data, TWO, tokenizer, 8, "text")


# --- generation


def test_texts_follow_from_the_seed_and_not_from_the_number_of_ranks() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)
    model = AutoModelForCausalLM.from_pretrained(BASE_MODEL)
    headers = ["label: a\n"] * 3 + ["label: a longer value\n"] * 4
    sampling = Sampling(max_new_tokens=6, batch_size=2, seed=3)
    before = torch.random.get_rng_state()
    alone = generate(model, tokenizer, headers, sampling)
    assert torch.equal(before, torch.random.get_rng_state())
    shares = [generate(model, tokenizer, headers, sampling, rank, 2) for rank in range(2)]
    assert all(shares) and sorted(shares[0] + shares[1], key=lambda text: text.position) == alone
    assert [text.position for text in alone] == list(range(7)) and not any("label" in text.text for text in alone)
    assert len({text.text for text in alone}) == 7  # batches of the same headers differ
    model.generation_config.repetition_penalty = 9.0  # a setting of the model's own, which the card would not name
    assert generate(model, tokenizer, headers, sampling) == alone and model.generation_config.repetition_penalty == 9
    other = generate(model, tokenizer, headers, dataclasses.replace(sampling, seed=4))
    assert [text.text for text in other] != [text.text for text in alone]


def test_padding_on_the_left_changes_no_text() -> None:
    """A short header in a batch with a long one is continued as it is alone."""
    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)
    model = AutoModelForCausalLM.from_pretrained(BASE_MODEL)
    cold = Sampling(temperature=1e-4, max_new_tokens=8, batch_size=2)
    (alone,) = generate(model, tokenizer, ["label: a\n"], cold)
    both = generate(model, tokenizer, ["label: a\n", "label: quite a long value, of many tokens\n"], cold)
    assert both[0].text == alone.text


# --- checks


def test_copies_and_formats_are_rejected_and_counted() -> None:
    draw = random.Random(0)
    first, second = sentence(draw), sentence(draw)
    near = first.replace("alpha", "omega", 1)
    texts = [
        first,
        second,
        f"  {first.upper()}\n",
        near,
        "no",
        f"{second} again\nlabel: a",
        f"{second}\ufffd",
        "\x00" * 9,
    ]
    kept, rejected = check(texts, Rules(("label",), min_chars=5))
    assert kept == [0, 1]
    assert rejected == {
        "too short": 1,
        "repeats the header": 1,
        "no valid text": 2,
        "a copy of another one": 1,
        "nearly a copy of another one": 1,
    }
    assert sum(rejected.values()) + len(kept) == len(texts)
    kept, _ = check(texts, Rules(("label",), min_chars=5, near=1.0))
    assert kept == [0, 1, 3]


def test_a_header_is_found_where_it_is_repeated_and_only_there() -> None:
    rules = Rules(("label", "kind"), near=1.0)
    assert check(["A label: it names"], rules)[0] == [0]
    for text in ("label: a\nText", "text\nlabel: b", "words | kind: x"):
        assert check([text], rules)[1] == {"repeats the header": 1}


def test_json_patterns_and_lengths() -> None:
    texts = ['{"a": 1}', '{"a": 1', '{"b": 12345678}']
    assert check(texts, Rules(("label",), form="json"))[0] == [0, 2]
    assert check(texts, Rules(("label",), form="json", must_match='"b"', max_chars=20))[0] == [2]
    assert check(texts, Rules(("label",), max_chars=8))[1] == {"too long": 1}
    for wrong in ({"must_match": "("}, {"near": 0.0}, {"min_chars": 9, "max_chars": 3}):
        with pytest.raises(ValueError, match="--"):
            Rules(("label",), **wrong)
    assert valid("tab\tline\nend") and not valid("bell\a")


def test_minhash_finds_what_all_pairs_find() -> None:
    """Against the comparison of all pairs, on texts around the threshold."""
    draw, texts = random.Random(1), []
    for _ in range(30):
        base = sentence(draw, 40).split()
        texts += [" ".join("changed" if draw.random() < share else word for word in base) for share in (0, 0.02, 0.1)]

    def shingles(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[at : at + 3]) for at in range(len(words) - 2)}

    kept: list[int] = []
    for i, text in enumerate(texts):
        one = shingles(text)
        if not any(len(one & shingles(texts[j])) / len(one | shingles(texts[j])) >= 0.8 for j in kept):
            kept.append(i)
    assert first_of_similar(texts, 0.8) == kept and 30 < len(kept) < 90
