"""The set-up of a run: folders, model, tokenizer, examples, and the memory estimate of a dry run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import dpft
from accelerate import Accelerator
from finetune.data.documents import longest, rows_of, tokens_in_memory
from finetune.data.examples import make_collate, text_column, tokenise
from finetune.data.loading import load_texts
from finetune.engine import WHOLE, engine_name, from_first, sequence_size
from finetune.evaluation import choose_examples
from finetune.options import DEFAULT_PHYSICAL, Options
from finetune.private import LEDGER

DEFAULT_OUTPUT = Path("outputs") / "llama_dp"
METRICS, CARD, PICTURE, CHECKPOINTS = "metrics.jsonl", "README.md", "training.png", "checkpoints"


def choose_output(options: Options, accelerator: Accelerator) -> Path:
    """Choose and make the folder of the run, the same one on every rank.

    Raises:
        FileExistsError: the folder holds a run already, and neither resuming nor overwriting was asked for.
    """
    return from_first(accelerator, lambda: _choose_output(options))


def _choose_output(options: Options) -> Path:
    if options.output_dir is not None:
        chosen = Path(options.output_dir).expanduser()
    else:
        candidates = [
            DEFAULT_OUTPUT,
            *(DEFAULT_OUTPUT.with_name(f"{DEFAULT_OUTPUT.name}-{n}") for n in range(2, 10_000)),
        ]
        first_free = next(i for i, folder in enumerate(candidates) if not folder.exists())
        # resuming continues the last one
        chosen = candidates[max(0, first_free - 1) if options.resume_from_checkpoint else first_free]
    if chosen.exists() and not chosen.is_dir():
        raise FileExistsError(f"--output-dir {str(chosen)!r} is a file; expected a folder, or a name that is free.")
    ledger = chosen / LEDGER
    if not options.resume_from_checkpoint and chosen.exists():
        if not ledger.exists() and any(chosen.iterdir()):
            raise FileExistsError(
                f"--output-dir {str(chosen)!r} holds files, and no ledger of a run. Choose a folder that is new or "
                "empty: a run writes README.md, config.json and others of that kind."
            )
        if ledger.exists():
            _clear(chosen, ledger, options.overwrite_output_dir)
    chosen.mkdir(parents=True, exist_ok=True)
    return chosen


def _clear(folder: Path, ledger: Path, overwrite: bool) -> None:
    """Make room for a new run. The ledger of the old one is renamed, not deleted: what it spent stays spent."""
    releases = sum(line.startswith('{"release"') for line in ledger.read_text(encoding="utf-8").splitlines())
    if releases and not overwrite:
        raise FileExistsError(
            f"--output-dir {str(folder)!r} holds a run, with {releases} releases in its ledger. Go on with it by "
            "--resume-from-checkpoint, choose another folder, or start anew by --overwrite-output-dir."
        )
    if releases:
        ledger.rename(folder / f"earlier-{sum(1 for _ in folder.glob(f'earlier-*-{LEDGER}')) + 1}-{LEDGER}")
    ledger.unlink(missing_ok=True)  # a run that ended before its first release
    for name in (METRICS, CARD, PICTURE):  # they describe the old run; the model's files are overwritten
        (folder / name).unlink(missing_ok=True)
    for inner in (CHECKPOINTS, "adapter"):
        shutil.rmtree(folder / inner, ignore_errors=True)


@dataclass
class Materials:
    """The public and private inputs of a run.

    Attributes:
        tokenizer: of the model.
        train: tokenised training examples.
        validation: tokenised rows, of one validation example each.
        collate: from a list of rows to a batch, for evaluations.
        collate_train: from a list of examples to a batch; the same, unless an example may have several rows.
    """

    tokenizer: PreTrainedTokenizerBase
    train: Any
    validation: list[dict[str, Any]]
    collate: Callable[..., dict[str, torch.Tensor]]
    collate_train: Callable[..., dict[str, torch.Tensor]]


def load_materials(options: Options, accelerator: Accelerator) -> Materials:
    """Load tokenizer and texts, and tokenise them; one rank first, so that the others find the cache."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    with accelerator.main_process_first():
        train, validation = load_texts(
            options.dataset,
            options.dataset_config,
            options.split,
            options.validation_split,
            options.validation_share,
            options.seed,
        )
        column = text_column(train, options.text_column)
        train = tokenise(train, tokenizer, options.example_tokens, column)
        validation = tokenise(validation, tokenizer, options.example_tokens, column)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    chosen = choose_examples(validation, options.max_eval_examples, options.seed)
    if not chosen:
        raise ValueError(f"no validation record of {options.dataset!r} has two tokens; choose another --text-column.")
    # the mean over all tokens is that of the rows
    rows = [{"input_ids": row} for example in chosen for row in rows_of(example["input_ids"], options.row_tokens)]
    collate = make_collate(pad if pad is not None else 0)
    in_rows = make_collate(pad if pad is not None else 0, row_tokens=options.row_tokens)
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


