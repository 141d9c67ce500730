"""The options and materials of ``preference_dp.py``."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from accelerate import Accelerator
from finetune.data.chat_template import set_template
from finetune.data.examples import make_collate
from finetune.data.preferences import PairCollate, tokenise_pairs
from finetune.dpo import LOSSES, PreferenceLoss
from finetune.engine import sequence_size
from finetune.evaluation import choose_examples
from finetune.materials import Materials, pad_token, records_of
from finetune.model import load_tokenizer
from finetune.option import again, option
from finetune.options import Options

PAIRS = "pairs"


@dataclass
class PreferenceOptions(Options):
    """Options of training on preferences."""

    steps: ClassVar[int] = 12
    unused: ClassVar[tuple[str, ...]] = (
        *("pack", "text_column", "audit"),
        *("user_column", "records_per_user", "records_drawn"),
    )
    rows: ClassVar[int] = 2

    dataset: str = option(
        PAIRS,
        "data",
        "pairs (made of the docstrings of Python's standard library), the name of a dataset on the hub, a folder "
        "written by save_to_disk, or a .json, .jsonl, .csv or .parquet file, with prompt, chosen and rejected (text), "
        "or with chosen and rejected as lists of messages. One pair is one example and the unit that is protected",
        also=("dataset_name",),
        metavar="NAME",
    )
    seq_len: int = again(Options, "seq_len", 64)
    chat_template: str | None = option(
        None,
        "data",
        "of messages: a Jinja file in the place of the tokenizer's, or plain: a simple one",
        metavar="FILE",
    )
    beta: float = option(0.1, "loss", "how close to the start model: beta of DPO, tau of IPO")
    loss_type: str = option("sigmoid", "loss", "sigmoid (DPO) or ipo", choices=LOSSES)
    label_smoothing: float = option(
        0.0, "loss", "sigmoid: share of pairs that are thought to be the wrong way round", metavar="SHARE"
    )
    sft_weight: float = option(
        0.0, "loss", "weight of the negative log-likelihood of the chosen completion (RPO)", metavar="WEIGHT"
    )
    learning_rate: float = again(Options, "learning_rate", 4e-3)
    expected_batch_size: float = again(Options, "expected_batch_size", 256)

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        for name in ("beta", "sft_weight", "label_smoothing"):
            value = getattr(self, name)
            flag = f"--{name.replace('_', '-')} is {value:g}"
            if name == "beta" and not 0 < value < float("inf"):
                raise ValueError(f"{flag}; expected a finite number above 0.")
            if name == "sft_weight" and not 0 <= value < float("inf"):
                raise ValueError(f"{flag}; expected a finite number of at least 0.")
            if name == "label_smoothing" and not 0 <= value < 0.5:
                raise ValueError(f"{flag}; expected a share from 0 to below 0.5.")
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ValueError(f"--label-smoothing is of --loss-type sigmoid; {self.loss_type} has none. Leave it out.")
        if self.strategy == "per_example":
            raise ValueError("--strategy per_example runs rows apart, and a pair has one loss of two. Choose another.")
        super().__post_init__()

    @property
    def example_tokens(self) -> int:
        """Tokens of the two rows of a pair."""
        return self.rows * self.seq_len

    @property
    def loss(self) -> PreferenceLoss:
        """What these options say of the loss."""
        return PreferenceLoss(self.loss_type, self.beta, self.label_smoothing, self.sft_weight)


def docstring_pair(record: Mapping[str, Any]) -> dict[str, str]:
    """A pair of the demonstration: how a docstring goes on, preferred to the same words in another order.

    The order is drawn with the hash of the text as its seed: a pair depends on its docstring alone, so that the pair
    is what is protected, and without one docstring all other pairs are the same.
    """
    words = record["text"].split(" ")
    first = max(1, len(words) // 3)
    rest = words[first:]
    seed = int.from_bytes(hashlib.sha256(record["text"].encode()).digest()[:8], "big")
    mixed = random.Random(seed).sample(rest, len(rest))
    prompt, chosen, rejected = (" ".join(part) for part in (words[:first], ["", *rest], ["", *mixed]))
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def pair_materials(options: PreferenceOptions, accelerator: Accelerator) -> Materials:
    """Load tokenizer and pairs, and tokenise them; one rank first, so that the others find the cache.

    Raises:
        ValueError: the data are no pairs, or the tokens of an example are to be spread over ranks.
    """
    if (spread := sequence_size(accelerator)) > 1:
        raise ValueError(
            f"sp_size is {spread}, which spreads the tokens of one row, and a pair has two. Leave it out."
        )
    tokenizer = load_tokenizer(options.model)
    with accelerator.main_process_first():
        if options.dataset == PAIRS:
            docstrings = records_of(replace(options, dataset="docstrings"))
            parts = [part.map(docstring_pair, remove_columns=part.column_names) for part in docstrings]
        else:
            parts = list(records_of(options))
        if options.chat_template or any(isinstance(part[0].get("chosen"), list) for part in parts):
            set_template(tokenizer, options.chat_template, options.model)
        train, validation = (
            tokenise_pairs(part, tokenizer, options.seq_len, name)
            for part, name in zip(parts, ("training", "validation"), strict=True)
        )
    chosen = choose_examples(validation, options.max_eval_examples, options.seed, least=0)
    chosen = [{**pair, "place": place} for place, pair in enumerate(chosen)]
    rows = make_collate(pad_token(tokenizer))
    return Materials(tokenizer, train, chosen, PairCollate(rows), PairCollate(rows))
