"""Records of the usual conversation formats as one form: messages with roles, and the tools that they may call.

Errors name a message by its number, counted from 1, and never repeat what it says: records are private.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]

# The columns that make up each format; auto needs those of one format.
COLUMNS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
}
FORMATS = ("auto", *COLUMNS)

_CALL = "function_call"  # ShareGPT: a turn of the assistant whose value is the call, as JSON
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model"), "assistant"),
    **dict.fromkeys(("tool", "function", "ipython", "observation", "function_response"), "tool"),
    _CALL: "assistant",
}
_KEPT = ("name", "tool_call_id", "reasoning_content")  # templates read them


@dataclass(frozen=True)
class Conversation:
    """One record: one example, and the unit that is protected.

    Attributes:
        messages: each with ``role`` (system, user, assistant or tool) and ``content``, text; an assistant's may have
            ``tool_calls``, a list of ``{"type": "function", "function": {"name": ..., "arguments": {...}}}``.
        tools: JSON schemas of what may be called; None if there are none.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None

    @property
    def last_answer(self) -> int:
        """Position of the last message of the assistant."""
        return max(i for i, message in enumerate(self.messages) if message["role"] == "assistant")


def detect(columns: Sequence[str], wanted: str = "auto") -> str:
    """The format of records with these columns: the one that was asked for, or the only one that they can be.

    Raises:
        ValueError: a column of the format is missing; or ``auto``, and the columns are of no format, or of several.
    """
    found = [name for name, needed in COLUMNS.items() if set(needed) <= set(columns)]
    if wanted in found or (wanted == "auto" and len(found) == 1):
        return wanted if wanted in found else found[0]
    have = f"the data has the columns {', '.join(columns)}"
    if wanted != "auto":
        raise ValueError(f"--format {wanted}: {have}; expected {' and '.join(COLUMNS[wanted])}.")
    if found:
        raise ValueError(f"--format auto: {have}, which is {' and also '.join(found)}. Name one of them by --format.")
    known = "; ".join(f"{name}: {' and '.join(needed)}" for name, needed in COLUMNS.items())
    raise ValueError(f"--format auto: {have}; expected those of a format ({known}). Rename the columns.")


def conversation(record: Mapping[str, Any], kind: str) -> Conversation:
    """The conversation that a record holds.

    Keys whose value is null are left out, also inside tools and calls: where an Arrow table has a struct column,
    each record has the keys of all others, with nulls, and what a record becomes must depend on it alone.

    Args:
        record: a row of the data, of which the columns of the format are read, ``tools`` (a list, or JSON), and in
            ``sharegpt`` and ``alpaca`` also ``system``, the system prompt.
        kind: a key of ``COLUMNS``.

    Raises:
        ValueError: a column or a message has another type than the format's, a role is unknown, a content is missing,
            there is no turn of the assistant, or ``weight`` excludes a message from the loss.
    """
    if kind == "messages":
        messages = _turns(record.get("messages"), "messages")
    elif kind == "sharegpt":
        messages = [*_system(record), *_turns(record.get("conversations"), "conversations")]
    elif kind == "prompt_completion":
        messages = [
            *_turns_or_text(record.get("prompt"), "prompt", "user"),
            *_turns_or_text(record.get("completion"), "completion", "assistant"),
        ]
        if messages and messages[-1]["role"] != "assistant":
            raise ValueError("the completion ends with another role; expected a message of the assistant at its end")
    else:
        asked = [_text(record.get("instruction"), "instruction"), _text(record.get("input") or "", "input")]
        messages = [
            *_system(record),
            {"role": "user", "content": "\n\n".join(part for part in asked if part)},
            {"role": "assistant", "content": _text(record.get("output"), "output")},
        ]
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("there is no message of the assistant; expected at least one, which is what is learnt")
    return Conversation(messages, _tools(record.get("tools")))


def _text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{column!r} holds {type(value).__name__}, expected text")
    return value


