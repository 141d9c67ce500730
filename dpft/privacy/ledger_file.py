"""Append-only files of JSON lines, each with a CRC-32 of itself; a write returns once it is on disk."""

from __future__ import annotations

import fcntl
import json
import os
import time
import zlib
from pathlib import Path
from typing import Any

from dpft.errors import LedgerError


def lock(fd: int, file: Path) -> None:
    """Lock it against every other process, until it is closed.

    Raises:
        LedgerError: another process has locked it, or the file system cannot.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise LedgerError(
            "another process, or a run of this one that was not closed (loader.privacy.close()), has the "
            f"ledger {file} open; two runs cannot share one. Wait for it, or end it."
        ) from error
    except OSError as error:
        raise LedgerError(
            f"the file system of {file} offers no locks ({error}); put the ledger on a local disk."
        ) from error


def encode(fields: dict[str, Any]) -> bytes:
    """A line."""
    text = json.dumps(fields, separators=(",", ":"), allow_nan=False)
    return f'{text[:-1]},"crc":"{zlib.crc32(text.encode()):08x}"}}\n'.encode()


def decode(raw: bytes) -> dict[str, Any] | None:
    """The fields of a line; None if it is incomplete or damaged."""
    body, mark, crc = raw.rpartition(b',"crc":"')
    if not mark or crc != f'{zlib.crc32(body + b"}"):08x}"}}'.encode():
        return None
    try:
        fields = json.loads(body + b"}")
    except ValueError:
        return None
    return fields if isinstance(fields, dict) else None


def write(fd: int, data: bytes) -> None:
    """Writes all of it; it is on disk when this returns."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    os.fsync(fd)


def read_all(fd: int) -> bytes:
    """The whole file."""
    os.lseek(fd, 0, os.SEEK_SET)
    parts = []
    while part := os.read(fd, 1 << 20):
        parts.append(part)
    return b"".join(parts)


def fsync_directory(file: Path) -> None:
    """Without this, a power failure may lose the name of a new file, and the file with it."""
    fd = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def hour() -> str:
    """The time, truncated to the hour."""
    return time.strftime("%Y-%m-%dT%H:00Z", time.gmtime())
