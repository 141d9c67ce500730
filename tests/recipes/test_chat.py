"""From conversations to tokens: what a template makes of them, which tokens are trained, and what is cut."""

from __future__ import annotations

import copy
import importlib.util
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from finetune.data.chat import SYNTHETIC, TRAIN_ON, Chat, show, tokenise_chats
from finetune.data.chat_template import PLAIN, UnstableTemplateError, render, set_template
from finetune.data.conversations import COLUMNS, Conversation, detect
from finetune.options import BASE_MODEL
from tests.recipes.test_conversations import ASKED, LOOKED, SECRET

TURNS = "{% for m in messages %}{{ '[' + m.role + ']' + m.content + '<eos>' }}{% endfor %}"
HEADER = "{% if add_generation_prompt %}[assistant]{% endif %}"
# without marks: an answer is found by what the text has beyond the text of the messages before
UNMARKED = "{{ '(' + (tools | tojson) + ')' if tools else '' }}" + TURNS + HEADER
MARKED = (
    "{% for m in messages %}{{ '[' + m.role + ']' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<eos>' }}{% endgeneration %}{% else %}{{ m.content + '<eos>' }}{% endif %}"
    "{% endfor %}" + HEADER
)
# as Qwen3 does with what was thought: only the last answer has it
FORGETFUL = (
    "{% for m in messages %}{{ '[' + m.role + ']' + ('(hm)' if loop.last and m.role == 'assistant' else '') "
    "+ m.content + '<eos>' }}{% endfor %}" + HEADER
)
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + TURNS + HEADER
)
LEAKING = TURNS.replace("{{", "{% if m.role == 'tool' %}{{ raise_exception('no tool: ' + m.content) }}{% endif %}{{")


@pytest.fixture(scope="module")
def loaded() -> Any:
    return AutoTokenizer.from_pretrained(BASE_MODEL)


def tokenizer_with(template: str | None, loaded: Any) -> Any:
    tokenizer = copy.copy(loaded)
    tokenizer.chat_template = template
    return tokenizer


def in_words(chat: Chat, example: dict[str, list[int]]) -> str:
    """The text of an example, what is trained between « and »."""
    pairs = list(zip(example["input_ids"], example["labels"], strict=True))
    assert all(label in (token, -100) for token, label in pairs)
    words = ""
    for trained, run in itertools.groupby(pairs, lambda pair: pair[1] != -100):
        text = chat.tokenizer.decode([token for token, _ in run])
        words += f"«{text}»" if trained else text
    return words


def say(*turns: str) -> Conversation:
    """A conversation from "user: words" and so on."""
    return Conversation([dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns])


TWO = say("user: How are you?", "assistant: Fine.", "user: And the dog?", "assistant: It is well.", "user: Bye.")


def test_the_number_of_a_bad_record_is_said(loaded: Any) -> None:
    chat = Chat(tokenizer_with(ALTERNATING, loaded), 64)
    rows = [{"messages": ASKED}, {"messages": ASKED}, {"messages": [ASKED[0], ASKED[0], ASKED[1]]}]
    with pytest.raises(
        ValueError, match=r"^record 3 \(training\): the chat template refuses it: roles must alternate\.$"
    ):
        tokenise_chats(Dataset.from_list(rows), chat, "messages", "training")
    chat = Chat(tokenizer_with(LEAKING, loaded), 64)
    talk = [*ASKED, {"role": "tool", "content": SECRET}, ASKED[1]]
    with pytest.raises(ValueError, match=r"record 1 \(validation\): .*TemplateError") as refused:
        tokenise_chats(Dataset.from_list([{"messages": talk}]), chat, "messages", "validation")
    assert SECRET not in str(refused.value)


# Which tokens are trained

ALL = "«[user]How are you?<eos>[assistant]Fine.<eos>[user]And the dog?<eos>[assistant]It is well.<eos>[user]Bye.<eos>»"
BOTH = "[user]How are you?<eos>[assistant]«Fine.<eos>»[user]And the dog?<eos>[assistant]«It is well.<eos>»"
LAST = "[user]How are you?<eos>[assistant]Fine.<eos>[user]And the dog?<eos>[assistant]«It is well.<eos>»"


@pytest.mark.parametrize("template", [UNMARKED, MARKED], ids=["unmarked", "marked"])
@pytest.mark.parametrize(("train_on", "expected"), [("all", ALL), ("assistant", BOTH), ("completion", LAST)])
def test_which_tokens_are_trained(template: str, train_on: str, expected: str, loaded: Any) -> None:
    chat = Chat(tokenizer_with(template, loaded), 1000, train_on)
    example = chat.encode(TWO)
    assert in_words(chat, example) == expected
    text = expected.replace("«", "").replace("»", "")
    assert example["input_ids"] == loaded(text, add_special_tokens=False)["input_ids"]


