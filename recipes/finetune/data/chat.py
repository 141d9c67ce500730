"""From conversations to examples: tokens, labels on those that are trained, and what is cut from a long one."""

from __future__ import annotations

import bisect
import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from finetune.data.chat_template import Span, marked, render
from finetune.data.conversations import Conversation, Message, conversation
from finetune.data.documents import IGNORED_LABEL

TRAIN_ON = ("all", "assistant", "completion")


@dataclass(frozen=True)
class Chat:
    """How a conversation becomes an example.

    Attributes:
        tokenizer: with a chat template.
        seq_len: largest number of tokens of an example.
        train_on: which tokens have a loss: ``all``; those of the ``assistant``'s turns, with the end of each; those
            of its last turn, the ``completion``.
    """

    tokenizer: PreTrainedTokenizerBase
    seq_len: int
    train_on: str = "assistant"

    def __post_init__(self) -> None:
        """Refuse a tokenizer that does not say which characters a token stands for."""
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"{type(self.tokenizer).__name__} does not tell the characters of its tokens; expected a fast "
                "tokenizer (tokenizer.json)."
            )

    def encode(self, talk: Conversation) -> dict[str, list[int]]:
        """``input_ids`` and ``labels``, as many, at most ``seq_len``; -100 where there is no loss.

        What is too long loses its oldest exchanges (a user's turn and the answers to it), then the beginning of the
        last one, never the system prompt, the tools and the last turn. If these alone are too long, the end is cut:
        an example may be left without a label, and stays, since how many there are must not depend on what they say.
        What follows the assistant's last turn is read by ``all`` only.

        Raises:
            ValueError: the template refuses it, or does not show where the assistant speaks.
        """
        if self.train_on != "all":
            talk = replace(talk, messages=talk.messages[: talk.last_answer + 1])
        kept = self._shortened(talk)
        if self.train_on == "all":
            text = render(self.tokenizer, kept.messages, kept.tools)
            spans = [(0, len(text))]
        else:
            found = marked(self.tokenizer, kept, last_only=self.train_on == "completion")
            text, spans = found.text, found.turns
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, places = encoded["input_ids"], encoded["offset_mapping"]
        trained = _inside(places, spans)
        labels = [token if on else IGNORED_LABEL for token, on in zip(ids, trained, strict=True)]
        chosen = range(len(ids)) if len(ids) <= self.seq_len else self._cut(kept, text, places)
        return {"input_ids": [ids[i] for i in chosen], "labels": [labels[i] for i in chosen]}

    def _length(self, talk: Conversation) -> int:
        text = render(self.tokenizer, talk.messages, talk.tools)
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _shortened(self, talk: Conversation) -> Conversation:
        """Without as many of the oldest exchanges as it takes; the last one stays."""
        head, starts = _exchanges(talk)

        def without(oldest: int) -> Conversation:
            return replace(talk, messages=[*talk.messages[:head], *talk.messages[starts[oldest] :]])

        if len(starts) == 1 or self._length(talk) <= self.seq_len:
            return talk
        # of the numbers from 1 on, the first that fits; of the last one nobody asks
        possible = range(1, len(starts) - 1)
        fits = bisect.bisect_left(possible, True, key=lambda oldest: self._length(without(oldest)) <= self.seq_len)
        return without(1 + fits)

    def _cut(self, talk: Conversation, text: str, places: list[Span]) -> list[int]:
        """Positions of the tokens that stay of a last exchange that is too long."""
        last_turn = marked(self.tokenizer, talk, last_only=True).turns[0][0]
        last = next((i for i, (_, end) in enumerate(places) if end > last_turn), len(places))
        opening = self._opening(talk, text)
        head = last if opening is None else sum(end <= opening for _, end in places[:last])
        room = max(0, self.seq_len - head - (len(places) - last))
        return [*range(head), *range(max(head, last - room), len(places))][: self.seq_len]

    def _opening(self, talk: Conversation, text: str) -> int | None:
        """Characters before the user's words of the last exchange, with system prompt, tools and header.

        Found as what the text has in common with those in which the user says something else. None without a user.
        """
        _, starts = _exchanges(talk)
        asked = [i for i in range(starts[-1], talk.last_answer) if talk.messages[i]["role"] == "user"]
        if not asked:
            return None
        others = []
        for words in ("A", "B"):
            messages: list[Message] = list(talk.messages)
            messages[asked[0]] = {**messages[asked[0]], "content": words}
            others.append(render(self.tokenizer, messages, talk.tools))
        return len(os.path.commonprefix([text, *others]))  # noqa: RUF071  # of characters is what is meant


