"""The file of an account: JSON lines with a checksum each, locked while one is added, on disk before anybody acts.

- the header: format, account id, budget, composition, adjacency and unit;
- ``reserve``: what a use may release at most, before it begins; a later one of the same name takes its place;
- ``finish``: what it released; what it had reserved beyond that is free again.

A line counts once its newline is on disk, and only then does :func:`append` return, so that nobody has acted on a line
that a crash cut off: such a tail is marked with ``#torn`` by the next writer and counts for nothing. A damaged line
anywhere else, or a gap in the numbers, is a :class:`~dpft.errors.LedgerError`: what was spent cannot be known.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpft.errors import DPFTError, LedgerError
from dpft.privacy.account.events import Use, use_from_json, use_to_json
from dpft.privacy.ledger import Ledger, LedgerContent
from dpft.privacy.ledger_file import decode, encode, fsync_directory, hour, lock, read_all, write

FORMAT = 1
_TORN = b"#torn"


@dataclass(frozen=True)
class Entry:
    """One use of the records.

    Attributes:
        name: unique in the account; a run's id for a training.
        what: what it is, in words.
        uses: what it released, or may release at most while it is open.
        open: not finished: its reservation counts in full.
        ledger: of a training: its path relative to the account's folder.
        time: of its last line, in UTC, truncated to the hour.
        item: what one of its examples is: ``example`` (a record) or ``user``.
    """

    name: str
    what: str
    uses: tuple[Use, ...]
    open: bool
    ledger: str | None
    time: str
    item: str = "example"


@dataclass(frozen=True)
class AccountContent:
    """What an account's file says."""

    header: dict[str, Any]
    entries: tuple[Entry, ...]
    lines: int
    tail: bytes
    """What follows the last newline; counted if only its newline is missing."""

    def entry(self, name: str) -> Entry | None:
        """The use of a name, if there is one."""
        return next((entry for entry in self.entries if entry.name == name), None)


def create(file: Path, fields: dict[str, Any]) -> None:
    """Write a new account.

    Raises:
        LedgerError: the file exists, or cannot be written.
    """
    line = encode({"dpft_account": FORMAT, "created": hour(), **fields})  # what cannot be written leaves no file
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError as error:
        raise LedgerError(
            f"{file} exists already; dpft.Account.open continues an account. Deleting one makes what was spent on its "
            "records unknown."
        ) from error
    except OSError as error:
        raise LedgerError(f"cannot create the account {file}: {error}.") from error
    try:
        write(fd, line)
        fsync_directory(file)
    except OSError as error:
        raise LedgerError(f"cannot create the account {file}: {error}.") from error
    finally:
        os.close(fd)


def read(file: Path) -> AccountContent:
    """Read an account without its lock: every line that counts is whole.

    Raises:
        LedgerError: missing, damaged, or no account.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise LedgerError(f"cannot read the account {file}: {error}.") from error
    return parse(data, file)


@contextlib.contextmanager
def locked(file: Path) -> Iterator[tuple[int, AccountContent]]:
    """The open file and its content, while no other process can change it. Waits for others.

    Raises:
        LedgerError: missing, damaged, not writable, or on a file system without locks.
    """
    try:
        fd = os.open(file, os.O_RDWR | os.O_APPEND)
    except OSError as error:
        raise LedgerError(f"cannot open the account {file}: {error}.") from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError as error:
            raise LedgerError(
                f"the file system of the account {file} offers no locks ({error}); put it on a local disk."
            ) from error
        yield fd, parse(read_all(fd), file)
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)  # a child that was forked meanwhile has the descriptor, and would keep the lock
        os.close(fd)


@contextlib.contextmanager
def at_rest(ledger: Path) -> Iterator[LedgerContent | None]:
    """The content of a run's ledger, while no run has it open or can open it; None if one has, or it is unreadable."""
    try:
        fd = os.open(ledger, os.O_RDONLY)
    except OSError:
        yield None
        return
    try:
        try:
            lock(fd, ledger)
            content = Ledger.read(ledger)
        except LedgerError:
            content = None
        yield content
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)  # as in locked()
        os.close(fd)


def append(fd: int, content: AccountContent, file: Path, fields: dict[str, Any]) -> None:
    """Add a line to a locked account; it is on disk when this returns, and only then may anybody act on it.

    Raises:
        LedgerError: it could not be written.
    """
    line = encode({"n": content.lines, **fields, "time": hour()})
    if content.tail:
        line = (b"\n" if decode(content.tail) else _TORN + b"\n") + line
    try:
        if os.fstat(fd).st_nlink == 0:
            raise OSError("the file was deleted")
        write(fd, line)
    except OSError as error:
        raise LedgerError(
            f"nothing could be written to the account {file} ({error}); what asked for it must not happen. Free disk "
            "space and try again."
        ) from error


def reservation(
    name: str, what: str, uses: tuple[Use, ...], ledger: str | None, open_: bool = True, item: str = "example"
) -> dict[str, Any]:
    """The fields of a ``reserve`` line; ``open_=False``: all of it is released at once."""
    found = [use_to_json(use) for use in uses]
    of_users = {} if item == "example" else {"item": item}
    return {"reserve": name, "what": what, "uses": found, "ledger": ledger, "open": open_, **of_users}


def finish(name: str, uses: tuple[Use, ...]) -> dict[str, Any]:
    """The fields of a ``finish`` line."""
    return {"finish": name, "uses": [use_to_json(use) for use in uses]}


def parse(data: bytes, file: Path) -> AccountContent:
    """Read every line.

    Raises:
        LedgerError: damage other than a tail that was cut off.
    """
    *lines, tail = data.split(b"\n")
    if tail and decode(tail):
        lines.append(tail)
    header = decode(lines[0]) if lines else None
    if header is None or "dpft_account" not in header:
        raise LedgerError(
            f"{file} does not begin with a complete account header: it is no account, is damaged, or was being "
            "created. Restore it from a backup; delete it only if nothing was ever paid from it."
        )
    if header["dpft_account"] != FORMAT:
        raise LedgerError(f"{file} has account format {header['dpft_account']!r}; this dpft reads {FORMAT}.")
    entries: dict[str, Entry] = {}
    count = 1
    try:
        for number, raw in enumerate(lines[1:], start=2):
            line = decode(raw)
            if line is None and raw.endswith(_TORN):
                continue
            if line is None or line["n"] != count:
                raise LedgerError(
                    f"the account {file} is damaged in line {number}; what was spent is unknown. Restore it from a "
                    "backup."
                )
            count += 1
            uses = tuple(use_from_json(use) for use in line["uses"])
            if "reserve" in line:
                name = str(line["reserve"])
                entries[name] = Entry(
                    name,
                    str(line["what"]),
                    uses,
                    bool(line["open"]),
                    line["ledger"],
                    str(line["time"]),
                    str(line.get("item", "example")),
                )
            else:
                name = str(line["finish"])
                entries[name] = dataclasses.replace(entries[name], uses=uses, open=False, time=str(line["time"]))
    except LedgerError:
        raise
    except (DPFTError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise LedgerError(f"the account {file} is damaged: {error!r}. Restore it from a backup.") from error
    return AccountContent(header, tuple(entries.values()), count, tail)