def load_model(options: Options, dtype: torch.dtype) -> nn.Module:
    """Load the model, with the adapters and checkpointing that the options ask for.

    Args:
        options: of the run.
        dtype: of all parameters, frozen ones too.

    Raises:
        ValueError: the examples are longer than the model's positions.
        ImportError: LoRA was asked for, and peft is missing.
    """
    config = AutoConfig.from_pretrained(options.model)
    if options.rope_theta is not None:
        _extend_positions(config, options)
    positions = getattr(config, "max_position_embeddings", None)
    if positions and options.row_tokens > positions:
        raise ValueError(
            f"--seq-len {options.row_tokens} is more than the {positions} positions of {options.model!r}. Lower it, "
            "take a model with a longer context, or give a larger --rope-theta."
        )
    model = AutoModelForCausalLM.from_pretrained(options.model, config=config, dtype=dtype)
    model.config.use_cache = False
    if options.lora_r:
        model = _with_lora(model, options)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _extend_positions(config: Any, options: Options) -> None:
    """Another base of the rotary positions, and as many positions as the rows need; both are saved with the model."""
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        raise ValueError(f"--rope-theta: {options.model!r} has no rotary positions with one base. Leave it out.")
    rope["rope_theta"] = options.rope_theta
    config.max_position_embeddings = max(config.max_position_embeddings, options.row_tokens)


def lengthen(model: nn.Module, options: Options, accelerator: Accelerator) -> nn.Module:
    """``--long-context``: prepare the model for long texts, in place. Before dpft, which wraps inside of the tiles."""
    if options.long_context:
        # under ZeRO-3 each tile would gather the block's parameters
        dpft.long_context(model, tile_mlp=None if engine_name(accelerator) == "zero3" else "auto")
    return model


def _with_lora(model: nn.Module, options: Options) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("--lora-r needs peft, which is not installed: pip install 'dpft[peft]'.") from error
    names: str | list[str] = options.lora_target_modules
    if names != "all-linear":
        names = [name.strip() for name in options.lora_target_modules.split(",") if name.strip()]
    torch.manual_seed(options.seed)  # adapters are initialised at random, and alike on every rank
    config = LoraConfig(r=options.lora_r, lora_alpha=options.lora_alpha, target_modules=names, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def steady_memory(model: nn.Module, accelerator: Accelerator, options: Options) -> str:
    """The memory that a process always needs, in words: parameters, clipped sums, AdamW."""
    engine, ranks = engine_name(accelerator), accelerator.num_processes
    zero = engine.startswith("zero")
    every = sum(_numel(p) * p.element_size() for p in model.parameters())
    trainable = [p for p in model.parameters() if p.requires_grad]
    # two moments of the weights' dtype; under ZeRO of float32, with a float32 copy of the weights
    adam = sum((12 if zero else 2 * p.element_size()) * _numel(p) for p in trainable)
    sums = sum(4 * _numel(p) for p in trainable)  # the clipped sum of a logical batch is float32 in any case
    if options.sums_device == "cpu":
        return (
            f"{every / 2**20:,.1f} MiB of parameters held; in host memory {4 * sums / 2**20:,.1f} MiB: clipped sums "
            f"{sums / 2**20:,.1f}, AdamW with float32 masters {3 * sums / 2**20:,.1f}"
        )
    if engine in ("fsdp2", "zero3"):
        every /= ranks
    if engine in ("fsdp2", "zero2", "zero3"):
        sums /= ranks
    if engine == "fsdp2" or zero:
        adam /= ranks
    each = " on each process" if ranks > 1 else ""
    return (
        f"{(every + adam + sums) / 2**20:,.1f} MiB held{each}: parameters {every / 2**20:,.1f}, clipped sums "
        f"{sums / 2**20:,.1f}, AdamW {adam / 2**20:,.1f}"
    )


def predicted_steps(model: nn.Module, options: Options, accelerator: Accelerator) -> list[str]:
    """What a physical batch of full length will take beyond that, by strategy, in lines: time and peak of memory."""
    name, ranks = engine_name(accelerator), accelerator.num_processes
    engine: Any = ("single" if ranks == 1 else "ddp") if name == WHOLE else name
    try:
        plan = dpft.plan(
            model,
            batch_size=options.max_physical_batch_size or 1,
            seq_len=options.row_tokens,
            engine=engine,
            world_size=ranks,
        )
    except dpft.UnsupportedModuleError as error:
        return [f"not predicted: {error}"]
    steps = [("without privacy", plan.plain), *plan.predictions.items()]
    return [f"{n:15} {s.seconds:8.3g} s {s.accumulating_peak_bytes / 2**20:10,.1f} MiB" for n, s in steps]


def _numel(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter; ZeRO-3 leaves an empty one in its place."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
