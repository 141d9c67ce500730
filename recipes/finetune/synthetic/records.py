"""Records with conditions, and the examples that they become."""

from __future__ import annotations

from dataclasses import dataclass

from datasets import Dataset

from accelerate import Accelerator
from finetune.data.checks import values_of
from finetune.data.corpora import TROUBLES, in_validation, synthetic_tickets
from finetune.data.examples import make_collate, text_column
from finetune.data.labelled import PACKAGES
from finetune.evaluation import choose_examples
from finetune.materials import Materials, by_user, pad_token, records_of
from finetune.model import load_tokenizer
from finetune.synthetic.conditions import (
    Conditions,
    conditions_of,
    parse_columns,
    tokenise_conditioned,
    without_prompt_loss,
)
from finetune.synthetic.downstream import Labelled
from finetune.synthetic.options import SynthesisOptions

TICKET_CUSTOMERS = 3000  # some 7,400 tickets
# what a ticket complains of, which is its label; public, as the templates are
LABELS = {"tickets": tuple(trouble.replace(" {code}", "") for trouble in TROUBLES), "docstrings": PACKAGES}


@dataclass
class ConditionedMaterials(Materials):
    """With the conditions.

    Attributes:
        conditions: of the texts.
        values_from_data: whether the set of values was taken from the records.
        text_column: name of the texts' column.
        room: tokens that the longest header leaves of ``--seq-len``.
        real: the training records, as they are trained on: cut where the examples are.
        held_out: all held-out records, likewise.
        headers: of the training records, before they are cut; private.
        owners: the user of each of them, with ``--user-column``; private.
    """

    conditions: Conditions
    values_from_data: bool
    text_column: str
    room: int
    real: Labelled
    held_out: Labelled
    headers: list[str]
    owners: list[str] | None


def load_records(options: SynthesisOptions) -> tuple[Dataset, Dataset]:
    """Records to train on and records held out; the built-in ones have a column ``label``."""
    if options.dataset == "tickets":
        tickets = synthetic_tickets(TICKET_CUSTOMERS, options.seed, canaries=0)
        rows = [
            {
                "text": t["text"],
                "label": next(s for s in LABELS["tickets"] if s in str(t["text"])),
                "of": t["customer_id"],
            }
            for t in tickets
        ]
        # by customer: nobody is in training and held out at once
        out = [in_validation(str(row["of"]), options.validation_share) for row in rows]
        parts = [[row for row, held in zip(rows, out, strict=True) if held is side] for side in (False, True)]
        return Dataset.from_list(parts[0]), Dataset.from_list(parts[1])
    train, held_out = records_of(options)
    if options.dataset == "docstrings":
        train, held_out = (
            part.map(lambda row: {"label": row["name"].split(".")[0]}).filter(lambda row: row["label"] in PACKAGES)
            for part in (train, held_out)
        )
    return train, held_out


def conditioned_materials(options: SynthesisOptions, accelerator: Accelerator) -> ConditionedMaterials:
    """Load tokenizer and records, and tokenise them after their headers; one rank first. A collective.

    Raises:
        ValueError: a column is missing, a value is not public, or a header or ``--max-new-tokens`` leaves no room.
    """
    tokenizer = load_tokenizer(options.model)
    columns = parse_columns(options.condition_on)
    with accelerator.main_process_first():
        records = load_records(options)
        column = text_column(records[0], options.text_column)
        if column in columns:
            raise ValueError(f"--condition-on {options.condition_on!r} names {column!r}, the column of the text.")
        values = options.values
        if values is None and options.dataset in LABELS and columns == ("label",):
            values = ",".join(LABELS[options.dataset])
        conditions, warning = conditions_of(records, columns, values)
        train, held_out = (
            tokenise_conditioned(part, conditions, tokenizer, options.seq_len, column) for part in records
        )
    if warning and options.distribution == "private":
        raise ValueError("--distribution private counts the records of values that are public. Name them by --values.")
    if warning:
        accelerator.print(f"warning: {warning}")
    conditions.counts(options.generate, options.parsed_weights)  # refused now, not after the training
    room = options.seq_len - max(len(tokenizer(conditions.header(some))["input_ids"]) for some in conditions.all())
    if options.max_new_tokens is not None and options.max_new_tokens > room:
        raise ValueError(
            f"--max-new-tokens {options.max_new_tokens}: --seq-len {options.seq_len} leaves {room} after the longest "
            "header, and nothing longer was trained on. Lower it, or raise --seq-len."
        )
    collate = without_prompt_loss(make_collate(pad_token(tokenizer)))
    chosen = choose_examples(held_out, options.max_eval_examples, options.seed)

    def as_trained_on(examples: Dataset, part: Dataset) -> Labelled:
        texts = [
            tokenizer.decode(row["input_ids"][row["prompt_tokens"] :], skip_special_tokens=True) for row in examples
        ]
        return Labelled(texts, [conditions.value(row, columns[0]) for row in part.select_columns([columns[0]])])

    # only rank 0 compares
    real, out = (
        as_trained_on(examples, part) if accelerator.is_main_process and options.measures else Labelled([], [])
        for examples, part in zip((train, held_out), records, strict=True)
    )
    examples, collate_train = by_user(options, train, records[0], collate, accelerator)
    headers, owners = [], None
    if options.distribution == "private" and accelerator.is_main_process:  # which counts them
        headers = [conditions.header(row) for row in records[0].select_columns(list(columns))]
        owners = None if options.user_column is None else list(values_of(records[0], options.user_column))
    return ConditionedMaterials(
        *(tokenizer, examples, chosen, collate, collate_train, conditions, bool(warning), column, room, real, out),
        headers,
        owners,
    )
