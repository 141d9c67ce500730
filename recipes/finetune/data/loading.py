"""From a name on the command line to records, to train on and to evaluate with."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from finetune.data.corpora import in_validation, stdlib_docstrings, synthetic_tickets
from finetune.data.documents import load_folder

BUILT_IN = ("docstrings", "tickets")
LOADERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_texts(
    name: str,
    config: str | None = None,
    split: str = "train",
    validation_split: str | None = None,
    validation_share: float = 0.1,
    seed: int = 0,
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
        validation_share: that share, drawn by a hash of the name, customer, path or position of the record.
        seed: seed of the synthetic tickets.

    Returns:
        Training and validation records, disjoint.

    Raises:
        ValueError: the split does not exist, or a side is empty.
    """
    path = Path(name).expanduser()
    key = None
    if name == "docstrings":
        records, key = Dataset.from_list(stdlib_docstrings()), "name"
    elif name == "tickets":
        # by customer: nobody is in training and validation at once
        records, key = Dataset.from_list(synthetic_tickets(seed=seed)), "customer_id"
    elif path.is_dir() and ((path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()):
        records = load_from_disk(str(path))
    elif path.is_dir():
        records, key = load_folder(path), "path"
    elif path.suffix in LOADERS:
        if not path.is_file():
            raise ValueError(
                f"--dataset {name!r}: no such file. Give a path from the folder you are in, or a full one."
            )
        records = load_dataset(LOADERS[path.suffix], data_files=str(path))
    else:
        records = load_dataset(name, config)
    if isinstance(records, DatasetDict):
        train = _split(records, split, name)
        if validation_split is None:
            others = [s for s in ("validation", "valid", "dev", "test") if s in records and s != split]
            validation_split = others[0] if others else None
        if validation_split is not None:
            return _not_empty(train, _split(records, validation_split, name), name)
        records = train
    elif validation_split is not None:
        raise ValueError(
            f"--validation-split {validation_split!r}: {name!r} has one split only. Leave the option out."
        )
    if key is None:
        held_out = [in_validation(str(position), validation_share) for position in range(len(records))]
    else:
        held_out = [in_validation(str(value), validation_share) for value in records[key]]
    train = records.select([i for i, out in enumerate(held_out) if not out])
    validation = records.select([i for i, out in enumerate(held_out) if out])
    return _not_empty(train, validation, name)


def _split(records: DatasetDict, split: str, name: str) -> Dataset:
    if split not in records:
        raise ValueError(
            f"--dataset {name!r} has no split {split!r}; it has {', '.join(records)}. Choose one of them."
        )
    return records[split]


def _not_empty(train: Dataset, validation: Dataset, name: str) -> tuple[Dataset, Dataset]:
    if not len(train) or not len(validation):
        raise ValueError(
            f"--dataset {name!r}: {len(train)} training and {len(validation)} validation records; expected at least "
            "one of each. Choose another --validation-split or --validation-share."
        )
    return train, validation
