"""From a name on the command line to records, to train on and to evaluate with."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from finetune.data.checks import values_of
from finetune.data.corpora import in_validation, stdlib_docstrings, synthetic_tickets
from finetune.data.documents import load_folder
from finetune.data.files import LOADERS, check_file, diagnose, header_of, shown

BUILT_IN = ("docstrings", "tickets")


def load_texts(
    name: str,
    config: str | None = None,
    split: str = "train",
    validation_split: str | None = None,
    validation_share: float = 0.1,
    seed: int = 0,
    user_column: str | None = None,
    check: Callable[[Dataset], object] | None = None,
) -> tuple[Dataset, Dataset]:
    """Load the records to train on and to evaluate with.

    Args:
        name: ``docstrings`` or ``tickets`` (built in, no network), a folder written by ``Dataset.save_to_disk``, any
            other folder (one record a document), a text (one record a line), JSON, JSON-lines, CSV or parquet file,
            or the name of a dataset of the hub.
        config: configuration of a hub dataset.
        split: split to train on.
        validation_split: split to evaluate with; if None, one named ``validation`` or ``test`` is taken, and where
            there is none a share of the training split is put aside.
        validation_share: that share, drawn by a hash of the user, name, customer, path or position of the record.
        seed: seed of the synthetic tickets.
        user_column: column that names the user of each record. Nobody is on both sides: of a validation split the
            records of users who are in the training split, too, are left out.
        check: called with each split as it was loaded: the numbers of its records are those of the file.

    Returns:
        Training and validation records, disjoint.

    Raises:
        ValueError: the data cannot be read, the split does not exist, or a side is empty; one line that says where
            and what is wrong, without the content of a record.
    """
    records, key = _load(name, config, seed)
    if isinstance(records, DatasetDict):
        train = _split(records, split, name)
        if validation_split is None:
            others = [s for s in ("validation", "valid", "dev", "test") if s in records and s != split]
            validation_split = others[0] if others else None
        if validation_split is not None:
            validation = _split(records, validation_split, name)
            for part in (train, validation):
                if check is not None:
                    check(part)
            if user_column is not None:
                users = set(values_of(train, user_column))
                known = enumerate(values_of(validation, user_column))
                validation = validation.select([i for i, user in known if user not in users])
            return _not_empty(train, validation, name)
        records = train
    elif validation_split is not None:
        raise ValueError(
            f"--validation-split {validation_split!r}: {name!r} has one split only. Leave the option out."
        )
    if check is not None:
        check(records)
    if user_column is not None:
        keys: Iterator[str] = values_of(records, user_column)
    else:
        keys = map(str, range(len(records))) if key is None else values_of(records, key)
    held_out = [in_validation(value, validation_share) for value in keys]
    train = records.select([i for i, out in enumerate(held_out) if not out])
    validation = records.select([i for i, out in enumerate(held_out) if out])
    return _not_empty(train, validation, name)


def _load(name: str, config: str | None, seed: int) -> tuple[Dataset | DatasetDict, str | None]:
    """The records, and the column by which validation is put aside; None: by position."""
    path = Path(name).expanduser()
    if not name.strip():
        raise ValueError(f"--dataset is empty; expected one of {', '.join(BUILT_IN)}, a file, a folder, or a name.")
    if name == "docstrings":
        return Dataset.from_list(stdlib_docstrings()), "name"
    if name == "tickets":
        # by customer: nobody is in training and validation at once
        return Dataset.from_list(synthetic_tickets(seed=seed)), "customer_id"
    with _quiet():
        if path.is_dir() and ((path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()):
            return _load_saved(path), None
        if path.is_dir():
            return _load_documents(path), "path"
        if path.suffix.lower() in LOADERS or path.exists():
            return _load_file(path, name), None
        return _load_from_hub(name, config), None


@contextmanager
def _quiet() -> Iterator[None]:
    """What datasets logs of a failure repeats the error, and may show a record."""
    logger = logging.getLogger("datasets")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _load_file(path: Path, name: str) -> DatasetDict:
    if not path.is_file():
        raise ValueError(f"--dataset {name!r}: no such file. Give a path from the folder you are in, or a full one.")
    if path.suffix.lower() not in LOADERS:
        raise ValueError(
            f"--dataset {name!r} is a file with the suffix {path.suffix!r}; expected one of {', '.join(LOADERS)}."
        )
    check_file(path)
    kind = LOADERS[path.suffix.lower()]
    try:
        records = load_dataset(kind, data_files=str(path), **_arguments(kind, path))
    except Exception as error:  # whatever pandas, pyarrow or datasets raise; their texts may show a record
        raise ValueError(f"--dataset {name!r}: {diagnose(path) or _reason(error)}") from error
    if not len(records["train"]):
        raise ValueError(f"--dataset {name!r} has no records. Give a file with records.")
    return records


def _arguments(kind: str, path: Path) -> dict[str, Any]:
    """A byte order mark is no text. CSV has no types: all cells are texts, ``NA`` and ``007`` as others are."""
    if kind == "text":
        return {"encoding": "utf-8-sig"}
    if kind == "csv":
        return {"features": Features({name: Value("string") for name in header_of(path)}), "keep_default_na": False}
    return {}


def _load_documents(path: Path) -> Dataset:
    try:
        return load_folder(path)
    except DatasetGenerationError as error:
        raise ValueError(f"--dataset {str(path)!r}: {_reason(error)}") from error


def _load_saved(path: Path) -> Dataset | DatasetDict:
    try:
        return load_from_disk(str(path))
    except Exception as error:
        raise ValueError(
            f"--dataset {str(path)!r} seems to be written by save_to_disk, and cannot be read: {_reason(error)} Save "
            "it again, or copy all of its files."
        ) from error


def _load_from_hub(name: str, config: str | None) -> Dataset | DatasetDict:
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise ValueError(
            f"--dataset {name!r}: no such file or folder. Give a path from the folder you are in, or a full one."
        )
    try:
        return load_dataset(name, config)
    except Exception as error:
        words = " ".join(str(error).split())[:300]
        raise ValueError(
            f"--dataset {name!r} is not one of {', '.join(BUILT_IN)}, nor a file or folder here, and the hub did not "
            f"give it ({type(error).__name__}: {words}). Check the name and the network; or, where there is one, "
            "load_dataset(...).save_to_disk(FOLDER), and give the folder."
        ) from error


def _reason(error: BaseException) -> str:
    """The kinds of the errors, outermost first, and the words of the operating system: no others, for the records."""
    kinds, words = [], ""
    cause: BaseException | None = error
    while cause is not None:
        kinds.append(type(cause).__name__)
        if isinstance(cause, OSError) and cause.strerror:
            words = f", {cause.strerror}"
        cause = cause.__cause__ or cause.__context__
    return f"datasets could not read it ({', from '.join(kinds)}{words})."


def _split(records: DatasetDict, split: str, name: str) -> Dataset:
    if split not in records:
        raise ValueError(
            f"--dataset {name!r} has no split {split!r}; it has {shown(list(records))}. Choose one of them."
        )
    return records[split]


def _not_empty(train: Dataset, validation: Dataset, name: str) -> tuple[Dataset, Dataset]:
    if not len(train) or not len(validation):
        raise ValueError(
            f"--dataset {name!r}: {len(train)} training and {len(validation)} validation records; expected at least "
            "one of each. Choose another --validation-split or --validation-share."
        )
    return train, validation