def test_as_transformers_marks_them(loaded: Any) -> None:
    chat = Chat(tokenizer_with(MARKED, loaded), 1000)
    mine = chat.encode(say("user: Naïve 日本 text", "assistant: 答え: ö\n\nmore", "user: a", "assistant: b"))
    theirs = chat.tokenizer.apply_chat_template(
        say("user: Naïve 日本 text", "assistant: 答え: ö\n\nmore", "user: a", "assistant: b").messages,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert mine["input_ids"] == theirs["input_ids"]
    assert [int(label != -100) for label in mine["labels"]] == theirs["assistant_masks"]


def test_a_template_that_rewrites_earlier_turns_is_refused(loaded: Any) -> None:
    tokenizer = tokenizer_with(FORGETFUL, loaded)
    with pytest.raises(UnstableTemplateError, match="--chat-template"):
        Chat(tokenizer, 1000).encode(TWO)
    with pytest.raises(UnstableTemplateError):
        show(Chat(tokenizer, 1000), "messages")  # before any record is looked at
    chat = Chat(tokenizer, 1000, "completion")
    assert in_words(chat, chat.encode(TWO)).endswith("[assistant]«(hm)It is well.<eos>»")
    assert in_words(chat, chat.encode(say("user: a", "assistant: b"))) == "[user]a<eos>[assistant]«(hm)b<eos>»"


def test_an_answer_before_any_question_needs_marks(loaded: Any) -> None:
    talk = say("assistant: Welcome.", "user: a", "assistant: b")
    with pytest.raises(ValueError, match="begins with the assistant"):
        Chat(tokenizer_with(UNMARKED, loaded), 1000).encode(talk)
    chat = Chat(tokenizer_with(MARKED, loaded), 1000)
    assert in_words(chat, chat.encode(talk)) == "[assistant]«Welcome.<eos>»[user]a<eos>[assistant]«b<eos>»"


def test_calls_of_tools_are_the_assistants(loaded: Any) -> None:
    chat = Chat(tokenizer_with(PLAIN, loaded), 1000)
    talk = Conversation(LOOKED, [{"name": "look"}])
    assert in_words(chat, chat.encode(talk)) == (
        '<bos>Tools:\n[{"name": "look"}]\nUser:\nhi\nAssistant:\n'
        '«{"name": "look", "arguments": {"at": 3}}<eos>»\nTool:\n7\nAssistant:\n«seven<eos>»\n'
    )


def templates_of_trl() -> Path:
    found = importlib.util.find_spec("trl")
    if found is None or found.origin is None or not Path(found.origin).with_name("chat_templates").is_dir():
        pytest.skip("TRL's collection of templates is not installed")
    return Path(found.origin).with_name("chat_templates")


@pytest.mark.parametrize("name", ["llama3", "gemma", "gemma3", "cohere"])
@pytest.mark.parametrize("train_on", ["assistant", "completion"])
def test_real_templates_and_their_marked_forms_agree(name: str, train_on: str, loaded: Any) -> None:
    """Turns found by prefixes are those that TRL's variants of the same templates enclose."""
    folder, words = templates_of_trl(), []
    for file in (f"{name}.jinja", f"{name}_training.jinja"):
        chat = Chat(tokenizer_with((folder / file).read_text(), loaded), 10_000, train_on)
        words.append(in_words(chat, chat.encode(TWO)))
    assert words[0] == words[1] and words[0].count("«") == (2 if train_on == "assistant" else 1)


# What is cut

LONG = say(
    "system: Be kind.",
    *[f"{role}: {role} says number {n}" for n in range(3) for role in ("user", "assistant")],
    "user: the last question has quite some words",
    "assistant: the answer",
)


def test_the_oldest_exchanges_go_first_then_the_left_of_the_last_question_then_the_end(loaded: Any) -> None:
    chat = Chat(tokenizer_with(UNMARKED, loaded), 1000)
    whole = chat.encode(LONG)
    head = loaded("[system]Be kind.<eos>[user]", add_special_tokens=False)["input_ids"]
    last = loaded("the answer<eos>", add_special_tokens=False)["input_ids"]
    seen = []
    for seq_len in range(len(whole["input_ids"]), 0, -1):
        example = replace(chat, seq_len=seq_len).encode(LONG)
        ids, labels = example["input_ids"], example["labels"]
        assert len(ids) == len(labels) <= seq_len
        assert ids[: len(head)] == head[:seq_len]
        if len(head) + len(last) <= seq_len:
            assert ids[-len(last) :] == labels[-len(last) :] == last
        elif len(head) < seq_len:
            assert ids[len(head) :] == labels[len(head) :] == last[: seq_len - len(head)]
        else:
            assert set(labels) == {-100}  # it stays, without a loss
        words = in_words(chat, example)
        if not seen or words.count("number") != seen[-1].count("number"):
            seen.append(words)
    assert [words.count("number") for words in seen] == [6, 4, 2, 0]
    assert "user says number 2" in seen[2] and "number 1" not in seen[2]
    assert (
        seen[-1]
        == "[system]Be kind.<eos>[user]the last question has quite some words<eos>[assistant]«the answer<eos>»"
    )
    middle = loaded("words<eos>[assistant]", add_special_tokens=False)["input_ids"]
    room = len(head) + len(last) + len(middle)
    cut = in_words(chat, replace(chat, seq_len=room).encode(LONG))
    start, end = "[system]Be kind.<eos>[user]", "<eos>[assistant]«the answer<eos>»"
    assert cut.startswith(start) and cut.endswith(end)
    kept = cut.removeprefix(start).removesuffix(end)
    assert kept and kept != "the last question has quite some words"
    assert "the last question has quite some words".endswith(kept)


def test_tools_stay_and_so_do_calls_of_the_last_exchange(loaded: Any) -> None:
    tools = [{"name": "look"}]
    talk = Conversation([*say("user: old words", "assistant: old answer").messages, *LOOKED], tools)
    chat = Chat(tokenizer_with(PLAIN, loaded), 1000)
    shorter = Conversation(LOOKED, tools)
    size = len(chat.encode(shorter)["input_ids"])
    assert replace(chat, seq_len=size).encode(talk) == chat.encode(shorter)
    cut = in_words(chat, replace(chat, seq_len=size - 4).encode(talk))
    assert cut.startswith('<bos>Tools:\n[{"name": "look"}]\nUser:\n') and cut.endswith("«seven<eos>»\n")


def test_no_record_is_left_out(loaded: Any) -> None:
    rows = [{"messages": say("user: " + "word " * n, "assistant: " + "a " * n).messages} for n in range(1, 40)]
    for train_on in TRAIN_ON:
        made = tokenise_chats(
            Dataset.from_list(rows), Chat(tokenizer_with(PLAIN, loaded), 16, train_on), "messages", "training"
        )
        assert len(made) == len(rows) and made.column_names == ["input_ids", "labels"]
        assert all(len(row["input_ids"]) == len(row["labels"]) <= 16 for row in made)


# Templates, and what is shown


def test_what_a_record_becomes_is_shown_by_one_that_is_synthetic(loaded: Any) -> None:
    expected = "<bos>User:\nHow many legs does a spider have?\nAssistant:\n«It has eight legs.<eos>»"
    for kind in COLUMNS:
        shown = show(Chat(tokenizer_with(PLAIN, loaded), 4), kind)  # whole, however short the examples are
        first, *lines = [line.strip() for line in shown.splitlines()]
        assert "synthetic" in first and "note" not in shown
        words = expected.replace("User:\n", "User:\nAnswer the question.\n\n") if kind == "alpaca" else expected
        assert "\n".join(lines).startswith(words)
        assert detect(list(SYNTHETIC[kind])) == kind


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
            "what the user says",
        ),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "turn differently|not be the words"),
        ("{% for m in messages %}{{ m.nothing.at_all }}{% endfor %}", "refuses it: UndefinedError"),
        ("{% for m in messages %}", "refuses it: TemplateSyntaxError"),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}"
            "{% if not messages %}{% generation %}{% endgeneration %}{% endif %}",
            "encloses nothing",
        ),
    ],
)
def test_a_template_that_marks_something_else_is_refused(template: str, message: str, loaded: Any) -> None:
    with pytest.raises(ValueError, match=message):
        show(Chat(tokenizer_with(template, loaded), 1000), "messages")


