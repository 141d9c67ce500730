"""The table of the recipes' options: names, defaults, help, and what cannot be meant. ``parsing.py`` reads them.

Names follow TRL where TRL has one (``--model_name_or_path``, ``--dataset_name``, ``--learning_rate``).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from finetune.option import option
from finetune.privacy_options import PrivacyOptions

BASE_MODEL = Path(__file__).resolve().parent.parent / "assets" / "base_model"

DEFAULT_PHYSICAL = 32
GROUPS = ("model", "data", "privacy", "execution", "optimisation", "output")  # as --help shows them
SCHEDULES: tuple[str, ...] = ("cosine", "linear", "constant", "constant_with_warmup")
SCHEDULES += ("cosine_with_restarts", "polynomial", "inverse_sqrt")
OPTIMISERS: tuple[str, ...] = ("adamw", "adamw_torch", "adamw_torch_fused", "sgd", "adafactor")
OPTIMISERS += ("adamw_8bit", "paged_adamw_8bit", "lion_8bit", "paged_lion_8bit", "adamw_bc")


@dataclass
class Options(PrivacyOptions):
    """All options of a recipe; the defaults are the demonstration, which needs no network and no GPU.

    Attributes:
        steps: logical batches where neither their number nor that of epochs is given.
        unused: options that a recipe does not have.
        rows: of an example, where that is a fixed number.
    """

    steps: ClassVar[int] = 24
    unused: ClassVar[tuple[str, ...]] = ()
    rows: ClassVar[int] = 1

    model: str = option(
        str(BASE_MODEL),
        "model",
        "name on the hub, or folder, of a causal language model; the default is the small Llama kept with the recipe",
        also=("model_name_or_path",),
        metavar="NAME",
    )
    bf16: bool = option(
        False,
        "model",
        "compute in bfloat16. One process and DDP keep the parameters in bfloat16, ZeRO a float32 copy that it steps "
        "on, FSDP2 float32 shards, which it also exports. Norms, sums and noise are float32 in any case",
    )
    torch_dtype: str | None = option(
        None,
        "model",
        "dtype that the weights are loaded in; bfloat16 is --bf16, float32 is without it",
        also=("dtype",),
        choices=("float32", "bfloat16"),
    )
    attn_implementation: str | None = option(
        None,
        "model",
        "how attention is computed; if not given, as transformers chooses",
        choices=("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"),
    )
    gradient_checkpointing: bool = option(False, "model", "recompute activations in the backward pass: less memory")
    long_context: bool = option(
        False,
        "model",
        "long texts: blocks in tiles of tokens (not under ZeRO-3), checkpoints in host memory, attention without a "
        "mask of T x T. Turns --gradient-checkpointing on",
    )
    rope_theta: float | None = option(
        None,
        "model",
        "base of the rotary positions, for texts longer than the model was made for: it then takes --seq-len tokens",
        metavar="BASE",
    )
    lora_r: int = option(0, "model", "rank of LoRA adapters; 0 trains all parameters (needs peft)", metavar="R")
    lora_alpha: float = option(32.0, "model", "LoRA's scale: the adapter's output is multiplied by alpha / r")
    lora_target_modules: str = option(
        "all-linear", "model", "modules that get adapters, separated by commas, or all-linear", metavar="NAMES"
    )
    load_in_4bit: bool = option(
        False,
        "model",
        "QLoRA: the frozen weights in 4 bits (nf4, quantised twice; needs bitsandbytes and --lora-r; one process or "
        "data parallelism)",
    )

    dataset: str = option(
        "docstrings",
        "data",
        "docstrings (of Python's standard library: real text), tickets (synthetic, from templates), the name of a "
        "dataset on the hub, a folder written by save_to_disk, any other folder (each document or source file is a "
        "record), or a .txt, .json, .jsonl, .csv or .parquet file. One record is one example and the unit that is "
        "protected (see --user-column)",
        also=("dataset_name",),
        metavar="NAME",
    )
    dataset_config: str | None = option(None, "data", "configuration of a dataset on the hub", metavar="NAME")
    split: str = option("train", "data", "split to train on", also=("dataset_train_split",))
    validation_split: str | None = option(
        None,
        "data",
        "split to evaluate with; without it: validation or test if there is one, else a share put aside",
        also=("dataset_test_split",),
        metavar="SPLIT",
    )
    validation_share: float = option(0.1, "data", "that share of the records, drawn by a hash", metavar="SHARE")
    text_column: str | None = option(
        None,
        "data",
        "column of the text; detected where it is unambiguous",
        also=("dataset_text_field",),
        metavar="NAME",
    )
    user_column: str | None = option(
        None,
        "data",
        "column that names the user of each record: all records of a user are one example, which is drawn, clipped "
        "and protected as a whole, and validation is split by user",
        metavar="NAME",
    )
    records_per_user: int = option(
        8, "data", "with --user-column: records of a user that are used in a step, at most", metavar="K"
    )
    records_drawn: str = option(
        "once", "data", "which: always the same, by a hash; or afresh in each step", choices=("once", "afresh")
    )
    seq_len: int = option(
        128,
        "data",
        "maximum number of tokens of a row, which is an example; longer ones are cut (see --pack)",
        also=("max_length",),
        metavar="T",
    )
    pack: str = option(
        "none",
        "data",
        "none: a record is one row, cut at --seq-len. documents: a record is cut at --max-tokens-in-memory only, and "
        "becomes as many rows as it needs, all of one example. Never are several records in a row",
        choices=("none", "documents"),
    )

    clipping: str = option(
        "flash",
        "execution",
        "how the norms are taken; the clipped sum is the same. none does not clip and is not private",
        choices=("flash", "ghost", "fast", "per_sample", "none"),
    )
    strategy: str = option(
        "auto",
        "execution",
        "passes of a private step; auto plans by shapes and memory",
        choices=("auto", "one_pass", "two_pass", "per_example"),
    )
    max_physical_batch_size: int | None = option(
        None,
        "execution",
        f"examples in memory at once ({DEFAULT_PHYSICAL}, or as --max-tokens-in-memory chooses)",
        also=("per_device_train_batch_size",),
        metavar="B",
    )
    max_tokens_in_memory: int | None = option(
        None,
        "execution",
        "as many examples in memory at once as have so many tokens, if all were as long as the longest; at least one",
        metavar="M",
    )
    sums_device: str | None = option(None, "execution", "cpu: sums and AdamW in host memory", choices=("cpu",))
    cpu_threads: int | None = option(
        None, "execution", "threads of torch on a CPU; the cores that this process may use, if not given", metavar="N"
    )

    rank_timeout: int = option(
        1800,
        "execution",
        "several processes: seconds after which one that waits for another gives up, and the run ends; longer than "
        "the slowest thing that rank 0 does alone (loading texts, converting a checkpoint, saving the model)",
        metavar="SECONDS",
    )

    optim: str = option(
        "adamw",
        "optimisation",
        "optimiser, by its name in transformers' Trainer, which steps on the noisy sum. Those of 8 bits need "
        "bitsandbytes; those that step within the backward, before there is a sum, cannot be private. adamw_bc: AdamW "
        "with the noise's variance subtracted from its second moment (dpft.AdamWBC)",
        choices=OPTIMISERS,
    )
    learning_rate: float = option(5e-3, "optimisation", "peak of the learning rate", metavar="LR")
    adam_beta1: float = option(0.8, "optimisation", "AdamW's beta 1; a short memory suits few steps", metavar="BETA")
    adam_beta2: float = option(0.95, "optimisation", "AdamW's beta 2", metavar="BETA")
    weight_decay: float = option(0.0, "optimisation", "AdamW's weight decay", metavar="DECAY")
    warmup_steps: int = option(0, "optimisation", "logical steps of linear warm-up", metavar="N")
    lr_scheduler_type: str = option(
        "cosine",
        "optimisation",
        "schedule of transformers.get_scheduler",
        choices=SCHEDULES,
    )
    seed: int = option(
        0,
        "optimisation",
        "seed of the public randomness: adapters, evaluation, samples; never of noise or sampling",
    )

    output_dir: str | None = option(
        None,
        "output",
        "folder for model, ledger, metrics, plot and card; if not given, outputs/ and the name of the recipe, with a "
        "number if it exists",
        metavar="DIR",
    )
    overwrite_output_dir: bool = option(
        False, "output", "start anew in a folder that holds a run; what that run spent on its records stays spent"
    )
    resume_from_checkpoint: bool = option(
        False, "output", "continue from the last checkpoint in output_dir; the ledger there says what was spent"
    )
    checkpoint_every: int = option(
        10, "output", "logical steps between checkpoints, of which the last two are kept; 0 writes none", metavar="N"
    )
    eval_every: int = option(5, "output", "logical steps between evaluations; 0: before and after only", metavar="N")
    max_eval_examples: int = option(
        256, "output", "validation examples to evaluate, the same ones each time", metavar="N"
    )
    save_best: bool = option(
        False,
        "output",
        "export the weights of the evaluation with the lowest validation loss instead of the last ones. The epsilon "
        "is that of the whole run; that choice looks at held-out records, which no epsilon covers",
    )
    with_tracking: bool = option(False, "output", "--report-to all")
    report_to: str | None = option(
        None,
        "output",
        "trackers of accelerate that get the metrics, separated by commas: tensorboard, wandb ...; all that are "
        "installed; none. What they get was computed from private records without noise",
        metavar="NAMES",
    )
    push_to_hub: str | None = option(
        None,
        "output",
        "at the end publish what the epsilon covers on the hub: weights, configuration, tokenizer, and the card "
        "without what was measured. Needs a token (hf auth login)",
        also=("hub_model_id",),
        metavar="REPO",
    )
    reload_check: bool = option(
        True,
        "output",
        "at the end rank 0 reads the saved model back on its device and compares the validation loss; not for a model "
        "that fits on no single device",
    )
    compare_nonprivate: bool = option(
        False,
        "output",
        "afterwards train a second copy for as many steps without privacy, to show what privacy costs",
        also=("compare",),
    )
    compare_learning_rate: float | None = option(
        None, "output", "learning rate of that copy, for which another one is right; if not given, the same"
    )
    prompt: str = option(
        "Return the", "output", "start of the text that is generated before and after", metavar="TEXT"
    )
    sample_tokens: int = option(48, "output", "tokens to generate; 0 generates nothing", metavar="N")
    advise: bool = option(
        False,
        "output",
        "say which batch, steps, clip norm, learning rate, LoRA or full training to take for these data, this model "
        "and --target-epsilon (within --num-epochs, if given), why, and what others would cost; draw it, and stop",
    )
    dry_run: bool = option(
        False, "output", "say what would be done (noise, steps, batches, epsilon, plan, memory) and stop"
    )

    def __post_init__(self) -> None:
        """Refuse contradictory or out-of-range options. ``dpft.PrivacyConfig`` checks the privacy parameters."""
        super().__post_init__()
        if self.num_steps is None and self.num_epochs is None:
            self.num_steps = self.steps
        least = dict.fromkeys(("seq_len", "max_physical_batch_size", "max_eval_examples", "cpu_threads"), 1)
        least |= {"rank_timeout": 1, "max_tokens_in_memory": 2, "records_per_user": 1}
        least |= dict.fromkeys(("lora_r", "warmup_steps", "checkpoint_every", "eval_every"), 0)
        least |= dict.fromkeys(("sample_tokens", "audit"), 0)
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; expected at least {bound}.")
        if self.torch_dtype == "float32" and self.bf16:
            raise ValueError("got both --bf16 and --torch-dtype float32; the first is bfloat16. Give one of them.")
        self.bf16 = self.bf16 or self.torch_dtype == "bfloat16"
        if self.with_tracking and self.report_to not in (None, "all"):
            raise ValueError(
                f"got both --with-tracking, which is --report-to all, and --report-to {self.report_to}; give one."
            )
        if self.save_best and not self.eval_every:
            raise ValueError("--save-best chooses among evaluations, and --eval-every 0 makes none while training.")
        if self.push_to_hub is not None and (self.clipping == "none" or self.noise_multiplier == 0):
            raise ValueError("--push-to-hub publishes what an epsilon covers, and this training would have none.")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name):g}; expected 0 to below 1.")
        if not 0 <= self.learning_rate < float("inf"):
            raise ValueError(f"--learning-rate is {self.learning_rate:g}; expected a finite number of at least 0.")
        if self.seq_len < 2:
            raise ValueError("--seq-len is 1; a language model needs two tokens for one prediction. Give at least 2.")
        if not 0 < self.validation_share < 1:
            raise ValueError(f"--validation-share is {self.validation_share:g}; expected a share between 0 and 1.")
        if self.rope_theta is not None and not 1 < self.rope_theta < float("inf"):
            raise ValueError(f"--rope-theta is {self.rope_theta:g}; expected a finite number above 1.")
        if self.load_in_4bit and not self.lora_r:
            raise ValueError("--load-in-4bit freezes the weights; give --lora-r, the rank of the adapters to train.")
        if self.pack == "documents" and self.max_tokens_in_memory is None:
            raise ValueError("--pack documents needs --max-tokens-in-memory: where a document is cut that is longer.")
        if self.user_column is not None and not self.user_column.strip():
            raise ValueError("--user-column is empty; expected the name of a column.")
        if self.user_column is not None and self.pack == "documents":
            raise ValueError("--user-column has a row for each record, and --pack documents several. Leave one out.")
        if self.user_column is None and self.records_drawn == "afresh":
            raise ValueError("--records-drawn afresh is of a user's records; give --user-column, or leave it out.")
        if self.in_rows and self.strategy == "per_example":
            given = "--user-column" if self.user_column else "--pack documents"
            instead = "" if self.user_column else ", or give a --seq-len of at least --max-tokens-in-memory"
            raise ValueError(
                f"--strategy per_example runs the rows of an example apart, and with {given} they have one loss. "
                f"Leave one out{instead}."
            )

    @property
    def example_tokens(self) -> int:
        """Tokens at which an example is cut."""
        return self.max_tokens_in_memory or 0 if self.pack == "documents" else self.seq_len

    @property
    def row_tokens(self) -> int:
        """Tokens of the longest row that there can be."""
        return min(self.seq_len, self.example_tokens)

    @property
    def in_rows(self) -> bool:
        """Whether an example may have several rows."""
        return self.user_column is not None or self.example_tokens > self.seq_len

    @property
    def rows_of_user(self) -> int:
        """Rows of a user at most; 1 where examples are records."""
        return 1 if self.user_column is None else self.records_per_user
