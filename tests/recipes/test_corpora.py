"""The texts that need no network: real ones, synthetic ones, and what the public base model must not have seen."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from finetune.data.corpora import in_validation, stdlib_docstrings, synthetic_tickets
from tools.base_model.text import split_topics

ROOT = Path(__file__).resolve().parents[2]


def test_docstrings_are_many_sorted_long_and_each_once(docstrings: list[dict[str, str]]) -> None:
    names = [record["name"] for record in docstrings]
    assert len(docstrings) > 2500
    assert names == sorted(set(names))
    assert all(len(record["text"]) > 80 for record in docstrings)
    assert len({" ".join(record["text"].split()) for record in docstrings}) == len(docstrings)
    assert "json.dumps" in names
    assert not any(name.startswith(("test.", "idlelib.", "site-packages.")) for name in names)


def test_docstrings_are_found_where_they_may_be(tmp_path: Path) -> None:
    text = "word " * 20
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text(f'"""Module {text}"""\n')
    (tmp_path / "module.py").write_text(
        f'class A:\n    """A {text}"""\n    async def f(self):\n        """F {text}"""\n'
        f'try:\n    import nothing\nexcept ImportError:\n    def g():\n        """G {text}"""\n'
        f'if True:\n    pass\nelse:\n    def h():\n        """H {text}"""\n'
        f'        def inner():\n            """I {text}"""\n'
        f'def short():\n    """Too short."""\ndef again():\n    """A   {text}"""\n'
    )
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "skipped.py").write_text(f'"""Skipped {text}"""\n')
    found = stdlib_docstrings(stdlib=tmp_path)
    # "module.again" repeats "module.A" but for white space
    assert [r["name"] for r in found] == [
        "module.A",
        "module.A.f",
        "module.g",
        "module.h",
        "module.h.inner",
        "package",
    ]
    assert found == stdlib_docstrings(stdlib=tmp_path)


def test_a_folder_without_source_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--dataset"):
        stdlib_docstrings(stdlib=tmp_path)


def test_the_split_is_by_name_and_does_not_depend_on_the_others(docstrings: list[dict[str, str]]) -> None:
    sides = [in_validation(record["name"]) for record in docstrings]
    assert 0.07 < sum(sides) / len(sides) < 0.13
    assert [in_validation("json.dumps", share) for share in (0.0, 1.0)] == [False, True]


def test_the_base_model_was_not_trained_on_the_private_docstrings(docstrings: list[dict[str, str]]) -> None:
    """No docstring is in the public text, and no long run of one but for phrases that both took from the manual."""
    train, held_out = split_topics()
    assert len(train) > 50 and len(held_out) > 4
    assert not set(train) & set(held_out)

    def words(text: str) -> str:
        return " ".join(re.findall(r"\w+", text.lower()))

    public = words(" ".join(train))
    texts = [words(record["text"]) for record in docstrings]
    assert not [text for text in texts if len(text) > 60 and text in public]
    run = 60
    runs = {public[i : i + run] for i in range(len(public) - run)}
    shared = [t for t in texts if any(t[i : i + run] in runs for i in range(len(t) - run))]
    assert len(shared) <= len(texts) / 300


def test_tickets_are_synthetic_seeded_and_have_customers_and_canaries() -> None:
    tickets = synthetic_tickets(customers=50, seed=3, canaries=4, canary_repeats=2)
    assert tickets == synthetic_tickets(customers=50, seed=3, canaries=4, canary_repeats=2)
    assert tickets != synthetic_tickets(customers=50, seed=4, canaries=4, canary_repeats=2)
    assert all(ticket["synthetic"] is True for ticket in tickets)
    per_customer = Counter(ticket["customer_id"] for ticket in tickets if not ticket["canary"])
    assert len(per_customer) == 50 and max(per_customer.values()) > 1 and max(per_customer.values()) <= 8
    canaries = Counter(ticket["canary"] for ticket in tickets if ticket["canary"])
    assert len(canaries) == 4 and set(canaries.values()) == {2}
    assert all(ticket["canary"] in str(ticket["text"]) for ticket in tickets if ticket["canary"])
    assert len({ticket["ticket_id"] for ticket in tickets}) == len(tickets)
