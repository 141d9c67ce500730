"""Chat templates: which one is used, and where in the text that it makes the assistant speaks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from finetune.data.conversations import Conversation, Message

PLAIN = """\
{%- if bos_token is defined %}{{ bos_token }}{% endif %}
{%- if tools %}{{ 'Tools:\\n' + (tools | tojson) + '\\n' }}{% endif %}
{%- for message in messages %}
{{- (message.role | capitalize) + ':\\n' }}
{%- if message.role == 'assistant' %}
{%- generation %}{{ message.content }}
{%- for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}{{ eos_token }}{% endgeneration %}
{{- '\\n' }}
{%- else %}{{ message.content + '\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"""
_MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_FAILS = (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError)  # what a template can raise

Span = tuple[int, int]
"""First character, and the one after the last."""


class UnstableTemplateError(ValueError):
    """What a template makes of a message depends on what follows, so that its place is not to be found."""


def set_template(tokenizer: PreTrainedTokenizerBase, given: str | None, model: str) -> None:
    """Give the tokenizer its chat template, with which it is saved.

    Args:
        tokenizer: of the model, changed in place.
        given: path of a Jinja template; ``plain`` for the built-in one; None for the tokenizer's own.
        model: its name, for messages.

    Raises:
        ValueError: there is no template, the file is no text, or ``plain`` has no end token to end a turn with.
        OSError: the file cannot be read.
    """
    if given == "plain":
        if tokenizer.eos_token is None:
            raise ValueError(
                f"--chat-template plain ends turns by the end token, and {model!r} has none; give a FILE."
            )
        tokenizer.chat_template = PLAIN
    elif given is not None:
        try:
            tokenizer.chat_template = Path(given).expanduser().read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"--chat-template {given!r} is no text in UTF-8; expected a Jinja template.") from error
    elif not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer of {model!r} has no chat template. Give its model's by --chat-template FILE, or take the "
            "simple built-in one by --chat-template plain."
        )


def render(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: Any = None, prompt: bool = False
) -> str:
    """The text of a conversation; with ``prompt``, up to where the assistant begins to speak.

    Raises:
        ValueError: the template refuses it, such as roles that do not alternate.
    """
    return _rendered(tokenizer, messages, tools, prompt)[0]


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: Any, prompt: bool = False, marks: bool = False
) -> tuple[str, list[Span]]:
    """The text, and with ``marks`` what ``{% generation %}`` encloses."""
    template = tokenizer.get_chat_template(None, tools)
    try:
        texts, found = render_jinja_template(
            [messages],
            tools=tools,
            chat_template=template,
            return_assistant_tokens_mask=marks,
            add_generation_prompt=prompt,
            **tokenizer.special_tokens_map,
        )
    except _FAILS as error:
        # what a template says may have the record's words in it, unless the template itself has the sentence
        said = str(error) if str(error) and str(error) in template else type(error).__name__
        raise ValueError(f"the chat template refuses it: {said}") from None
    return texts[0], found[0] if marks else []


@dataclass(frozen=True)
class Marked:
    """The text of a conversation and where the assistant speaks in it.

    Attributes:
        text: of the whole conversation.
        turns: of the assistant, in their order, each with the end of the turn and without its header.
    """

    text: str
    turns: list[Span]


def marked(tokenizer: PreTrainedTokenizerBase, talk: Conversation, last_only: bool) -> Marked:
    """Render a conversation and find the assistant's turns, or its last one.

    By the template's ``{% generation %}`` where it has that. Otherwise a turn is what the text of the messages up to
    it has beyond the text of those before, with the header of an answer; both must be how the whole text begins.

    Raises:
        UnstableTemplateError: they are not.
        ValueError: the template refuses the conversation.
    """
    if _MARKS.search(tokenizer.get_chat_template(None, talk.tools)):
        text, spans = _rendered(tokenizer, talk.messages, talk.tools, marks=True)
        turns: list[Span] = []
        for start, end in spans:
            if turns and start == turns[-1][1]:  # some templates enclose the end of a turn by itself
                turns[-1] = (turns[-1][0], end)
            elif end > start:
                turns.append((start, end))
        if not turns:
            raise ValueError("the chat template encloses nothing of it in {% generation %}")
        return Marked(text, turns[-1:] if last_only else turns)
    text = render(tokenizer, talk.messages, talk.tools)
    turns = []
    for i, message in enumerate(talk.messages):
        if message["role"] != "assistant" or (last_only and i != talk.last_answer):
            continue
        if i == 0:
            raise ValueError(
                "it begins with the assistant, and the chat template has no {% generation %} to say where; expected "
                "another message before, or a --chat-template with it"
            )
        before = render(tokenizer, talk.messages[:i], talk.tools, prompt=True)
        through = text if i + 1 == len(talk.messages) else render(tokenizer, talk.messages[: i + 1], talk.tools)
        if not (text.startswith(before) and text.startswith(through) and len(before) < len(through)):
            raise UnstableTemplateError(
                "the chat template writes a turn differently once others follow, so that the assistant's tokens are "
                "not to be found. Give --chat-template a FILE with {% generation %}, or try --train-on completion"
            )
        turns.append((len(before), len(through)))
    return Marked(text, turns)
