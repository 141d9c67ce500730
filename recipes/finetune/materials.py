"""Tokenizer and examples of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from accelerate import Accelerator
from finetune.data.checks import check_column, summary, values_of
from finetune.data.documents import longest, rows_of, tokens_in_memory
from finetune.data.examples import make_collate, named_text_column, text_column, tokenise
from finetune.data.loading import load_texts
from finetune.data.progress import loading_bars
from finetune.data.users import Collate, Users, group_users, of_users
from finetune.engine import sequence_size
from finetune.evaluation import choose_examples
from finetune.model import load_tokenizer
from finetune.options import DEFAULT_PHYSICAL, Options


@dataclass
class Materials:
    """The public and private inputs of a run.

    Attributes:
        tokenizer: of the model.
        train: tokenised training examples.
        validation: tokenised rows, of one validation example each; what the recipe's ``measure`` takes.
        collate: from a list of rows to a batch, for evaluations.
        collate_train: from a list of examples to a batch; the same, unless an example may have several rows.
    """

    tokenizer: PreTrainedTokenizerBase
    train: Any
    validation: Any
    collate: Callable[..., dict[str, torch.Tensor]]
    collate_train: Callable[..., dict[str, torch.Tensor]]


def records_of(options: Options, check: Callable[[Dataset], object] | None = None) -> tuple[Dataset, Dataset]:
    """The records to train on and to evaluate with, each split of which ``check`` has passed as it was loaded."""
    return load_texts(
        options.dataset,
        options.dataset_config,
        options.split,
        options.validation_split,
        options.validation_share,
        options.seed,
        options.user_column,
        check,
    )


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token to pad with, which is masked and has no loss: any will do."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def by_user(
    options: Options, examples: Dataset, records: Dataset, collate: Collate, accelerator: Accelerator
) -> tuple[Any, Collate]:
    """``--user-column``: what is trained on and how it is collated, with users as examples; without it as given.

    Args:
        options: of the run.
        examples: tokenised, one of each record.
        records: with the column, in the same order.
        collate: of examples.
        accelerator: of the run.

    Raises:
        ValueError: there is no such column.
    """
    if options.user_column is None:
        return examples, collate
    if options.user_column not in records.column_names:
        there = ", ".join(records.column_names)
        raise ValueError(f"--user-column {options.user_column!r}: the data has the columns {there}. Name one of them.")
    names, fresh = values_of(records, options.user_column), options.records_drawn == "afresh"
    users = group_users(examples, names, options.records_per_user, options.seed, fresh)
    accelerator.print(users.summary(options.user_column))
    return users, of_users(collate)


def text_materials(options: Options, accelerator: Accelerator) -> Materials:
    """Load tokenizer and texts, and tokenise them; one rank first, so that the others find the cache."""
    tokenizer = load_tokenizer(options.model)
    with accelerator.main_process_first(), loading_bars(accelerator):
        texts, held_out = records_of(options, lambda records: text_column(records, options.text_column))
        column = named_text_column(texts, options.text_column)
        check_column(held_out, column, "--text-column")
        train: Any = tokenise(texts, tokenizer, options.example_tokens, column)
        validation = tokenise(held_out, tokenizer, options.example_tokens, column)
    if accelerator.is_main_process:
        print(*summary(texts, column, train, options.example_tokens, tokenizer.eos_token_id), sep="\n")
    chosen = choose_examples(validation, options.max_eval_examples, options.seed)
    if not chosen:
        raise ValueError(f"no validation record of {options.dataset!r} has two tokens; choose another --text-column.")
    # the mean over all tokens is that of the rows
    rows = [{"input_ids": row} for example in chosen for row in rows_of(example["input_ids"], options.row_tokens)]
    pad = pad_token(tokenizer)
    collate = make_collate(pad)
    documents = options.in_rows and options.user_column is None
    of_examples = make_collate(pad, row_tokens=options.row_tokens) if documents else collate
    examples, collate_train = by_user(options, train, texts, of_examples, accelerator)
    return Materials(tokenizer, examples, rows, collate, collate_train)


def choose_physical(options: Options, materials: Materials, accelerator: Accelerator) -> Options:
    """The options with the size of physical batches, which changes neither the result nor the privacy.

    It may follow from the longest private record, so that it must not be published: the card has the options as given.

    Raises:
        ValueError: examples in several rows, whose tokens are to be spread over ranks; or ``--user-column``, and the
            recipe has not made users of the records.
    """
    if options.user_column is not None and not isinstance(materials.train, Users):
        raise ValueError("--user-column: the examples of this recipe are no users. Leave it out.")
    given = options.max_physical_batch_size
    if (spread := sequence_size(accelerator)) > 1:
        if options.in_rows:
            if options.user_column:
                raise ValueError(
                    f"sp_size is {spread}, and with --user-column an example has several rows. Use sp_size 1."
                )
            raise ValueError(
                f"sp_size is {spread}, which spreads the tokens of one row, and with --pack documents a document has "
                f"rows of {options.seq_len}. Give a --seq-len of at least --max-tokens-in-memory: one long row."
            )
        instead = f" instead of {given}" if given not in (None, 1) else ""
        accelerator.print(f"sequence parallelism over {spread} ranks: physical batches of one example{instead}")
        return replace(options, max_physical_batch_size=1)
    if given is not None:
        return options
    if options.max_tokens_in_memory is None:
        return replace(options, max_physical_batch_size=max(1, DEFAULT_PHYSICAL // options.rows_of_user))
    if isinstance(materials.train, Users):
        tokens = max(1, materials.train.most_tokens)
    else:
        tokens = max(1, tokens_in_memory(longest(materials.train), options.row_tokens))
    return replace(options, max_physical_batch_size=max(1, options.max_tokens_in_memory // tokens))
