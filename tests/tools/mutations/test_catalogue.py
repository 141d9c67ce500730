"""Every mutation still applies to the sources as they are, and a survivor is one."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest

from tools import mutate
from tools.mutations.catalogue import MUTATIONS
from tools.mutations.command import mutated, run
from tools.mutations.mutation import Mutation

ROOT = Path(__file__).resolve().parents[3]


def test_there_are_enough_with_names_of_their_own() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS) >= 40


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_it_applies_once_and_is_python(mutation: Mutation) -> None:
    text = (ROOT / mutation.file).read_text()
    changed = mutated(mutation, text)
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(text))
    assert all((ROOT / test.partition("::")[0]).exists() for test in mutation.tests)


def test_what_is_not_there_is_said() -> None:
    with pytest.raises(ValueError, match="0 times; expected once"):
        mutated(replace(MUTATIONS[0], old="no such text"), "text")


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert mutate.main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(MUTATIONS)


@pytest.mark.slow
def test_caught_and_survived() -> None:
    ledger = next(mutation for mutation in MUTATIONS if mutation.name == "any_checkpoint")
    assert run(ledger)["caught"]
    harmless = replace(ledger, old="if run_id != self.run_id:", new="if self.run_id != run_id:")
    assert not run(harmless)["caught"]
