"""The options of ``synthesize_dp.py``, beside those that all recipes have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from finetune.data.labelled import ENCODER
from finetune.option import again, option
from finetune.options import Options
from finetune.synthetic.checks import Rules
from finetune.synthetic.conditions import parse_columns, parse_weights
from finetune.synthetic.generation import Sampling
from finetune.synthetic.histogram import MARGIN


@dataclass
class SynthesisOptions(Options):
    """The defaults are the demonstration."""

    # --audit's canaries have no header; texts are the sample
    unused: ClassVar[tuple[str, ...]] = (*("pack", "audit", "prompt", "sample_tokens"),)

    steps: ClassVar[int] = 30

    dataset: str = again(Options, "dataset", "tickets")
    seq_len: int = again(Options, "seq_len", 96)
    expected_batch_size: float = again(Options, "expected_batch_size", 256)
    eval_every: int = again(Options, "eval_every", 10)
    max_eval_examples: int = again(Options, "max_eval_examples", 128)
    sample_tokens: int = again(Options, "sample_tokens", 0)

    condition_on: str = option(
        "label",
        "synthesis",
        "columns whose values a text is generated for, separated by commas; the first is what --classifier learns",
        metavar="COLUMNS",
    )
    values: str | None = option(
        None,
        "synthesis",
        "the public values of the columns: a,b or label=a,b;kind=x,y or JSON. The value other stands for all that are "
        "not named. If not given, the values are taken from the records, and which there are becomes public",
    )
    distribution: str = option(
        "uniform",
        "synthesis",
        "how many texts of each condition. private: as many in proportion as there are records, counted with noise",
        choices=("uniform", "private"),
    )
    histogram_epsilon: float = option(
        0.5, "synthesis", "of --target-epsilon, what the noisy counts of --distribution private get", metavar="EPSILON"
    )
    weights: str | None = option(
        None, "synthesis", "instead: public weights of the values of a column, such as a=3,b=1", metavar="WEIGHTS"
    )
    generate: int = option(800, "synthesis", "texts to generate, before the checks", metavar="N")
    temperature: float = option(1.0, "synthesis", "of the softmax that tokens are drawn from")
    top_p: float = option(1.0, "synthesis", "draw from the likeliest tokens of this probability together", metavar="P")
    max_new_tokens: int | None = option(
        None, "synthesis", "tokens of a text, at most; what --seq-len leaves, if not given", metavar="T"
    )
    generation_batch_size: int = option(64, "synthesis", "texts to generate at once, on each process", metavar="B")

    min_chars: int = option(20, "checks", "shorter texts are rejected", metavar="N")
    max_chars: int | None = option(None, "checks", "longer texts are rejected", metavar="N")
    format: str = option("text", "checks", "json: texts that do not parse are rejected", choices=("text", "json"))
    must_match: str | None = option(
        None, "checks", "regular expression; texts without a match are rejected", metavar="REGEX"
    )
    near_duplicates: float = option(
        0.8, "checks", "Jaccard similarity of word triples from which on a text is a copy; 1: exact ones", metavar="J"
    )

    measures: bool = option(
        True, "measures", "compare with the private records: figures that are not for publication, in a file apart"
    )
    embedding_model: str | None = option(
        None, "measures", "model whose embeddings are compared; if not given, the trained one", metavar="NAME"
    )
    classifier: str = option(
        str(ENCODER),
        "measures",
        "encoder that learns the labels from synthetic and from real texts; none: no such comparison",
        metavar="NAME",
    )
    classifier_steps: int = option(150, "measures", "steps of its training", metavar="N")
    compare_untuned: bool = option(True, "measures", "also texts of the model before the fine-tuning")

    def __post_init__(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            ValueError: with the option's name.
        """
        super().__post_init__()
        if self.distribution == "private":
            self._check_histogram()
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"--temperature is {self.temperature:g}; expected a finite number above 0.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p is {self.top_p:g}; expected a probability above 0, at most 1.")
        least = dict.fromkeys(("generate", "generation_batch_size", "max_new_tokens", "classifier_steps"), 1)
        for name, bound in {**least, "min_chars": 0}.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; expected at least {bound}.")
        parse_columns(self.condition_on)
        parse_weights(self.weights)
        self.rules()

    def _check_histogram(self) -> None:
        if not 0 < self.histogram_epsilon < float("inf"):
            raise ValueError(f"--histogram-epsilon is {self.histogram_epsilon:g}; expected a finite number above 0.")
        if self.weights is not None:
            raise ValueError("got both --weights and --distribution private, which counts the records. Give one.")
        if self.account is not None:
            raise ValueError(
                "got both --account and --distribution private, which pays from an account of the run. Give one."
            )
        if self.clipping == "none" or self.noise_multiplier == 0:
            raise ValueError("--distribution private with a training that is not private: no epsilon covers both.")
        if self.target_epsilon is not None and self.target_epsilon <= self.epsilon_elsewhere:
            raise ValueError(
                f"--target-epsilon {self.target_epsilon:g} leaves nothing for the training beside "
                f"--histogram-epsilon {self.histogram_epsilon:g}. Lower the second one."
            )

    @property
    def epsilon_elsewhere(self) -> float:
        """What of the target the training must not spend."""
        return self.histogram_epsilon + MARGIN if self.distribution == "private" else 0.0

    @property
    def parsed_weights(self) -> dict[str, float] | None:
        """The weights of the values; None for uniform ones."""
        return parse_weights(self.weights)

    def rules(self) -> Rules:
        """Which texts are kept."""
        return Rules(
            parse_columns(self.condition_on),
            self.min_chars,
            self.max_chars,
            self.format,
            self.must_match,
            self.near_duplicates,
        )

    def sampling(self, room: int) -> Sampling:
        """How texts are drawn; ``room`` is the number of tokens that the longest header leaves."""
        return Sampling(
            self.temperature, self.top_p, self.max_new_tokens or room, self.generation_batch_size, self.seed
        )
