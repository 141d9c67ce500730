"""Tokenizer and examples of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from accelerate import Accelerator
from finetune.data.documents import longest, rows_of, tokens_in_memory
from finetune.data.examples import make_collate, text_column, tokenise
from finetune.data.loading import load_texts
from finetune.engine import sequence_size
from finetune.evaluation import choose_examples
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


def records_of(options: Options) -> tuple[Dataset, Dataset]:
    """The records to train on and to evaluate with."""
    return load_texts(
        options.dataset,
        options.dataset_config,
        options.split,
        options.validation_split,
        options.validation_share,
        options.seed,
    )


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token to pad with, which is masked and has no loss: any will do."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def text_materials(options: Options, accelerator: Accelerator) -> Materials:
    """Load tokenizer and texts, and tokenise them; one rank first, so that the others find the cache."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    with accelerator.main_process_first():
        train, validation = records_of(options)
        column = text_column(train, options.text_column)
        train = tokenise(train, tokenizer, options.example_tokens, column)
        validation = tokenise(validation, tokenizer, options.example_tokens, column)
    chosen = choose_examples(validation, options.max_eval_examples, options.seed)
    if not chosen:
        raise ValueError(f"no validation record of {options.dataset!r} has two tokens; choose another --text-column.")
    # the mean over all tokens is that of the rows
    rows = [{"input_ids": row} for example in chosen for row in rows_of(example["input_ids"], options.row_tokens)]
    pad = pad_token(tokenizer)
    collate = make_collate(pad)
    in_rows = make_collate(pad, row_tokens=options.row_tokens)
    return Materials(tokenizer, train, rows, collate, in_rows if options.in_rows else collate)


def choose_physical(options: Options, materials: Materials, accelerator: Accelerator) -> Options:
    """The options with the size of physical batches, which changes neither the result nor the privacy.

    It may follow from the longest private record, so that it must not be published: the card has the options as given.

    Raises:
        ValueError: documents in several rows, whose tokens are to be spread over ranks.
    """
    given = options.max_physical_batch_size
    if (spread := sequence_size(accelerator)) > 1:
        if options.in_rows:
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
        return replace(options, max_physical_batch_size=DEFAULT_PHYSICAL)
    tokens = max(1, tokens_in_memory(longest(materials.train), options.row_tokens))
    return replace(options, max_physical_batch_size=max(1, options.max_tokens_in_memory // tokens))
