"""The recipes are scripts, not a part of the package: their folder is put where Python puts a script's folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
if str(RECIPES) not in sys.path:
    sys.path.insert(0, str(RECIPES))


@pytest.fixture(scope="session")
def docstrings() -> list[dict[str, str]]:
    """The records of the demonstration: read once, since it takes seconds."""
    from finetune.data.corpora import stdlib_docstrings

    return stdlib_docstrings()


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of ninety small records."""
    path = tmp_path_factory.mktemp("data") / "records.jsonl"
    rows = [{"text": f"Return the value number {n}, " + "or nothing " * (n % 5), "id": n} for n in range(90)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Gives back the number of threads that a recipe, run in this process, has set."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
