"""Checkpoints of a run: complete or absent, and loadable by another number of processes than wrote them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from finetune.engine import WHOLE, engine_name, from_first
from finetune.output import CHECKPOINTS

KEPT = 2
ABOUT = "written_by.json"
# The folder of a checkpoint in which Accelerate has DeepSpeed save its state.
DEEPSPEED = "pytorch_model"


class SaveError(RuntimeError):
    """A checkpoint could not be written; the earlier ones are intact."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that can be loaded.

    Attributes:
        step: logical steps that were released when it was written.
        path: the folder to load.
        converted: the folder is a copy made for this number of processes, to be removed once it is loaded.
    """

    step: int
    path: Path
    converted: bool = False


def save(accelerator: Accelerator, output: Path, step: int) -> None:
    """Save the state after a step, of which the last two are kept. A collective.

    Raises:
        SaveError: see :func:`write`.
    """
    write(accelerator, output / CHECKPOINTS / f"step_{step}")
    if accelerator.is_main_process:
        for old in sorted(_whole(output), key=_step)[:-KEPT]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def write(accelerator: Accelerator, folder: Path, **facts: Any) -> None:
    """Save the state, and facts about it: under another name until it is complete, as any process may die meanwhile.

    Raises:
        SaveError: on the ranks that failed; the others wait, so that the process has to end.
    """
    partial = folder.with_name(f"partial_{folder.name}")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()  # every rank has written its part
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # torch.distributed.checkpoint has errors that are no Exception
        # The engines' messages seldom name the cause; their end comes nearest to it.
        name = folder.name.replace("_", " ")
        raise SaveError(
            f"the checkpoint of {name} could not be saved (... {' '.join(str(error).split())[-200:]}). Is the "
            f"disk full, or a quota used up? Make room first; {partial.name} is what was written of it."
        ) from error
    if accelerator.is_main_process:
        about = {"engine": engine_name(accelerator), "processes": accelerator.num_processes, **facts}
        (partial / ABOUT).write_text(json.dumps(about), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    accelerator.wait_for_everyone()


def find(accelerator: Accelerator, output: Path) -> Checkpoint:
    """The checkpoint to resume from, in a form that this engine and this number of processes can load.

    To be called before the model is prepared, when DeepSpeed has to be configured for it. A collective.

    Raises:
        FileNotFoundError: there is none.
        ValueError: another engine wrote it.
        RuntimeError: DeepSpeed could not convert it.
    """
    found = from_first(accelerator, lambda: _find(accelerator, output))
    if found.converted:
        plugin: Any = accelerator.state.deepspeed_plugin
        plugin.deepspeed_config["checkpoint"] = {"load_universal": True}
    return found


def load(accelerator: Accelerator, checkpoint: Checkpoint, strict: bool = True) -> None:
    """Load the state into the prepared objects; not ``strict`` for 4-bit weights, whose scales are no entry of theirs.

    A collective.
    """
    accelerator.load_state(str(checkpoint.path), **({} if strict else {"strict": False}))
    accelerator.wait_for_everyone()
    if checkpoint.converted and accelerator.is_main_process:
        shutil.rmtree(checkpoint.path)


def _find(accelerator: Accelerator, output: Path) -> Checkpoint:
    path = max(_whole(output), key=_step, default=None)
    if path is None:
        raise FileNotFoundError(
            f"--resume-from-checkpoint: no checkpoint in {str(output / CHECKPOINTS)!r}; expected one, as "
            "--checkpoint-every or Ctrl-C writes it. Start anew: another --output-dir, or --overwrite-output-dir."
        )
    try:
        about = json.loads((path / ABOUT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        about = {"engine": WHOLE, "processes": 1}  # checkpoints without this file are of one process
    check_engine(accelerator, path, about["engine"])
    if is_of_others(accelerator, about["processes"]):
        return Checkpoint(_step(path), _convert(path), converted=True)
    return Checkpoint(_step(path), path)


def is_of_others(accelerator: Accelerator, processes: int) -> bool:
    """Whether a checkpoint of so many processes has to be converted: DeepSpeed's are bound to their number."""
    return engine_name(accelerator).startswith("zero") and processes != accelerator.num_processes


def check_engine(accelerator: Accelerator, path: Path, there: str) -> None:
    """Refuse a checkpoint of another engine.

    Raises:
        ValueError: names both.
    """
    here = engine_name(accelerator)
    if here != there:
        words = {WHOLE: "one process or data parallelism (ddp.yaml)"}
        raise ValueError(
            f"--resume-from-checkpoint: {str(path)!r} was written under {words.get(there, there)}, and this launch "
            f"is {words.get(here, here)}. Launch with the configuration that wrote it; the number of processes may "
            "change."
        )


def _convert(path: Path) -> Path:
    """Make a DeepSpeed checkpoint universal: its own is bound to the number of processes that wrote it.

    DeepSpeed's tool ``deepspeed.checkpoint.ds_to_universal`` does it, and keeps every element of weights and moments.
    """
    whole = path.with_name(f"universal_{path.name}")
    shutil.rmtree(whole, ignore_errors=True)
    shutil.copytree(path, whole, ignore=shutil.ignore_patterns(DEEPSPEED))
    words = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    words += ["--input_folder", str(path / DEEPSPEED), "--output_folder", str(whole / DEEPSPEED)]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        shutil.rmtree(whole, ignore_errors=True)
        raise RuntimeError(
            f"DeepSpeed could not convert {str(path)!r} for another number of processes: {done.stdout[-800:]} Launch "
            "as many processes as wrote it."
        )
    return whole


def _whole(output: Path) -> list[Path]:
    """The complete checkpoints; incomplete ones have another name."""
    return [p for p in (output / CHECKPOINTS).glob("step_*") if p.name.removeprefix("step_").isdigit()]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))
