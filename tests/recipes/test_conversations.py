"""The formats of conversations, and what of a record is refused."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset

from finetune.data.conversations import conversation, detect

SECRET = "xyzzy"
CALL = {"name": "look", "arguments": '{"at": 3}'}
MADE_CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": 3}}}
LOOKED = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "tool_calls": [MADE_CALL], "content": ""},
    {"role": "tool", "content": "7"},
    {"role": "assistant", "content": "seven"},
]
BE = [{"role": "system", "content": "be"}]
ASKED = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


@pytest.mark.parametrize(
    ("kind", "record", "messages"),
    [
        ("messages", {"messages": ASKED}, ASKED),
        ("messages", {"messages": '[{"role": "human", "content": "hi"}, {"from": "gpt", "value": "ho"}]'}, ASKED),
        ("messages", {"messages": [{"role": "developer", "content": "be"}, *ASKED]}, [*BE, *ASKED]),
        ("messages", {"messages": [ASKED[0] | {"name": None}, ASKED[1] | {"weight": 1}]}, ASKED),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in "hi"]}, ASKED[1]]},
            ASKED,
        ),
        (
            "messages",
            {"messages": [ASKED[0], {"role": "assistant", "tool_calls": [{"function": CALL}]}, *LOOKED[2:]]},
            LOOKED,
        ),
        ("sharegpt", {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}, ASKED),
        ("sharegpt", {"system": "be", "conversations": ASKED}, [*BE, *ASKED]),
        (
            "sharegpt",
            {
                "conversations": [
                    {"from": "human", "value": "hi"},
                    {"from": "function_call", "value": '{"name": "look", "arguments": {"at": 3}}'},
                    {"from": "observation", "value": "7"},
                    {"from": "gpt", "value": "seven"},
                ]
            },
            LOOKED,
        ),
        ("prompt_completion", {"prompt": "hi", "completion": "ho"}, ASKED),
        ("prompt_completion", {"prompt": ASKED[:1], "completion": ASKED[1:]}, ASKED),
        ("prompt_completion", {"prompt": ASKED, "completion": ASKED}, ASKED * 2),
        ("alpaca", {"instruction": "hi", "output": "ho"}, ASKED),
        (
            "alpaca",
            {"instruction": "add", "input": "1 1", "output": "2"},
            [{"role": "user", "content": "add\n\n1 1"}, {"role": "assistant", "content": "2"}],
        ),
        (
            "alpaca",
            {"instruction": "hi", "input": None, "output": "ho", "system": "be"},
            [*BE, *ASKED],
        ),
    ],
)
def test_each_format_becomes_messages(kind: str, record: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    assert detect([*record, "id"]) == detect(list(record), kind) == kind
    assert conversation(record, kind).messages == messages


def test_tools_are_schemas_or_their_json_and_lose_the_nulls_of_other_records() -> None:
    """An Arrow table gives each record the keys of all: what a record becomes must not depend on the others."""
    mine, other = [{"name": "f", "parameters": {"x": {"type": "int"}}}], [{"name": "g", "parameters": {"y": {"z": 1}}}]
    table = Dataset.from_list([{"messages": ASKED, "tools": mine}, {"messages": ASKED, "tools": other}])
    assert "y" in table[0]["tools"][0]["parameters"]  # this is what is to be seen to
    assert conversation(table[0], "messages").tools == mine
    for given in ('[{"name": "f"}]', ['{"name": "f"}'], [{"name": "f"}]):
        assert conversation({"messages": ASKED, "tools": given}, "messages").tools == [{"name": "f"}]
    for nothing in (None, [], "", "[]"):
        assert conversation({"messages": ASKED, "tools": nothing}, "messages").tools is None


@pytest.mark.parametrize(
    ("columns", "wanted", "message"),
    [
        (["messages", "prompt", "completion"], "auto", "messages and also prompt_completion.*--format"),
        (["prompt", "chosen"], "auto", "expected those of a format"),
        (["prompt"], "alpaca", "expected instruction and output"),
    ],
)
def test_columns_of_no_format_or_of_two_are_refused(columns: list[str], wanted: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        detect(columns, wanted)
    assert detect(["messages", "prompt", "completion"], "messages") == "messages"


@pytest.mark.parametrize(
    ("kind", "record", "message"),
    [
        ("messages", {"messages": None}, "holds NoneType"),
        ("messages", {"messages": SECRET}, "JSON"),
        ("messages", {"messages": [SECRET]}, "list of messages"),
        ("messages", {"messages": []}, "no message of the assistant"),
        ("messages", {"messages": ASKED[:1]}, "no message of the assistant"),
        ("messages", {"messages": [*ASKED, {"role": SECRET, "content": "a"}]}, "message 3 has no role that is known"),
        ("messages", {"messages": [*ASKED, {"content": SECRET}]}, "message 3 has no role"),
        ("messages", {"messages": [{"role": "user"}, ASKED[1]]}, "message 1 has no content"),
        ("messages", {"messages": [{"role": "user", "content": 3}, ASKED[1]]}, "message 1 has a content of type int"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image", "url": SECRET}]}]}, "no text"),
        ("messages", {"messages": [ASKED[0], ASKED[1] | {"weight": 0}]}, "weight"),
        ("messages", {"messages": [{"role": "assistant", "tool_calls": [{"function": {"x": SECRET}}]}]}, "a name"),
        (
            "messages",
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{" + SECRET}]}]},
            "JSON",
        ),
        ("messages", {"messages": ASKED, "tools": "{" + SECRET}, "'tools'.*JSON"),
        ("messages", {"messages": ASKED, "tools": {"a": SECRET}}, "'tools' holds dict"),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": SECRET}]}, "message 1.*JSON"),
        ("prompt_completion", {"prompt": "hi", "completion": None}, "'completion' holds NoneType"),
        ("prompt_completion", {"prompt": ASKED[:1], "completion": ASKED[:1]}, "ends with another role"),
        ("alpaca", {"instruction": 3, "output": SECRET}, "'instruction' holds int"),
        ("alpaca", {"instruction": SECRET, "output": None}, "'output' holds NoneType"),
    ],
)
def test_bad_records_are_refused_without_a_word_of_theirs(kind: str, record: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        conversation(record, kind)
    assert SECRET not in str(refused.value) and "\n" not in str(refused.value)
