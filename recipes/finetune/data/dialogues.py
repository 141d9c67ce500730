"""The demonstration's conversations: a question about a name of the standard library, and its docstring, real text."""

from __future__ import annotations

from typing import Any

from datasets import Dataset


def docstring_chats(docstrings: Dataset) -> Dataset:
    """One conversation for each docstring, in the format ``messages``; it depends on that docstring alone."""

    def ask(record: dict[str, str]) -> dict[str, Any]:
        question = {"role": "user", "content": f"What is {record['name']}?"}
        return {"messages": [question, {"role": "assistant", "content": record["text"]}]}

    return docstrings.map(ask, remove_columns=docstrings.column_names, desc=None)
