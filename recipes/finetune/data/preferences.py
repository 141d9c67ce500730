"""Preference pairs: a prompt, the completion that was chosen and the one that was rejected. A pair is one example.

Its two rows begin with the same prompt. What the pair becomes depends on the pair alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from finetune.data.chat_template import render
from finetune.data.conversations import Conversation, conversation
from finetune.data.documents import IGNORED_LABEL

SIDES = ("chosen", "rejected")


def encode(record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, seq_len: int) -> dict[str, Any]:
    """Turn a record into the two rows of an example.

    Args:
        record: ``prompt``, ``chosen`` and ``rejected``, all text; or ``chosen`` and ``rejected`` as lists of messages,
            after a ``prompt`` (text or messages) or with the prompt as their common beginning, and ``tools`` if any.
        tokenizer: of the model; with a chat template where there are messages.
        seq_len: largest number of tokens of a row, at least 2.

    Returns:
        ``input_ids``, those of the chosen row and then those of the rejected one; ``chosen_tokens`` and
        ``prompt_tokens``, the lengths of the chosen row and of the prompt at the beginning of both. The completions
        begin where the tokens of a whole row are no longer those of the prompt alone, as in TRL 1.16. Of a pair that
        is too long the prompt loses its beginning, down to half of ``seq_len``; then the completions lose their ends.

    Raises:
        ValueError: a column is missing or of another type, or the chat template refuses the messages.
    """
    if all(isinstance(record.get(side), str) for side in SIDES):
        prompt, *whole = _texts(record, tokenizer)
    else:
        prompt, *whole = _conversations(record, tokenizer)
    shared = min(_in_common(prompt, row) for row in whole)
    completions = [row[shared:] for row in whole]
    prompt = _end_of(prompt[:shared], max(seq_len // 2, seq_len - max(map(len, completions))), tokenizer.bos_token_id)
    chosen, rejected = ([*prompt, *completion][:seq_len] for completion in completions)
    return {"input_ids": [*chosen, *rejected], "chosen_tokens": len(chosen), "prompt_tokens": len(prompt)}


def _in_common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Number of elements with which both begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _end_of(prompt: list[int], tokens: int, bos: int | None) -> list[int]:
    """The last tokens of a prompt, after its BOS token if it has one."""
    if len(prompt) <= tokens:
        return prompt
    head = prompt[:1] if prompt[0] == bos and tokens > 1 else []
    return [*head, *prompt[len(prompt) - tokens + len(head) :]]


def _texts(record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokens of the prompt, of the chosen and of the rejected row, each of which ends with the end token."""
    prompt = record.get("prompt")
    if not isinstance(prompt, str):
        raise ValueError(
            f"'chosen' and 'rejected' are text, and 'prompt' is {_kind(prompt)}; expected text. A prompt that is part "
            "of them is found only in lists of messages"
        )
    alone, *whole = (tokenizer(prompt + (record[side] if side else ""))["input_ids"] for side in ("", *SIDES))
    end = tokenizer.eos_token_id
    return [alone, *([*row, end] if end is not None and row[-1:] != [end] else row for row in whole)]


