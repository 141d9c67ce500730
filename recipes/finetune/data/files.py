"""What is wrong with a file of records, in one line that names the place and never the content.

``datasets`` loads the files. What it would misread, or end in a traceback, is found here: some of it before, by the
file's first bytes and a pass that decodes it; the rest by reading the file again after the loader has failed.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

LOADERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
HEAD = 1 << 16  # bytes
# A JSON file whose loading fails is read whole by datasets; a larger one is checked line by line before.
LARGE = 4 << 30
SIGNATURES = {
    b"\x1f\x8b": "gzip-compressed",
    b"BZh": "bzip2-compressed",
    b"\xfd7zXZ": "xz-compressed",
    b"\x28\xb5\x2f\xfd": "zstandard-compressed",
    b"PK\x03\x04": "a zip archive (or an office document)",
    b"7z\xbc\xaf": "a 7-zip archive",
    b"%PDF": "a PDF document",
    b"PAR1": "a parquet file: name it .parquet",
    b"ARROW1": "an Arrow file",
}
# UTF-32's begins with UTF-16's
MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
KINDS = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "an array", dict: "an object"}
RECORDS = 'expected objects such as {"text": "..."}, one on each line, or all of them in one array.'


def shown(names: list[str]) -> str:
    """Column names for a message; a long one is not printed: without a header the first record stands there."""
    return ", ".join(name if len(name) <= 40 else f"(a name of {len(name)} characters)" for name in names)


def check_file(path: Path) -> None:
    """Refuse a file that is none of its kind, or not UTF-8; by passes over it, in constant memory.

    Raises:
        ValueError: it is empty, binary, compressed, in another encoding, no parquet file, no JSON in records, or a
            CSV file whose header names no columns, or whose rows are not equally long.
        OSError: it cannot be read.
    """
    head = _head(path)
    if not head:
        raise ValueError(f"--dataset {str(path)!r} is empty (0 bytes). Give a file with records.")
    if path.suffix.lower() == ".parquet":
        _check_parquet(path, head)
        return
    for signature, kind in SIGNATURES.items():
        if head.startswith(signature):
            raise ValueError(
                f"--dataset {str(path)!r} is {kind}, not text as its suffix says. Give the text itself, in UTF-8."
            )
    for mark, encoding in MARKS.items():
        if head.startswith(mark):
            raise ValueError(
                f"--dataset {str(path)!r} is encoded in {encoding} (by its byte order mark), expected UTF-8. Convert "
                f"it: iconv -f {encoding} -t UTF-8."
            )
    if (at := head.find(b"\0")) >= 0:
        kind = "UTF-16 without a byte order mark" if head.count(b"\0") > len(head) // 4 else "a binary file"
        raise ValueError(
            f"--dataset {str(path)!r} has a NUL byte at offset {at}: it seems to be {kind}, expected text in UTF-8."
        )
    if wrong := _not_utf8(path):
        raise ValueError(f"--dataset {str(path)!r}: {wrong}")
    if not head.removeprefix(codecs.BOM_UTF8).strip() and path.stat().st_size <= len(head):
        raise ValueError(f"--dataset {str(path)!r} holds white space only. Give a file with records.")
    if path.suffix.lower() == ".csv" and (wrong := _wrong_csv(path)):  # pandas fills short rows, and renames columns
        raise ValueError(f"--dataset {str(path)!r}: {wrong}")
    if LOADERS[path.suffix.lower()] == "json":
        first = head.removeprefix(codecs.BOM_UTF8).lstrip()
        records = first[:1] in (b"{", b"[") and not first.startswith(b"{\n")  # of a file of nulls pyarrow crashes
        if (not records or path.stat().st_size > LARGE) and (wrong := _wrong_json(path)):
            raise ValueError(f"--dataset {str(path)!r}: {wrong}")


def diagnose(path: Path) -> str | None:
    """Why a file that passed :func:`check_file` cannot be loaded: the first thing that is wrong; None if unknown.

    Reads the file line by line, a JSON array whole.
    """
    found: dict[str, Callable[[Path], str | None]] = {
        "json": _wrong_json,
        "parquet": lambda _: "the parquet file is damaged, or truncated. Write it, or copy it, again.",
    }
    look = found.get(LOADERS[path.suffix.lower()])
    return None if look is None else look(path)


def _head(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(HEAD)
    except PermissionError as error:
        raise ValueError(
            f"--dataset {str(path)!r} cannot be read: permission denied. Ask for the right to read it."
        ) from error


def _check_parquet(path: Path, head: bytes) -> None:
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 4))
        tail = file.read()
    if not head.startswith(b"PAR1"):
        raise ValueError(f"--dataset {str(path)!r} is no parquet file: it does not begin with PAR1. Check its suffix.")
    if tail != b"PAR1" or path.stat().st_size < 12:
        raise ValueError(
            f"--dataset {str(path)!r} is a truncated parquet file: it does not end with PAR1. Write it, or copy it, "
            "again."
        )


def _not_utf8(path: Path) -> str | None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                decoder.decode(chunk)
            decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        pass
    else:
        return None
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return (
                    f"line {number} is not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1} (offset "
                    f"{offset + error.start} of the file). Convert it, if it is Latin-1: iconv -f LATIN1 -t UTF-8."
                )
            offset += len(line)
    return None  # it has changed meanwhile


# JSON


def _wrong_json(path: Path) -> str | None:
    with open(path, encoding="utf-8-sig") as file:
        first = next(line.strip() for line in file if line.strip())
        file.seek(0)
        if first == "{":
            return f"it is one object over several lines; {RECORDS}"
        if not first.startswith("["):
            return _wrong_records(_parsed_lines(file), "line")
        try:
            whole = json.load(file, object_pairs_hook=_object)
        except json.JSONDecodeError as error:
            return _at(error, error.lineno)
        except ValueError as error:
            return f"an object {error}"
    if not whole:
        return "the array is empty. Give a file with records."
    if all(isinstance(item, str) for item in whole):
        return None
    return _wrong_records(enumerate(whole, 1), "item")


def _at(error: ValueError, line: int) -> str:
    if not isinstance(error, json.JSONDecodeError):
        return f"line {line} {error}"
    return f"line {line} is not JSON: {error.msg} (column {error.colno}). Correct the file."


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for number, key in enumerate(keys) if key in keys[:number])
        raise ValueError(f"has the key {shown([twice])!r} twice. Leave one of them out.")
    return found


def _parsed_lines(file: TextIO) -> Iterator[tuple[int, Any]]:
    """The number of each line that is not blank, and its value; a line that is not JSON as the error."""
    for number, line in enumerate(file, 1):
        try:
            if line.strip():
                yield number, json.loads(line.rstrip(), object_pairs_hook=_object)  # errors have columns of this line
        except ValueError as error:
            yield number, error


def _wrong_records(records: Iterable[tuple[int, Any]], word: str) -> str | None:
    """The first record that is no object, or holds another kind of value in a column than those before it."""
    kinds: dict[str, str] = {}
    for number, record in records:
        if isinstance(record, ValueError):
            return _at(record, number)
        if not isinstance(record, dict):
            return f"{word} {number} is {KINDS.get(type(record), 'null')}; {RECORDS}"
        for column, value in record.items():
            if value is None:
                continue
            kind = KINDS[type(value)]
            if kinds.setdefault(column, kind) != kind:
                return (
                    f"{word} {number}: column {shown([column])!r} holds {kind}, and {kinds[column]} before. "
                    "Give all records of a column the same type."
                )
            if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
                return f"{word} {number}: column {shown([column])!r} holds half of a surrogate pair. Correct the text."
    return None


# CSV


@contextmanager
def _rows(path: Path) -> Iterator[Any]:
    """A reader of rows; the module's limit of a field is lifted meanwhile: a text may be long."""
    limit = csv.field_size_limit(1 << 28)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield csv.reader(file, strict=True)
    finally:
        csv.field_size_limit(limit)


