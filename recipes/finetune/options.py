"""The options of the recipes: a dataclass, its command line in groups, and the same keys from a YAML file.

Names follow TRL where TRL has one (``--model_name_or_path``, ``--dataset_name``, ``--learning_rate``); a hyphen and an
underscore mean the same. The command line wins over the file, the file over the defaults.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

BASE_MODEL = Path(__file__).resolve().parent.parent / "assets" / "base_model"

DEFAULT_STEPS = 24


def option(default: Any, group: str, help: str, *, also: tuple[str, ...] = (), **kwargs: Any) -> Any:
    """A dataclass field that is an option: its default, its group in ``--help``, other names, argparse's keywords."""
    return field(default=default, metadata={"group": group, "help": help, "also": also, "argparse": kwargs})


@dataclass
class Options:
    """All options of a recipe; the defaults are the demonstration, which needs no network and no GPU."""

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
    gradient_checkpointing: bool = option(False, "model", "recompute activations in the backward pass: less memory")
    lora_r: int = option(0, "model", "rank of LoRA adapters; 0 trains all parameters (needs peft)", metavar="R")
    lora_alpha: float = option(32.0, "model", "LoRA's scale: the adapter's output is multiplied by alpha / r")
    lora_target_modules: str = option(
        "all-linear", "model", "modules that get adapters, separated by commas, or all-linear", metavar="NAMES"
    )

    dataset: str = option(
        "docstrings",
        "data",
        "docstrings (of Python's standard library: real text), tickets (synthetic, from templates), the name of a "
        "dataset on the hub, a folder written by save_to_disk, or a .txt, .json, .jsonl, .csv or .parquet file. One "
        "record is one example and the unit that is protected",
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
    seq_len: int = option(
        128, "data", "maximum number of tokens of an example; longer ones are cut", also=("max_length",), metavar="T"
    )

    target_epsilon: float | None = option(
        8.0, "privacy", "epsilon to spend in the whole run; the noise is calibrated to it", metavar="EPSILON"
    )
    target_delta: float = option(1e-6, "privacy", "delta; well below one over the number of examples", metavar="DELTA")
    noise_multiplier: float | None = option(
        None,
        "privacy",
        "noise in units of the clip norm, instead of a target epsilon; 0 is not private",
        metavar="SIGMA",
    )
    max_grad_norm: float = option(
        1.0, "privacy", "clip norm C of an example's gradient over all parameters", metavar="C"
    )
    expected_batch_size: float = option(
        512,
        "privacy",
        "expected size B of a logical batch; each of N examples is included independently with probability B / N",
        metavar="B",
    )
    num_steps: int | None = option(
        None, "privacy", f"logical batches, each one noisy update (default {DEFAULT_STEPS})", also=("max_steps",)
    )
    num_epochs: float | None = option(
        None, "privacy", "instead of steps: expected passes over the data", also=("num_train_epochs",)
    )
    secure_rng: bool = option(
        False, "privacy", "noise from a cryptographic generator, hardened against floating-point attacks"
    )
    tuning_note: str | None = option(
        None,
        "privacy",
        "for the card: how the hyperparameters were chosen, which the epsilon does not account for",
        metavar="TEXT",
    )

    audit: int = option(
        0,
        "privacy",
        "random canary records, each added with probability 1/2 and looked for in the final model: a lower bound of "
        "epsilon for the card. It grows with their number; a thousand prove at most 5.4. 0: no audit",
        metavar="CANARIES",
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
    max_physical_batch_size: int = option(
        32, "execution", "examples in memory at once", also=("per_device_train_batch_size",), metavar="B"
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

    learning_rate: float = option(5e-3, "optimisation", "peak of the learning rate (AdamW)", metavar="LR")
    adam_beta1: float = option(0.8, "optimisation", "AdamW's beta 1; a short memory suits few steps", metavar="BETA")
    adam_beta2: float = option(0.95, "optimisation", "AdamW's beta 2", metavar="BETA")
    weight_decay: float = option(0.0, "optimisation", "AdamW's weight decay", metavar="DECAY")
    warmup_steps: int = option(0, "optimisation", "logical steps of linear warm-up", metavar="N")
    lr_scheduler_type: str = option(
        "cosine",
        "optimisation",
        "schedule of transformers.get_scheduler: cosine, linear, constant ...",
        metavar="NAME",
    )
    seed: int = option(
        0,
        "optimisation",
        "seed of the public randomness: adapters, evaluation, samples; never of noise or sampling",
    )

    output_dir: str | None = option(
        None,
        "output",
        "folder for model, ledger, metrics, plot and card; if not given, outputs/llama_dp, with a number if it exists",
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
    with_tracking: bool = option(
        False, "output", "also log to the trackers that accelerate finds (TensorBoard, wandb ...)"
    )
    reload_check: bool = option(
        True,
        "output",
        "at the end rank 0 reads the saved model back on its device and compares the validation loss; not for a model "
        "that fits on no single device",
    )
    compare_nonprivate: bool = option(
        False, "output", "afterwards train a second copy for as many steps without privacy, to show what privacy costs"
    )
    prompt: str = option(
        "Return the", "output", "start of the text that is generated before and after", metavar="TEXT"
    )
    sample_tokens: int = option(48, "output", "tokens to generate; 0 generates nothing", metavar="N")
    dry_run: bool = option(
        False, "output", "say what would be done (noise, steps, batches, epsilon, plan, memory) and stop"
    )

    def __post_init__(self) -> None:
        """Refuse contradictory or out-of-range options. ``dpft.PrivacyConfig`` checks the privacy parameters."""
        if self.noise_multiplier is not None and self.target_epsilon is not None:
            raise ValueError(
                f"got both --target-epsilon {self.target_epsilon:g} and --noise-multiplier {self.noise_multiplier:g}; "
                "one follows from the other. Give one of them."
            )
        if self.num_steps is not None and self.num_epochs is not None:
            raise ValueError(
                f"got both --num-steps {self.num_steps} and --num-epochs {self.num_epochs:g}; give one of them."
            )
        if self.num_steps is None and self.num_epochs is None:
            self.num_steps = DEFAULT_STEPS
        least = dict.fromkeys(("seq_len", "max_physical_batch_size", "max_eval_examples", "cpu_threads"), 1)
        least |= {"rank_timeout": 1}
        least |= dict.fromkeys(("lora_r", "warmup_steps", "checkpoint_every", "eval_every"), 0)
        least |= dict.fromkeys(("sample_tokens", "audit"), 0)
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; expected at least {bound}.")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name):g}; expected 0 to below 1.")
        if not 0 <= self.learning_rate < float("inf"):
            raise ValueError(f"--learning-rate is {self.learning_rate:g}; expected a finite number of at least 0.")
        if self.seq_len < 2:
            raise ValueError("--seq-len is 1; a language model needs two tokens for one prediction. Give at least 2.")
        if not 0 < self.validation_share < 1:
            raise ValueError(f"--validation-share is {self.validation_share:g}; expected a share between 0 and 1.")


def _value_type(annotation: Any) -> type:
    """``int`` for ``int``, ``str`` for ``str | None``."""
    options = [t for t in typing.get_args(annotation) if t is not types.NoneType]
    return options[0] if options else annotation


def _types() -> dict[str, type]:
    return {name: _value_type(hint) for name, hint in typing.get_type_hints(Options).items()}


def _flags(name: str) -> list[str]:
    """``--seq-len`` and ``--seq_len``."""
    return list(dict.fromkeys([f"--{name.replace('_', '-')}", f"--{name}"]))


class _Help(argparse.RawDescriptionHelpFormatter):
    """Shows only the first spelling of an option, and of a switch how to turn it off."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.dest == "help":
            return super()._format_action_invocation(action)
        words = [action.option_strings[0], *[flag for flag in action.option_strings if flag.startswith("--no-")][:1]]
        if action.nargs != 0:
            words[0] += f" {self._format_args(action, action.dest.upper())}"
        return ", ".join(words)


def build_parser(description: str) -> argparse.ArgumentParser:
    """The command line of :class:`Options`, in groups; an option that was not given is absent from the result."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description=description,
        formatter_class=_Help,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file with any of the options below; the command line wins"
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    kinds = _types()
    for f in fields(Options):
        meta = f.metadata
        group = groups.setdefault(meta["group"], parser.add_argument_group(meta["group"]))
        flags = [flag for name in (f.name, *meta["also"]) for flag in _flags(name)]
        text = meta["help"]
        if meta["also"]:
            text += f" [also --{meta['also'][0]}]"
        if kinds[f.name] is bool:
            group.add_argument(*flags, dest=f.name, action=argparse.BooleanOptionalAction, help=text)
        else:
            shown = BASE_MODEL.name if f.name == "model" else f.default
            if shown is not None:
                text += f" (default {shown:g})" if isinstance(shown, float) else f" (default {shown})"
            arguments = {"metavar": f.name.split("_")[-1].upper()} | meta["argparse"]
            if "choices" in arguments:
                del arguments["metavar"]
            group.add_argument(*flags, dest=f.name, type=kinds[f.name], help=text, **arguments)
    return parser


def read_yaml(path: str) -> dict[str, Any]:
    """Read options from a YAML file: a flat mapping with the names of the options, hyphens or underscores.

    Raises:
        ValueError: the file is not a mapping, names an option that does not exist (the closest one is suggested),
            or holds a value of another type than the option has.
    """
    with open(path, encoding="utf-8") as file:
        try:
            loaded = yaml.safe_load(file)
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: not YAML: {error}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ValueError(
            f"{path}: got {type(loaded).__name__} at the top, expected a mapping such as 'seq_len: 1024'."
        )
    names = {alias: f.name for f in fields(Options) for alias in (f.name, *f.metadata["also"])}
    kinds = _types()
    choices = {f.name: f.metadata["argparse"].get("choices") for f in fields(Options)}
    optional = {f.name for f in fields(Options) if f.default is None} | {"target_epsilon"}
    values: dict[str, Any] = {}
    for key, value in loaded.items():
        spelled = str(key).replace("-", "_")
        if spelled not in names:
            close = difflib.get_close_matches(spelled, names, n=1, cutoff=0.0)
            raise ValueError(
                f"{path}: unknown option {key!r}; the closest is {close[0]!r}. See --help for all of them."
            )
        name = names[spelled]
        if name in values:
            raise ValueError(f"{path}: {key!r} sets {name!r} a second time. Keep one of the two.")
        values[name] = _checked(path, str(key), value, kinds[name], name in optional, choices[name])
    return values


def _checked(path: str, key: str, value: Any, kind: type, optional: bool, choices: Sequence[str] | None) -> Any:
    """The value as the option's type; YAML reads 1e-6 as text, which is what a person meant as a number."""
    if value is None and optional:
        return None
    if kind in (int, float) and isinstance(value, str):
        with contextlib.suppress(ValueError):  # refused below, with the option's name
            value = float(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if kind is str and isinstance(value, list) and all(isinstance(item, str) for item in value):
        value = ",".join(value)
    if type(value) is not kind:
        raise ValueError(f"{path}: {key!r} is {value!r} ({type(value).__name__}), expected {kind.__name__}.")
    if choices and value not in choices:
        raise ValueError(f"{path}: {key!r} is {value!r}, expected one of {', '.join(choices)}.")
    return value


def parse(argv: Sequence[str] | None = None, description: str = "") -> Options:
    """Read the command line, and the YAML file that it may name.

    Args:
        argv: words of the command line; those of the process if None.
        description: text at the top of ``--help``.

    Returns:
        The options. A ``noise_multiplier`` given without a ``target_epsilon`` takes the default target's place.

    Raises:
        SystemExit: with a message on standard error, for an option that is unknown or has no sense.
    """
    parser = build_parser(description)
    given = vars(parser.parse_args(argv))
    try:
        config = given.pop("config", None)
        from_file = read_yaml(config) if config else {}
        # an alternative given on the command line takes the place of the one in the file
        for one, other in (("noise_multiplier", "target_epsilon"), ("num_steps", "num_epochs")):
            for this, that in ((one, other), (other, one)):
                if this in given and that not in given:
                    from_file.pop(that, None)
        values = from_file | given
        if values.get("clipping") == "none" and values.get("target_epsilon") is None:
            values.setdefault("noise_multiplier", 0.0)  # without clipping no noise is enough for any epsilon
        if values.get("noise_multiplier") is not None:
            values.setdefault("target_epsilon", None)
        return Options(**values)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def as_words(options: Options) -> dict[str, Any]:
    """The options that differ from the defaults, for the model card."""
    defaults = {f.name: f.default for f in fields(Options)}
    defaults["num_steps"] = DEFAULT_STEPS if options.num_epochs is None else None
    return {name: value for name, value in dataclasses.asdict(options).items() if value != defaults[name]}
