"""Long texts: a folder of documents or a source tree as records, and a document in rows that are one example.

The rows of a document overlap by one token, which is read in both and predicted in the first only: each token of the
document but the first is predicted once, from those before it in its row. The document's loss is the mean over them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

IGNORED_LABEL = -100  # transformers' mark for a token that has no loss
PROSE = ".txt .text .md .markdown .rst .tex .adoc .org .html .htm .xml"
SOURCE = (
    ".py .pyi .c .h .cc .cpp .cxx .hh .hpp .cu .cuh .java .kt .scala .go .rs .swift .js .jsx .ts .tsx .rb .php .pl .r "
    ".jl .m .lua .hs .ml .ex .erl .clj .cs .fs .vb .sh .bash .ps1 .sql .proto .cmake .toml .yaml .yml .ini .cfg"
)
SUFFIXES = frozenset(f"{PROSE} {SOURCE}".split())


def find_documents(folder: Path) -> Iterator[Path]:
    """The files with one of ``SUFFIXES``, by sorted path; no links, no hidden files, nothing in hidden folders."""
    for here, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(here, name)
            if (
                not name.startswith(".")
                and path.suffix.lower() in SUFFIXES
                and path.is_file()
                and not path.is_symlink()
            ):
                yield path


def _read(folder: str, files: Sequence[tuple[str, int, int]]) -> Iterator[dict[str, str]]:
    """The text of each file; one that is no UTF-8 text is left out, whatever the others are."""
    for name, _, _ in files:
        content = Path(folder, name).read_bytes()
        if b"\0" in content:
            continue
        try:
            yield {"text": content.decode("utf-8-sig"), "path": name}
        except UnicodeDecodeError:
            continue


def load_folder(folder: Path) -> Dataset:
    """One record for each document of a folder: ``text`` and ``path`` (below the folder).

    Written to the cache of ``datasets`` file by file and memory-mapped, so that the folder may exceed memory. A file
    that was changed is read anew.

    Raises:
        ValueError: there is no document.
    """
    files = []
    for path in find_documents(folder):
        found = path.stat()
        files.append((path.relative_to(folder).as_posix(), found.st_size, found.st_mtime_ns))
    if not files:
        raise ValueError(
            f"--dataset {str(folder)!r} is a folder without documents; expected files that end in {PROSE}, or in a "
            "programming language's suffix (listed in recipes/finetune/data/documents.py), or what save_to_disk "
            "writes."
        )
    if next(_read(str(folder), files), None) is None:
        raise ValueError(f"--dataset {str(folder)!r}: none of {len(files)} files is text in UTF-8.")
    # a tuple: datasets takes a list for the shards of several processes
    return Dataset.from_generator(_read, gen_kwargs={"folder": str(folder.resolve()), "files": tuple(files)})


def rows_of(ids: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Cut a document into rows of at most ``row_tokens`` tokens, each beginning with the last token of the one before.

    At least one row; no row of a single token unless it is the whole document.
    """
    return [list(ids[at : at + row_tokens]) for at in range(0, max(1, len(ids) - 1), row_tokens - 1)]


def tokens_in_memory(tokens: int, row_tokens: int) -> int:
    """What a document of so many tokens takes in rows of ``row_tokens``, the padding of its last row included."""
    return tokens if tokens <= row_tokens else -(-(tokens - 1) // (row_tokens - 1)) * row_tokens


def token_counts(examples: Any) -> list[int] | None:
    """The number of tokens of each example, of a ``datasets.Dataset`` from the offsets of its lists alone.

    None where the examples have no ``input_ids``.
    """
    if "input_ids" not in examples[0]:
        return None
    if not isinstance(examples, Dataset):
        return [len(example["input_ids"]) for example in examples]
    batches: Iterable[Any] = examples.select_columns("input_ids").with_format("arrow").iter(1000)
    return [n for batch in batches for n in batch["input_ids"].combine_chunks().value_lengths().to_pylist()]


def longest(examples: Dataset) -> int:
    """Tokens of the longest example."""
    return max(token_counts(examples) or [0])


def document_losses(logits: Tensor, labels: Tensor, example_ids: Tensor) -> Tensor:
    """The mean loss of each document over the tokens of all its rows.

    Args:
        logits: ``[R, T, V]`` of the rows.
        labels: ``[R, T]`` int64, not shifted; -100 has no loss.
        example_ids: ``[R]`` int64, 0 to U - 1: the document of each row.

    Returns:
        ``[U]`` float32 or wider; 0 for a document without a predicted token.
    """
    targets = labels[:, 1:]
    wide = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32)).transpose(1, 2)
    of_rows = nn.functional.cross_entropy(wide, targets, ignore_index=IGNORED_LABEL, reduction="none").sum(1)
    ids = example_ids.to(logits.device)
    documents = int(example_ids.max()) + 1
    sums = of_rows.new_zeros(documents).index_add(0, ids, of_rows)
    counts = of_rows.new_zeros(documents).index_add(0, ids, (targets != IGNORED_LABEL).sum(1).to(of_rows.dtype))
    return sums / counts.clamp(min=1)