def _exchanges(talk: Conversation) -> tuple[int, list[int]]:
    """Number of system messages at the beginning, and where each exchange begins, the last with the last answer."""
    roles = [message["role"] for message in talk.messages]
    head = next(i for i, role in enumerate(roles) if role != "system")
    asked = [i for i in range(head, talk.last_answer) if roles[i] == "user" and (i == 0 or roles[i - 1] != "user")]
    return head, sorted({head, *asked})


def _inside(places: list[Span], spans: list[Span]) -> Iterator[bool]:
    """Of each token, whether one of its characters is in a span; both are in order."""
    at = 0
    for start, end in places:
        while at < len(spans) and spans[at][1] <= start:
            at += 1
        yield at < len(spans) and end > start and end > spans[at][0]


def tokenise_chats(records: Dataset, chat: Chat, kind: str, part: str) -> Dataset:
    """Turn every record into one example, as :func:`finetune.data.examples.tokenise` does with texts.

    Args:
        records: of the format ``kind``.
        chat: how.
        kind: a key of :data:`finetune.data.conversations.COLUMNS`.
        part: what to call the records in messages, such as training.

    Returns:
        As many rows in the same order, with ``input_ids`` and ``labels``.

    Raises:
        ValueError: a record is not of the format; says which one, by its number from 1 in the file (or the split),
            and nothing of what is in it.
    """

    def encode(record: Mapping[str, Any], position: int) -> dict[str, list[int]]:
        try:
            return chat.encode(conversation(record, kind))
        except ValueError as error:
            raise _BadRecordError(position, str(error)) from None

    try:
        return records.map(encode, with_indices=True, remove_columns=records.column_names, desc=None)
    except _BadRecordError as error:
        chosen = getattr(records, "_indices", None)  # of the file's rows, where they were divided
        row = error.position if chosen is None else chosen.column(0)[error.position].as_py()
        raise ValueError(f"record {row + 1} ({part}): {error}.") from None


class _BadRecordError(ValueError):
    """What is wrong with a record, and its position among those that are tokenised."""

    def __init__(self, position: int, message: str) -> None:
        super().__init__(message)
        self.position = position


_QUESTION, _ANSWER, _AGAIN = "How many legs does a spider have?", "It has eight legs.", "That is two more than an ant."
SYNTHETIC: dict[str, dict[str, Any]] = {
    "messages": {
        "messages": [
            {"role": "user", "content": _QUESTION},
            {"role": "assistant", "content": _ANSWER},
            {"role": "user", "content": "And an insect?"},
            {"role": "assistant", "content": _AGAIN},
        ]
    },
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": _QUESTION},
            {"from": "gpt", "value": _ANSWER},
            {"from": "human", "value": "And an insect?"},
            {"from": "gpt", "value": _AGAIN},
        ]
    },
    "prompt_completion": {"prompt": _QUESTION, "completion": _ANSWER},
    "alpaca": {"instruction": "Answer the question.", "input": _QUESTION, "output": _ANSWER},
}


def show(chat: Chat, kind: str) -> str:
    """What a record becomes, in lines: a synthetic one of this format, what is trained between « and ».

    Raises:
        ValueError: the template does not work, or the tokens that it would have trained are not the assistant's.
    """
    talk = conversation(SYNTHETIC[kind], kind)
    example = replace(chat, seq_len=10**6).encode(talk)
    ids, labels = example["input_ids"], example["labels"]
    parts = []
    for trained, run in itertools.groupby(range(len(ids)), lambda i: labels[i] != IGNORED_LABEL):
        parts.append((trained, chat.tokenizer.decode([ids[i] for i in run])))
    learnt, other = ("".join(_plain(text) for on, text in parts if on is side) for side in (True, False))
    answers = [_plain(message["content"]) for message in talk.messages if message["role"] == "assistant"]
    answers, unlearnt = (answers[-1:], answers[:-1]) if chat.train_on == "completion" else (answers, [])
    if not all(answer in learnt for answer in answers) or any(answer in learnt for answer in unlearnt):
        raise ValueError(
            f"--train-on {chat.train_on}: with this chat template these would not be the words of the assistant. Give "
            "another one by --chat-template FILE."
        )
    if chat.train_on != "all" and _plain(_QUESTION) not in other:
        raise ValueError(f"--train-on {chat.train_on}: the chat template marks what the user says, too; give another.")
    lines = "".join(f"«{text}»" if on else text for on, text in parts).splitlines()
    shown = ["a record as the model reads it (synthetic; trained: what is between « and »):", *lines]
    if chat.train_on != "all" and any(learnt.endswith(answer) for answer in answers):
        shown.append("note: no token that ends a turn is trained, so that the model does not learn when to stop")
    return "\n".join("    " * (i > 0) + line for i, line in enumerate(shown))


def _plain(text: str) -> str:
    """Without what a tokenizer may change: white space, upper case."""
    return "".join(text.split()).lower()