def _conversations(record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The same of lists of messages, as the chat template writes them."""
    for side in SIDES:
        if not isinstance(record.get(side), list | tuple):
            raise ValueError(
                f"{side!r} is {_kind(record.get(side))}; expected 'chosen' and 'rejected' to be both text, or both a "
                "list of messages"
            )
    prompt, tools = record.get("prompt"), record.get("tools")
    if prompt and not _begin_with_prompt(record):
        parts = [{"prompt": prompt, "completion": record[side], "tools": tools} for side in SIDES]
        talks = [conversation(part, "prompt_completion") for part in parts]
        asked = len(conversation({"prompt": prompt, "completion": ""}, "prompt_completion").messages) - 1
    else:
        talks = [conversation({"messages": record[side], "tools": tools}, "messages") for side in SIDES]
        # equal conversations differ nowhere: their last message is then the completion
        asked = _in_common(*(talk.messages[:-1] for talk in talks))
    for side, talk in zip(SIDES, talks, strict=True):
        if talk.messages[-1]["role"] != "assistant":
            raise ValueError(f"{side!r} ends with another role; expected a message of the assistant at its end")

    def tokens(talk: Conversation, messages: int, prompt: bool = False) -> list[int]:
        text = render(tokenizer, talk.messages[:messages], talk.tools, prompt)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    alone = tokens(talks[0], asked, prompt=True) if asked else []
    return [alone, *(tokens(talk, len(talk.messages)) for talk in talks)]


def _begin_with_prompt(record: Mapping[str, Any]) -> bool:
    """Whether the completions are whole conversations, and the column ``prompt`` repeats how they begin."""
    first: list[Any] = [next(iter(record[side]), None) for side in SIDES]
    return all(isinstance(m, Mapping) and m.get("role", m.get("from")) in ("user", "system", "human") for m in first)


def _kind(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"


def tokenise_pairs(records: Dataset, tokenizer: PreTrainedTokenizerBase, seq_len: int, part: str) -> Dataset:
    """Turn every record into one example: see :func:`encode`.

    Args:
        records: pairs.
        tokenizer: of the model.
        seq_len: largest number of tokens of a row.
        part: what to call the records in messages, such as training.

    Returns:
        As many rows in the same order, with ``place``, the number of the row, besides what ``encode`` returns. None is
        dropped for what it holds, since the number of examples would then depend on them.

    Raises:
        ValueError: what is wrong with which record, by its number; nothing of what is in it.
    """
    missing = [side for side in SIDES if side not in records.column_names]
    if missing:
        raise ValueError(
            f"the data has the columns {', '.join(records.column_names)}, and no {missing[0]!r}; expected prompt, "
            "chosen and rejected. Rename the columns."
        )

    def make(record: Mapping[str, Any], place: int) -> dict[str, Any]:
        try:
            return {**encode(record, tokenizer, seq_len), "place": place}
        except ValueError as error:
            raise ValueError(f"{part} record {place + 1}: {error}.") from None

    return records.map(make, with_indices=True, remove_columns=records.column_names, desc=None)


class PairCollate:
    """From pairs to a batch of their rows, with the start model's log-probabilities beside them.

    Args:
        rows: makes a batch of rows with ``input_ids`` and ``labels``.

    Attributes:
        reference: ``[N, 2]`` float32, summed log-probabilities of the completions in nats, by ``place``; None before
            they are known. They are functions of the private records, and stay on the training machine.
    """

    def __init__(self, rows: Callable[[Sequence[dict[str, Any]]], dict[str, Tensor]]) -> None:
        self.rows = rows
        self.reference: Tensor | None = None

    def __call__(self, pairs: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Batch of 2 U rows, of pair 0 the chosen one, then the rejected one, of pair 1 ...

        Returns:
            ``input_ids``, ``attention_mask``, ``labels`` ``[2 U, T]`` int64 (-100 on the prompt and on padding),
            ``example_ids`` and ``places`` ``[2 U]``, and with a reference ``reference`` ``[2 U]`` float32.
        """
        rows = []
        for pair in pairs:
            whole, prompt = pair["input_ids"], pair["prompt_tokens"]
            for ids in (whole[: pair["chosen_tokens"]], whole[pair["chosen_tokens"] :]):
                rows.append({"input_ids": ids, "labels": [IGNORED_LABEL] * prompt + ids[prompt:]})
        batch = self.rows(rows)
        batch["example_ids"] = torch.arange(len(pairs)).repeat_interleave(2)
        batch["places"] = torch.tensor([pair["place"] for pair in pairs]).repeat_interleave(2)
        if self.reference is not None:
            batch["reference"] = self.reference[batch["places"][::2]].flatten()
        return batch