def header_of(path: Path) -> list[str]:
    """The names of a CSV file's columns."""
    with _rows(path) as reader:
        return next(row for row in reader if row)


def _wrong_csv(path: Path) -> str | None:
    begins = 1
    with _rows(path) as reader:
        try:
            header: list[str] = next((row for row in reader if row), [])
            if wrong := _wrong_header(header):
                return wrong
            records, begins = 0, reader.line_num + 1
            for row in reader:
                if row and len(row) != len(header):
                    return (
                        f"line {begins} has {len(row)} cells, and the header {len(header)} columns. Correct the line; "
                        "a text with commas or line breaks stands in double quotes."
                    )
                records, begins = records + bool(row), reader.line_num + 1
        except csv.Error as error:
            return f"line {begins} is not CSV: {error}. A text stands in double quotes, its own are doubled."
    return None if records else "it has a header and no records. Give a file with records."


def _wrong_header(header: list[str]) -> str | None:
    if empty := [number for number, name in enumerate(header, 1) if not name.strip()]:
        return f"the header has no name for column {empty[0]} of {len(header)}. Name it."
    if twice := [name for number, name in enumerate(header) if name in header[:number]]:
        return f"the header has the column {shown(twice[:1])!r} twice. Rename one of them."
    for mark, word in ((";", "semicolons"), ("\t", "tabs"), ("|", "vertical bars")):
        if len(header) == 1 and mark in header[0]:
            return f"the header is one column with {word} in its name; expected commas between columns."
    return None
