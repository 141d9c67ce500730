"""preference_dp.py: what a preference pair becomes, and which data and options are refused."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from finetune.data.chat_template import PLAIN
from finetune.data.preferences import encode, tokenise_pairs
from finetune.options import BASE_MODEL
from finetune.parsing import parse
from finetune.preference import PreferenceOptions, docstring_pair
from preference_dp import PreferenceRecipe, main

USER, GOOD, BAD = {"role": "user", "content": "Why?"}, "Because of it.", "No."


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = AutoTokenizer.from_pretrained(BASE_MODEL)
    made.chat_template = PLAIN
    return made


def split(example: dict[str, Any]) -> tuple[list[int], list[int], list[int]]:
    ids, chosen, prompt = example["input_ids"], example["chosen_tokens"], example["prompt_tokens"]
    assert ids[:prompt] == ids[chosen : chosen + prompt]
    return ids[:prompt], ids[prompt:chosen], ids[chosen + prompt :]


def test_texts_end_with_the_end_token(tokenizer: Any) -> None:
    example = encode({"prompt": "Return the", "chosen": " value of x.", "rejected": " nothing"}, tokenizer, 64)
    prompt, chosen, rejected = (tokenizer.decode(part) for part in split(example))
    assert (prompt, chosen, rejected) == ("<bos>Return the", " value of x.<eos>", " nothing<eos>")


def test_the_tokens_are_trls(tokenizer: Any) -> None:
    """A token over the border of prompt and completion belongs to the completion of both rows, as in TRL 1.16."""
    common_prefix_length = pytest.importorskip("trl.data_utils", reason="TRL needs Python 3.11").common_prefix_length
    record = {"prompt": "Return th", "chosen": "e value", "rejected": "is number"}
    alone, good, bad = (tokenizer(record["prompt"] + more)["input_ids"] for more in ("", "e value", "is number"))
    shared = min(common_prefix_length(alone, row) for row in (good, bad))
    assert shared < len(alone), "the test needs a token over the border"
    end = [tokenizer.eos_token_id]
    assert split(encode(record, tokenizer, 64)) == (alone[:shared], good[shared:] + end, bad[shared:] + end)


CONVERSATIONS = {
    "implicit": {"chosen": [USER, answer(GOOD)], "rejected": [USER, answer(BAD)]},
    "explicit": {"prompt": [USER], "chosen": [answer(GOOD)], "rejected": [answer(BAD)]},
    "text before": {"prompt": "Why?", "chosen": [answer(GOOD)], "rejected": [answer(BAD)]},
    "repeated": {"prompt": "Why?", "chosen": [USER, answer(GOOD)], "rejected": [USER, answer(BAD)]},
}


@pytest.mark.parametrize("form", CONVERSATIONS)
def test_conversations_are_the_same_whatever_their_form(form: str, tokenizer: Any) -> None:
    prompt, chosen, rejected = (tokenizer.decode(part) for part in split(encode(CONVERSATIONS[form], tokenizer, 64)))
    assert prompt == "<bos>User:\nWhy?\nAssistant:\n"
    assert (chosen, rejected) == (f"{GOOD}<eos>\n", f"{BAD}<eos>\n")


def test_turns_that_both_completions_begin_with_are_theirs_if_the_prompt_is_given(tokenizer: Any) -> None:
    turns = [answer("Well."), {"role": "user", "content": "So?"}]
    sides = {"chosen": [*turns, answer(GOOD)], "rejected": [*turns, answer(BAD)]}
    prompt, chosen, _ = split(encode({"prompt": [USER], **sides}, tokenizer, 64))
    assert tokenizer.decode(chosen).startswith("Well.")
    whole = {side: [USER, *turn] for side, turn in sides.items()}
    assert len(split(encode(whole, tokenizer, 64))[0]) > len(prompt)


def test_equal_conversations_stay_a_pair(tokenizer: Any) -> None:
    example = encode({"chosen": [USER, answer(GOOD)], "rejected": [USER, answer(GOOD)]}, tokenizer, 64)
    _, chosen, rejected = split(example)
    assert chosen == rejected and tokenizer.decode(chosen) == f"{GOOD}<eos>\n"


@pytest.mark.parametrize(
    ("lengths", "kept"),
    [
        ((3, 4, 2), (3, 4, 2)),  # fits
        ((9, 4, 2), (6, 4, 2)),  # the prompt's end, as much as the longer completion leaves
        ((9, 9, 2), (5, 5, 2)),  # half of the row, and the completion's beginning
        ((2, 20, 20), (2, 8, 8)),  # a short prompt leaves more
        ((20, 1, 1), (9, 1, 1)),
    ],
)
def test_a_long_pair_keeps_the_prompts_end_and_the_completions_beginning(
    lengths: tuple[int, int, int], kept: tuple[int, int, int]
) -> None:
    words = [[f"{part}{i}" for i in range(n)] for part, n in zip("pcr", lengths, strict=True)]
    numbers: dict[str, int] = defaultdict(lambda: len(numbers))

    def tokens(text: str) -> dict[str, list[int]]:
        return {"input_ids": [numbers[word] for word in text.split()]}

    stand_in: Any = type("Words", (), {"__call__": staticmethod(tokens)})()
    stand_in.eos_token_id = stand_in.bos_token_id = None
    record = {
        name: "".join(f" {w}" for w in part)
        for name, part in zip(("prompt", "chosen", "rejected"), words, strict=True)
    }
    example = encode(record, stand_in, 10)
    names = {number: word for word, number in numbers.items()}
    prompt, chosen, rejected = ([names[i] for i in part] for part in split(example))
    assert prompt == words[0][lengths[0] - kept[0] :]
    assert chosen == words[1][: kept[1]] and rejected == words[2][: kept[2]]


def test_a_cut_prompt_keeps_its_first_special_token(tokenizer: Any) -> None:
    record = {"prompt": "Return the value " * 9, "chosen": "of x", "rejected": "of y"}
    example = encode(record, tokenizer, 12)
    prompt, _, _ = split(example)
    assert prompt[0] == tokenizer.bos_token_id and tokenizer.bos_token_id not in prompt[1:]
    assert example["chosen_tokens"] <= 12 and len(example["input_ids"]) - example["chosen_tokens"] <= 12


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": None, "chosen": "secret", "rejected": "b"}, "'prompt' is missing"),
        ({"prompt": "secret", "chosen": "a", "rejected": None}, "'chosen' is a str"),
        ({"prompt": "secret", "chosen": None, "rejected": "b"}, "'chosen' is missing"),
        ({"prompt": 3, "chosen": "secret", "rejected": "b"}, "'prompt' is a int"),
        ({"chosen": [USER, answer("secret")], "rejected": [USER]}, "no message of the assistant"),
        ({"chosen": [USER, answer("secret")], "rejected": [answer("b"), USER]}, "'rejected' ends with another role"),
        ({"chosen": [{"role": "secret", "content": ""}], "rejected": [answer("b")]}, "message 1 has no role"),
    ],
)
def test_a_bad_record_is_named_by_its_number_alone(record: dict[str, Any], message: str, tokenizer: Any) -> None:
    good = {**dict.fromkeys(record, "x"), "chosen": "a", "rejected": "b", "prompt": "c"}

    class Records(list[Any]):
        column_names = ("prompt", "chosen", "rejected")

        def map(self, make: Any, **_: Any) -> list[Any]:
            return [make(item, i) for i, item in enumerate(self)]

    records: Any = Records([good, record])
    with pytest.raises(ValueError, match=message) as raised:
        tokenise_pairs(records, tokenizer, 64, "training")
    assert str(raised.value).startswith("training record 2: ") and "\n" not in str(raised.value)
    assert "secret" not in str(raised.value)


def test_data_without_pairs_are_refused_before_a_run_leaves_anything(
    tmp_path: Any, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["--dataset", "tickets"])
    assert ended.value.code == 2 and not list(tmp_path.iterdir())
    assert "and no 'chosen'" in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_pair_of_the_demonstration_depends_on_its_docstring_alone() -> None:
    texts = [f"Return the value\n  of number {i}, or None  if it is not there." for i in range(20)]
    records = Dataset.from_list([{"text": text, "name": str(i)} for i, text in enumerate(texts)])
    made = list(records.map(docstring_pair))
    assert made[1:] == list(records.select(range(1, 20)).map(docstring_pair))
    for record in made:
        assert record["prompt"] + record["chosen"] == record["text"]
        assert sorted(record["chosen"].split(" ")) == sorted(record["rejected"].split(" "))
        assert record["chosen"] != record["rejected"]
    assert len({record["rejected"].replace(str(i), "") for i, record in enumerate(made)}) > 15, "one order for all"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--beta", "0"], "--beta is 0; expected a finite number above 0"),
        (["--label-smoothing", "0.5"], "expected a share from 0 to below 0.5"),
        (["--sft-weight", "-1"], "expected a finite number of at least 0"),
        (["--loss-type", "ipo", "--label-smoothing", "0.1"], "--label-smoothing is of --loss-type sigmoid"),
        (["--strategy", "per_example"], "a pair has one loss of two"),
        (["--pack", "documents"], "unrecognized arguments"),
        (["--audit", "9"], "unrecognized arguments"),
    ],
)
def test_options_without_a_meaning_are_refused(words: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        parse(words, "", PreferenceOptions)
    assert message in capsys.readouterr().err


def test_the_statement_says_what_a_pair_is() -> None:
    recipe = PreferenceRecipe()
    options = parse(["--dataset", "x.jsonl", "--seq-len", "32"], "", PreferenceOptions)
    unit, rows = recipe.notes(options)
    assert "one preference pair is one example, cut to 64 tokens" in unit and "two rows of at most 32 tokens" in rows
    assert options.row_tokens == 32 and json.dumps(options.loss.__dict__)
