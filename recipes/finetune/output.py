"""The folder of a run: a new one, or the one that is resumed."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import dpft
from accelerate import Accelerator
from finetune.engine import from_first
from finetune.options import Options

OUTPUTS = Path("outputs")
LEDGER = "ledger.jsonl"
SECRETS = f"_{LEDGER}.noise"  # of correlated noise: what takes the noise out of every release
METRICS, CARD, PICTURE, CHECKPOINTS = "metrics.jsonl", "README.md", "training.png", "checkpoints"
ADAPTER = "adapter"
SYNTHETIC, MEASURES = "synthetic", "measures_private.json"  # of synthesize_dp.py
ACCOUNT, DISTRIBUTION = "account.jsonl", "distribution.json"  # of its --distribution private


def forget_noise(accelerator: Accelerator, output: Path) -> None:
    """Delete the secrets of correlated noise, if there are any: a training that is over draws no noise again."""
    if accelerator.is_main_process and (output / SECRETS).exists():
        (output / SECRETS).unlink()
        accelerator.print(
            f"{output / SECRETS} is deleted, as the training is over: with it the noise can be taken out"
        )


@contextmanager
def no_trace(accelerator: Accelerator, output: Path) -> Iterator[None]:
    """If what is within it fails, leave no empty folder of a run that has not begun."""
    try:
        yield
    except BaseException:
        if accelerator.is_main_process:
            with suppress(OSError):  # it is not empty: an earlier run's
                output.rmdir()
                OUTPUTS.rmdir()
        raise


def choose_output(options: Options, name: str, accelerator: Accelerator) -> Path:
    """Choose and make the folder of the run, the same one on every rank; ``name`` is the recipe's.

    Raises:
        FileExistsError: the folder holds a run already, and neither resuming nor overwriting was asked for.
        LedgerError: the account that the run pays from could not be read or written.
    """
    return from_first(accelerator, lambda: _choose_output(options, name))


def _choose_output(options: Options, name: str) -> Path:
    if options.output_dir is not None:
        chosen = Path(options.output_dir).expanduser()
    else:
        candidates = [OUTPUTS / name, *(OUTPUTS / f"{name}-{n}" for n in range(2, 10_000))]
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
            if options.account is not None:
                # What a run that died here had reserved: its account finds the ledger at this place alone.
                dpft.Account.open(Path(options.account).expanduser()).settle()
            _clear(chosen, ledger, options.overwrite_output_dir)
    if not options.resume_from_checkpoint:  # what is resumed is there
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
        numbered = (f"earlier-{number}-" for number in itertools.count(1))
        # a name that is free: rename would replace what still says that something was spent
        earlier = next(n for n in numbered if not any((folder / f"{n}{file}").exists() for file in (LEDGER, ACCOUNT)))
        ledger.rename(folder / f"{earlier}{LEDGER}")
        if (folder / ACCOUNT).exists():
            (folder / ACCOUNT).rename(folder / f"{earlier}{ACCOUNT}")
    ledger.unlink(missing_ok=True)  # a run that ended before its first release
    # they describe the old run, which cannot go on; the model's files are overwritten
    for name in (METRICS, CARD, PICTURE, MEASURES, SECRETS, ACCOUNT, DISTRIBUTION):
        (folder / name).unlink(missing_ok=True)
    for inner in (CHECKPOINTS, ADAPTER, SYNTHETIC):
        shutil.rmtree(folder / inner, ignore_errors=True)
