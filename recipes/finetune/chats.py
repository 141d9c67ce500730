"""Tokenizer, conversations and samples of a run on conversations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from accelerate import Accelerator
from finetune.data.chat import TRAIN_ON, Chat, show, tokenise_chats
from finetune.data.chat_template import render, set_template
from finetune.data.conversations import FORMATS, detect
from finetune.data.dialogues import docstring_chats
from finetune.data.documents import IGNORED_LABEL
from finetune.data.examples import make_collate
from finetune.evaluation import choose_examples, sample_text
from finetune.materials import Materials, pad_token, records_of
from finetune.model import load_tokenizer
from finetune.options import BASE_MODEL, Options, again, option

CHATS = "chats"


@dataclass
class ChatOptions(Options):
    """The options of a recipe on conversations."""

    steps: ClassVar[int] = 16
    unused: ClassVar[tuple[str, ...]] = ("text_column", "pack", "audit", "user_column", "records_per_user")

    dataset: str = option(
        CHATS,
        "data",
        "chats (questions about names of Python's standard library, answered by their docstrings), the name of a "
        "dataset on the hub, a folder written by save_to_disk, or a .json, .jsonl, .csv or .parquet file. One "
        "conversation is one example and the unit that is protected",
        also=("dataset_name",),
        metavar="NAME",
    )
    format: str = option(
        "auto",
        "data",
        "columns of the data: messages; sharegpt (conversations); prompt_completion; alpaca (instruction, input, "
        "output); auto goes by their names",
        choices=FORMATS,
    )
    chat_template: str | None = option(
        None,
        "data",
        "a Jinja file in the place of the tokenizer's template, or plain: a simple one for a tokenizer without, which "
        "the demonstration takes",
        metavar="FILE",
    )
    train_on: str = option(
        "assistant",
        "data",
        "tokens that have a loss: those of the assistant's turns, of its last turn (completion), or all",
        choices=TRAIN_ON,
    )
    prompt: str = again(Options, "prompt", "What is json.dumps?")


def chat_materials(options: ChatOptions, accelerator: Accelerator) -> Materials:
    """Load tokenizer and conversations, tokenise them, and print what a record becomes.

    Validation examples have their loss on the assistant's tokens, also where ``--train-on`` is ``all``.
    """
    tokenizer = load_tokenizer(options.model)
    plain = options.chat_template is None and options.model == str(BASE_MODEL)
    set_template(tokenizer, "plain" if plain else options.chat_template, options.model)
    chat = Chat(tokenizer, options.seq_len, options.train_on)
    measured = replace(chat, train_on="assistant") if options.train_on == "all" else chat
    with accelerator.main_process_first():
        if options.dataset == CHATS:
            train, validation = (docstring_chats(part) for part in records_of(replace(options, dataset="docstrings")))
        else:
            train, validation = records_of(options)
        kind = detect(train.column_names, options.format)
        accelerator.print(show(chat, kind))
        show(measured, kind)  # it raises where the assistant's tokens are not to be found
        train = tokenise_chats(train, chat, kind, "training")
        validation = tokenise_chats(validation, measured, kind, "validation")
    chosen = [
        example
        for example in choose_examples(validation, options.max_eval_examples, options.seed)
        if any(label != IGNORED_LABEL for label in example["labels"][1:])
    ]
    if not chosen:
        raise ValueError(
            f"no validation record of {options.dataset!r} has a token of the assistant within --seq-len "
            f"{options.seq_len}; raise it."
        )
    collate = make_collate(pad_token(tokenizer))
    return Materials(tokenizer, train, chosen, collate, collate)


def sample_reply(model: Any, materials: Materials, options: ChatOptions, accelerator: Accelerator) -> str:
    """The conversation that begins with ``--prompt`` as a user's turn, and what the model answers. A collective."""
    asked = render(materials.tokenizer, [{"role": "user", "content": options.prompt}], prompt=True)
    return sample_text(
        model,
        materials.tokenizer,
        asked,
        options.sample_tokens,
        options.seed,
        accelerator,
        special_tokens=False,  # the template has written them
    )
