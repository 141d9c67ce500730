"""Everything that depends on the engine, so that the rest of the recipe need not know it."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DistributedType, InitProcessGroupKwargs, broadcast_object_list, parse_flag_from_env
from transformers.integrations import unset_hf_deepspeed_config

from accelerate import Accelerator
from finetune.options import Options

T = TypeVar("T")

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
WHOLE = "whole"  # one process, or data parallelism: every process holds all of the model


def make_accelerator(options: Options) -> Accelerator:
    """The Accelerator of a run.

    Under FSDP2 and DeepSpeed ``--bf16`` is their mixed precision: they compute in bfloat16 and step on float32
    weights. Elsewhere it is the dtype of the weights, and Accelerate's mixed precision (autocast) stays off.

    Raises:
        ValueError: ``--torch-dtype`` contradicts the launcher; see :func:`trackers`.
        ImportError: see :func:`trackers`.
    """
    names = trackers(options)
    accelerator = Accelerator(
        mixed_precision="bf16" if options.bf16 and launched_sharded() else None,  # None: as set by the launcher
        log_with=None if options.dry_run else names or None,
        project_dir=".",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=options.rank_timeout))],
    )
    if options.torch_dtype == "float32" and accelerator.mixed_precision == "bf16":
        raise ValueError("--torch-dtype float32, and the launcher's mixed_precision is bf16. Leave one of them out.")
    elsewhere = [name for name in names if name != "tensorboard"]
    if elsewhere:
        accelerator.print(
            f"--report-to {','.join(elsewhere)}: losses and norms, computed from private records without noise, leave "
            "this machine where the tracker sends them. No epsilon covers them."
        )
    return accelerator


def trackers(options: Options) -> list[str]:
    """The names of the trackers that ``--report-to`` asks for.

    Raises:
        ValueError: accelerate has no such tracker.
        ImportError: it is not installed; or none is, of all.
    """
    wanted = "all" if options.with_tracking else options.report_to
    if wanted in (None, "none"):
        return []
    installed = [str(getattr(name, "value", name)) for name in get_available_trackers()]
    names = installed if wanted == "all" else [name.strip() for name in str(wanted).split(",")]
    if not names:
        raise ImportError("--report-to all: no tracker is installed: pip install tensorboard (or another).")
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(f"--report-to {name!r}; expected none, all, or of {', '.join(LOGGER_TYPE_TO_CLASS)}.")
        if name not in installed:
            raise ImportError(f"--report-to {name}: it is not installed: pip install {name.replace('_', '-')}.")
    return names


def launched_sharded() -> bool:
    """Whether the launcher was told to shard: FSDP2 or DeepSpeed."""
    return any(parse_flag_from_env(flag) for flag in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"))


def engine_name(accelerator: Accelerator) -> str:
    """The engine that shards: ``whole`` (none), ``fsdp2``, ``zero1``, ``zero2`` or ``zero3``."""
    if accelerator.distributed_type == DistributedType.FSDP:
        return "fsdp2"
    plugin = accelerator.state.deepspeed_plugin
    return WHOLE if plugin is None else f"zero{plugin.zero_stage}"


def sequence_size(accelerator: Accelerator) -> int:
    """Over how many ranks the tokens of an example are spread (sp_size); 1: over none."""
    return int(getattr(accelerator.parallelism_config, "sp_size", 1) or 1)


def shards_parameters(accelerator: Accelerator) -> bool:
    """Whether a forward of the model is a collective, which all ranks must call equally often."""
    return engine_name(accelerator) in ("fsdp2", "zero3")


def weight_dtype(options: Options, accelerator: Accelerator) -> torch.dtype:
    """The dtype to load the model in."""
    name = engine_name(accelerator)
    if name == WHOLE:
        return torch.bfloat16 if options.bf16 else torch.float32
    if name == "fsdp2":
        return torch.float32  # its shards; mixed precision casts them as it gathers them
    return torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32


def compute_dtype(options: Options, accelerator: Accelerator) -> torch.dtype:
    """The dtype of the forward pass."""
    return torch.bfloat16 if options.bf16 or accelerator.mixed_precision == "bf16" else torch.float32


def shard_blocks(accelerator: Accelerator, model: Any) -> None:
    """Have Accelerate shard the model's blocks under FSDP2, except one that holds the input embeddings (BERT's).

    Accelerate 1.15 shards the embeddings by themselves, and fails where they are sharded with their block already.
    """
    if engine_name(accelerator) != "fsdp2":
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin.transformer_cls_names_to_wrap:
        return
    embeddings = model.get_input_embeddings()
    around = {type(m).__name__ for m in model.modules() if m is not embeddings and embeddings in set(m.modules())}
    blocks = set(getattr(model, "_no_split_modules", None) or ())
    if blocks & around:
        plugin.transformer_cls_names_to_wrap = sorted(blocks - around)


@contextmanager
def unsharded(accelerator: Accelerator) -> Iterator[None]:
    """Within it ``from_pretrained`` loads a whole model on the calling rank, which under ZeRO-3 would be sharded.

    ``DeepSpeedPlugin.zero3_init_context_manager`` does not do: with accelerate 1.15 transformers still shards in it.
    """
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        plugin.set_deepspeed_weakref()


def from_first(accelerator: Accelerator, act: Callable[[], T]) -> T:
    """Run ``act`` on rank 0; every rank gets its result, or its error. A collective; ``act`` must not call any.

    Raises:
        Exception: what ``act`` raised, on all ranks.
    """
    box: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            box[0] = act()
        except Exception as error:  # every rank has to raise it, or the others wait for ever
            if accelerator.num_processes == 1:
                raise
            plain = isinstance(error, OSError | ValueError)  # can be pickled
            box[1] = error if plain else RuntimeError(f"{type(error).__name__}: {error}")
    broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    return box[0]


@contextmanager
def ending_all(accelerator: Accelerator, name: str, output: Path) -> Iterator[None]:
    """Say what ended a training, and how to continue; then end this process, after which the launcher ends the others.

    A rank that fails must not call another collective: the others may be in a different one. They notice its end when
    their connections close, by the launcher's signal, or after ``--rank-timeout``.

    Raises:
        SystemExit: with status 1, in place of every error.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # torch.distributed.checkpoint has errors that are no Exception
        traceback.print_exc()
        here, ranks = accelerator.process_index, accelerator.num_processes
        who = f"rank {here} of {ranks}: " if ranks > 1 else ""
        words = [f"{name}.py: error: {who}{type(error).__name__}: {' '.join(str(error).split())[:600]}"]
        if _is_full(error):
            words.append("the disk is full, or a quota is used up: make room first.")
        elif ranks > 1 and _of_another(str(error)):
            words.append("another rank failed, or hung for longer than --rank-timeout: see what it wrote above.")
        words.append(
            "the run ends on all ranks. What the ledger counts is spent; the last checkpoint is intact. Continue with "
            f"the same options and --resume-from-checkpoint --output-dir {output}"
        )
        print("\n    ".join(words), file=sys.stderr, flush=True)
        raise SystemExit(1) from error


def _is_full(error: BaseException | None) -> bool:
    full = os.strerror(errno.ENOSPC)
    while error is not None:
        if getattr(error, "errno", None) in FULL or full in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _of_another(words: str) -> bool:
    return any(part in words.lower() for part in ("timed out", "timeout", "by peer", "connection reset", "remote"))