def _system(record: Mapping[str, Any]) -> list[Message]:
    """The message of the column ``system``, unless it is empty."""
    prompt = record.get("system")
    return [{"role": "system", "content": _text(prompt, "system")}] if prompt else []


def _turns_or_text(value: Any, column: str, role: str) -> list[Message]:
    return [{"role": role, "content": value}] if isinstance(value, str) else _turns(value, column)


def _turns(value: Any, column: str) -> list[Message]:
    """A list of messages, or JSON of one, as columns of CSV files have it."""
    found = _parsed(value, repr(column)) if isinstance(value, str) else value
    if not isinstance(found, Sequence) or not all(isinstance(item, Mapping) for item in found):
        raise ValueError(f"{column!r} holds {type(found).__name__}, expected a list of messages")
    return [_message(_without_nulls(item), number) for number, item in enumerate(found, 1)]


def _message(given: Mapping[str, Any], number: int) -> Message:
    """One message, by the names of OpenAI (role, content) or of ShareGPT (from, value)."""
    what = f"message {number}"
    role = given.get("role", given.get("from"))
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(
            f"{what} has no role that is known; expected one of {', '.join(ROLES)}, as 'role' (or 'from')"
        )
    if given.get("weight", 1) != 1:
        raise ValueError(f"{what} has a weight, which --train-on does not read; leave it out of the record")
    message: Message = {"role": ROLES[role], **{key: given[key] for key in _KEPT if key in given}}
    content = given.get("content", given.get("value"))
    if role == _CALL:
        message["tool_calls"], content = _calls(_parsed(content, what), what), ""
    elif calls := given.get("tool_calls"):
        message["tool_calls"] = _calls(calls, what)
    if content is None and "tool_calls" not in message:
        raise ValueError(f"{what} has no content; expected text, as 'content' (or 'value')")
    return {**message, "content": _content(content, what)}


def _content(content: Any, what: str) -> str:
    """Text, or the texts of a list of parts; nothing beside a call of a tool is the empty text."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, Sequence) and all(isinstance(part, Mapping) for part in content):
        if all(isinstance(part.get("text"), str) and part.get("type", "text") == "text" for part in content):
            return "".join(part["text"] for part in content)
        raise ValueError(f"{what} has parts that are no text (images, audio ...); expected text only")
    raise ValueError(f"{what} has a content of type {type(content).__name__}, expected text")


def _calls(calls: Any, what: str) -> list[dict[str, Any]]:
    """Calls of tools in the form that templates expect: arguments as an object, which may be given as its JSON."""
    made = []
    for call in _parsed(calls, what) if isinstance(calls, str) else calls if isinstance(calls, Sequence) else [calls]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name, str):
            raise ValueError(f"{what} has a call of a tool without a name; expected a name and arguments")
        arguments = function.get("arguments", {})
        arguments = _parsed(arguments, what) if isinstance(arguments, str) else arguments
        if not isinstance(arguments, Mapping):
            raise ValueError(f"{what} has a call of a tool whose arguments are no object")
        known = {"id": call["id"]} if "id" in call else {}
        made.append({**known, "type": "function", "function": {"name": name, "arguments": dict(arguments)}})
    return made


def _tools(value: Any) -> list[dict[str, Any]] | None:
    found = _parsed(value, "'tools'") if isinstance(value, str) and value.strip() else value or None
    if found is None:
        return None
    if not isinstance(found, Sequence) or isinstance(found, str):
        raise ValueError(f"'tools' holds {type(found).__name__}, expected a list of JSON schemas")
    tools = [_parsed(tool, "'tools'") if isinstance(tool, str) else _without_nulls(tool) for tool in found]
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError("'tools' has an element that is no object, expected a list of JSON schemas")
    return tools or None


def _parsed(text: Any, what: str) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError):
        raise ValueError(f"{what} holds what should be JSON and is not") from None  # its message has the content


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, (list, tuple)):
        return [_without_nulls(inner) for inner in value]
    return value