def test_a_model_that_never_learns_to_stop_is_told_of(loaded: Any) -> None:
    endless = MARKED.replace("{{ m.content + '<eos>' }}{% endgeneration %}", "{{ m.content }}{% endgeneration %}<eos>")
    assert "does not learn when to stop" in show(Chat(tokenizer_with(endless, loaded), 1000), "messages")


def test_choosing_a_template(loaded: Any, tmp_path: Path) -> None:
    tokenizer = tokenizer_with(None, loaded)
    with pytest.raises(ValueError, match=r"'m' has no chat template.*--chat-template plain"):
        set_template(tokenizer, None, "m")
    (tmp_path / "mine.jinja").write_text(MARKED)
    set_template(tokenizer, str(tmp_path / "mine.jinja"), "m")
    assert tokenizer.chat_template == MARKED
    set_template(tokenizer, None, "m")
    assert tokenizer.chat_template == MARKED  # its own
    (tmp_path / "mine.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="UTF-8"):
        set_template(tokenizer, str(tmp_path / "mine.jinja"), "m")
    set_template(tokenizer, "plain", "m")
    assert render(tokenizer, say("user: a").messages, prompt=True) == "<bos>User:\na\nAssistant:\n"
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="end token"):
        set_template(tokenizer, "plain", "m")
