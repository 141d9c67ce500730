"""The file, beside the ledger, from which a resumed run draws the earlier correlated noise once more.

It holds the secret of the generator of each start of a run, one line each, written and fsynced before the start makes
its first release. Whoever reads it can take the noise out of every release: it is made readable by its owner only
(mode 0600), is in no checkpoint, and should be deleted when the training is over.

- the header: format, run id, the strategy, and the environment: whatever the drawn numbers depend on, and the number
  and a digest of the examples, whose order decides which steps each one can be in;
- ``first``: the number of releases in the ledger when a start began, and its secret.

A run whose ledger has releases cannot go on without the file, unless all of its steps are released: such a run can be
loaded and exported when the file is deleted. A last line that a crash truncated is dropped: the start
that wrote it had made no release.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpft.errors import LedgerError
from dpft.privacy.correlated.strategy import Strategy
from dpft.privacy.ledger_file import decode, encode, fsync_directory, read_all, write

FORMAT = 1


@dataclass(frozen=True)
class NoiseSecret:
    """The secret of one start of a run.

    Attributes:
        first: releases that were made before it.
        secret: of its generators.
    """

    first: int
    secret: bytes = field(repr=False)


def secrets_path(ledger: Path) -> Path:
    """The file that belongs to a ledger: ``_NAME.noise``.

    Hugging Face's Trainer, and its uploads of a folder, leave out what begins with an underscore.
    """
    return ledger.with_name(f"_{ledger.name}.noise")


def begin(
    ledger: Path,
    run_id: str,
    starts: Iterable[int],
    count: int,
    strategy: Strategy,
    environment: Mapping[str, str],
    secret: bytes,
) -> tuple[NoiseSecret, ...]:
    """Write the secret of a start, and return once it is on disk. The ledger must be open, which locks both.

    Args:
        ledger: its file.
        run_id: of the ledger.
        starts: how many releases were in the ledger at each start that made releases.
        count: releases in the ledger.
        strategy: of the noise.
        environment: whatever else must be as it was when the run began.
        secret: fresh bytes from the operating system.

    Returns:
        The secrets of all starts, this one the last.

    Raises:
        LedgerError: there were releases, more are planned, and the file is missing; or it is damaged, of another run
            or environment, or behind or ahead of the ledger; or it cannot be written.
    """
    path = secrets_path(ledger)
    header = {
        "dpft_noise": FORMAT,
        "run_id": run_id,
        "strategy": strategy.to_dict(),
        "environment": dict(environment),
    }
    try:
        # Without releases nothing depends on what an earlier start wrote.
        fd = os.open(path, os.O_RDWR | os.O_APPEND | (0 if count else os.O_CREAT | os.O_TRUNC), 0o600)
    except FileNotFoundError as error:
        if count >= strategy.steps:  # no noise is drawn any more: CorrelatedNoise.release refuses a further step
            return (NoiseSecret(count, secret),)
        raise LedgerError(
            f"no {path}: the ledger counts {count} releases, and later steps take back a part of their noise, which "
            "is drawn from this file. Restore it; without it, begin a new run with another ledger_path."
        ) from error
    except OSError as error:
        raise LedgerError(f"cannot open the secrets of the noise {path}: {error}.") from error
    try:
        os.fchmod(fd, 0o600)
        earlier = _earlier(fd, path, header, set(starts), count) if count else ()
        line = {"first": count, "secret": secret.hex()}
        write(fd, (b"" if count else encode(header)) + encode(line))
        fsync_directory(path)
    except OSError as error:
        raise LedgerError(f"cannot write the secrets of the noise {path}: {error}.") from error
    finally:
        os.close(fd)
    return (*earlier, NoiseSecret(count, secret))


def _earlier(fd: int, path: Path, header: dict[str, Any], starts: set[int], count: int) -> tuple[NoiseSecret, ...]:
    data = read_all(fd)
    *lines, torn = data.split(b"\n")
    if torn:
        os.ftruncate(fd, len(data) - len(torn))
    found = [decode(line) for line in lines]
    if not found or any(fields is None for fields in found):
        raise LedgerError(
            f"the secrets of the noise {path} are damaged: the earlier noise cannot be drawn again. Restore the file; "
            "without it, begin a new run with another ledger_path."
        )
    began, *lines_of_starts = [fields for fields in found if fields is not None]
    for name in ("dpft_noise", "run_id", "strategy"):
        if began.get(name) != header[name]:
            raise LedgerError(
                f"the secrets of the noise {path} have {name} {began.get(name)!r}, and this run has {header[name]!r}; "
                "give the file that was written with the ledger."
            )
    before, now = began.get("environment") or {}, header["environment"]
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            raise LedgerError(
                f"{name} was {before.get(name)!r} when the run began and is {now.get(name)!r}: the earlier noise "
                "would come out different, or examples be in other steps than the accounting assumes. Resume with "
                "what the run began with."
            )
    try:
        secrets = tuple(NoiseSecret(int(start["first"]), bytes.fromhex(start["secret"])) for start in lines_of_starts)
        firsts = [secret.first for secret in secrets]
        if firsts[:1] != [0] or firsts != sorted(firsts) or firsts[-1] > count:
            raise ValueError(f"starts at {firsts} releases, and the ledger counts {count}")
        if missing := sorted(starts - set(firsts)):
            raise ValueError(f"starts at {firsts} releases, and the ledger has others at {missing}")
    except (KeyError, TypeError, ValueError) as error:
        raise LedgerError(
            f"the secrets of the noise {path} do not fit the ledger: {error}. One of the two is an old copy: give "
            "those that were written together."
        ) from error
    return secrets
