"""An account never admits more than its budget, and never forgets what it admitted, whatever happens to processes."""

from __future__ import annotations

import dataclasses
import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dpft.privacy.account.file as files
from dpft.errors import AccountingError, BudgetExceededError, LedgerError, PrivacyConfigError
from dpft.privacy import (
    Account,
    Ledger,
    Mechanism,
    PureRelease,
    Selection,
    calibrate_noise_multiplier,
    compose_epsilon,
)

DP_SGD = Mechanism(sampler="poisson", noise_multiplier=1.0, sample_rate=0.02)
QUERY = Mechanism(sampler="poisson", noise_multiplier=4.0, sample_rate=1.0)
FIXED = Mechanism(sampler="fixed_size", noise_multiplier=2.0, batch_size=10, dataset_size=1000)
SHUFFLE = Mechanism(sampler="shuffle", noise_multiplier=4.0, batch_size=10, dataset_size=1000)
CUT = Mechanism(
    sampler="truncated_poisson", noise_multiplier=2.0, sample_rate=0.01, max_batch_size=20, dataset_size=1000
)
BALLS = Mechanism(sampler="balls_and_bins", noise_multiplier=4.0, batch_size=10, dataset_size=1000)
USER = Mechanism(sampler="poisson", noise_multiplier=2.0, sample_rate=1.0, unit="user", examples_per_user=3)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "account.jsonl"


def create(path: Path, **changes: Any) -> Account:
    values: dict[str, Any] = {"epsilon": 3.0, "delta": 1e-5, "records": "the records of a test", **changes}
    return Account.create(path, **values)


# --------------------------------------------------------------------------------------------------- the budget
def test_it_admits_what_fits_and_not_one_release_more(path: Path) -> None:
    account = create(path)
    most = account.max_steps(QUERY)
    assert most > 2
    for _ in range(most):
        account.spend([(QUERY, 1)], "a query")
    before = path.read_bytes()
    with pytest.raises(BudgetExceededError, match="does not fit"):
        account.spend([(QUERY, 1)], "a query")
    assert path.read_bytes() == before
    assert account.max_steps(QUERY) == 0 and account.spent() <= 3.0
    # The filter's epsilon is an upper bound: the exact one of the same releases is below.
    assert compose_epsilon([(QUERY, most)], 1e-5) <= account.spent()


def test_releases_given_as_an_iterator_do_not_pass_for_nothing(path: Path) -> None:
    account = create(path, epsilon=0.1)
    for pay in (account.spend, lambda uses, what: account.reserve("run", uses, what)):
        with pytest.raises(BudgetExceededError):
            pay(iter([(QUERY, 50), (PureRelease(3.0), 1)]), "figures")  # type: ignore[operator, arg-type]  # not as annotated
    account.reserve("run", iter([(PureRelease(0.001), 1)]), "one")  # type: ignore[arg-type]  # not as annotated
    assert account.uses() == [(PureRelease(0.001), 1)]


def test_pld_composes_different_mechanisms_exactly(path: Path) -> None:
    account = create(path, composition="pld")
    account.spend([(DP_SGD, 300)], "a training")
    account.spend([(QUERY, 1)], "a figure")
    assert account.spent() == compose_epsilon([(DP_SGD, 300), (QUERY, 1)], 1e-5)
    assert account.remaining == pytest.approx(3.0 - account.spent())
    steps = account.max_steps(DP_SGD, limit=3000)
    total = [(DP_SGD, 300 + steps), (QUERY, 1)]
    assert compose_epsilon(total, 1e-5) <= 3.0 < compose_epsilon([*total, (DP_SGD, 1)], 1e-5)


@pytest.mark.parametrize("limit", [1, 4, 5, 16])
def test_as_many_steps_as_were_asked_about_fit(limit: int, path: Path) -> None:
    assert create(path).max_steps(DP_SGD, limit=limit) == limit


def test_noise_multiplier_makes_it_fit_tightly(path: Path) -> None:
    account = create(path)
    account.spend([(QUERY, 1)], "a query")
    sigma = account.noise_multiplier(DP_SGD, 200, rel_tol=1e-2)
    with pytest.raises(BudgetExceededError):
        account.reserve("run", [(DP_SGD.with_noise(sigma * 0.985), 200)], "a training")
    account.reserve("run", [(DP_SGD.with_noise(sigma), 200)], "a training")
    account.finish("run", [(DP_SGD.with_noise(sigma), 201)])
    with pytest.raises(BudgetExceededError, match="no noise multiplier up to"):
        account.noise_multiplier(QUERY, 1000)


def test_a_search_for_the_exact_noise_ends(path: Path) -> None:
    for rel_tol in (0.0, -1.0):
        sigma = create(path.with_name(f"{rel_tol}")).noise_multiplier(QUERY, 1, rel_tol=rel_tol)
        alone = calibrate_noise_multiplier(QUERY, 1, 3.0, 1e-5, accountant="rdp", rel_tol=rel_tol)
        assert sigma == pytest.approx(alone, rel=1e-8)  # its order is the best for one such query


def test_a_reservation_counts_in_full_until_it_is_finished(path: Path) -> None:
    account = create(path)
    most = account.max_steps(DP_SGD)
    account.reserve("run", [(DP_SGD, most)], "a training")
    with pytest.raises(BudgetExceededError, match="1 reservations are open"):
        account.spend([(QUERY, 1)], "a query")
    account.finish("run", [(DP_SGD, most // 2)])
    account.spend([(QUERY, 1)], "a query")
    assert account.uses() == [(DP_SGD, most // 2), (QUERY, 1)]
    account.finish("run", [(DP_SGD, most * 2)])  # whatever was released counts, even where it should not have been
    assert account.statement()["exceeded"] and "no guarantee" in account.markdown()


def test_a_training_that_goes_on_takes_its_own_place(path: Path) -> None:
    account = create(path)
    most = account.max_steps(DP_SGD)
    account.reserve("run", [(DP_SGD, most)], "a training")
    account.finish("run", [(DP_SGD, 10)])
    account.reserve("run", [(DP_SGD, 10), (DP_SGD, most - 10)], "a training", released=[(DP_SGD, 10)])
    assert account.max_steps(DP_SGD) == 0
    account.finish("run", [(DP_SGD, 30)])
    with pytest.raises(LedgerError, match="the ledger is an old copy"):
        account.reserve("run", [(DP_SGD, most)], "a training", released=[(DP_SGD, 10)])
    with pytest.raises(LedgerError, match="does not know the run"):
        account.reserve("other", [(DP_SGD, 10)], "a training", released=[(DP_SGD, 3)])


# --------------------------------------------------------------------------------------------------- one adjacency
@pytest.mark.parametrize(
    ("header", "fits", "refused"),
    [
        ({}, [DP_SGD, CUT, PureRelease(0.1)], [FIXED, SHUFFLE, USER, BALLS]),
        ({"composition": "pld"}, [DP_SGD, CUT, PureRelease(0.1)], [FIXED, SHUFFLE, USER]),
        ({"adjacency": "replace_one"}, [FIXED, PureRelease(0.1)], [DP_SGD, SHUFFLE, CUT, USER]),
        ({"adjacency": "zero_out"}, [SHUFFLE, DP_SGD], [FIXED, CUT, USER, BALLS]),
        ({"adjacency": "zero_out", "composition": "pld"}, [SHUFFLE, DP_SGD, BALLS], [FIXED, CUT, USER]),
        ({"unit": "user", "examples_per_user": 3}, [USER], [DP_SGD, FIXED]),
        ({"unit": "user"}, [PureRelease(0.1)], [DP_SGD, USER, FIXED]),
        ({"composition": "pld", "unit": "user", "examples_per_user": 3}, [USER], [DP_SGD, FIXED]),
    ],
)
def test_what_has_no_common_theorem_is_refused(
    path: Path, header: dict[str, Any], fits: list[Any], refused: list[Any]
) -> None:
    account = create(path, epsilon=8.0, **header)
    for before in ([], fits):  # the account's own adjacency and unit count, not only those of earlier uses
        for release in before:
            account.spend([(release, 1)], "a use")
        for release in refused:
            with pytest.raises(AccountingError, match=r"use|give|create"):
                account.spend([(release, 1)], "a use")
    assert len(account.entries()) == len(fits)


def test_other_releases_that_no_account_pays_for(path: Path) -> None:
    account = create(path, composition="pld")
    with pytest.raises(AccountingError, match="without noise"):
        account.spend([(DP_SGD.with_noise(0.0), 1)], "a use")
    with pytest.raises(AccountingError, match="whole number"):
        account.spend([(DP_SGD, -1)], "a use")
    with pytest.raises(AccountingError, match="Renyi DP"):
        account.spend([(Selection(((DP_SGD, 1),), 3.0), 1)], "a use")
    with pytest.raises(PrivacyConfigError, match="few words"):
        account.spend([(DP_SGD, 1)], "two\nlines")


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"epsilon": 0.0}, PrivacyConfigError),
        ({"epsilon": float("inf")}, PrivacyConfigError),
        ({"delta": 1.0}, PrivacyConfigError),
        ({"composition": "advanced"}, PrivacyConfigError),
        ({"adjacency": "other"}, PrivacyConfigError),
        ({"order": 1.05}, PrivacyConfigError),
        ({"order": 3.14159}, PrivacyConfigError),
        ({"composition": "pld", "order": 4.0}, PrivacyConfigError),
        ({"composition": "pld", "typical": DP_SGD}, PrivacyConfigError),
        ({"order": 4.0, "typical": DP_SGD}, PrivacyConfigError),
        ({"typical": FIXED}, AccountingError),
        ({"composition": "pld", "adjacency": "replace_one"}, AccountingError),
        ({"unit": "person"}, PrivacyConfigError),
        ({"examples_per_user": 2}, PrivacyConfigError),
        ({"unit": "user", "examples_per_user": 0}, PrivacyConfigError),
        ({"records": "a | b"}, PrivacyConfigError),
    ],
)
def test_headers_that_are_refused(path: Path, changes: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        create(path, **changes)
    assert not path.exists()


def test_a_tiny_budget_is_one_for_pld(path: Path) -> None:
    """No Renyi order leaves anything of it."""
    assert create(path, epsilon=1e-3, composition="pld").max_steps(QUERY) == 0


# --------------------------------------------------------------------------------------------------- the file
def test_another_process_reads_what_this_one_wrote(path: Path) -> None:
    account = create(path, adjacency="zero_out", composition="pld", epsilon=9.0)
    inner = Mechanism(sampler="shuffle", noise_multiplier=9.0, batch_size=10, dataset_size=1000)
    account.spend([(inner, 150), (DP_SGD, 3), (PureRelease(0.25), 2)], "much")
    again = Account.open(path)
    assert again.uses() == account.uses() == [(inner, 150), (DP_SGD, 3), (PureRelease(0.25), 2)]
    assert again.statement() == account.statement() and again.protects == account.protects
    with pytest.raises(LedgerError, match="exists already"):
        create(path)


def test_torn_at_every_byte(path: Path) -> None:
    account = create(path)
    account.spend([(QUERY, 1)], "first")
    acknowledged = path.stat().st_size
    account.spend([(QUERY, 1)], "second")
    whole = path.read_bytes()
    for size in (*range(acknowledged, len(whole) - 3, 9), *range(len(whole) - 3, len(whole) + 1)):
        path.write_bytes(whole[:size])
        before = len(account.entries())
        assert before == (2 if size >= len(whole) - 1 else 1)  # whole but for its newline: it counts
        account.spend([(QUERY, 1)], "third")
        torn_again = path.read_bytes()[:-5]
        assert [entry.what for entry in account.entries()][-1] == "third" and len(account.entries()) == before + 1
        path.write_bytes(torn_again)
        account.spend([(QUERY, 1)], "fourth")
        assert len(account.entries()) == before + 1
    for size in range(whole.index(b"\n") - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(LedgerError, match="complete account header"):
            Account.open(path)


def test_damage_and_lines_that_are_gone_are_errors(path: Path) -> None:
    account = create(path)
    for what in ("first", "second", "third"):
        account.spend([(QUERY, 1)], what)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for bad in (
        whole.replace(b"second", b"sec0nd"),
        whole.replace(b"third", b"th1rd"),  # the last line, with its newline: it was acknowledged
        b"".join(lines[:2] + lines[3:]),
        b"".join([*lines, lines[-1]]),
        b"".join([lines[0], lines[0]]),
    ):
        path.write_bytes(bad)
        with pytest.raises(LedgerError, match="damaged"):
            account.entries()
        with pytest.raises(LedgerError, match="damaged"):
            account.spend([(QUERY, 1)], "fourth")
    path.write_bytes(whole.replace(b'"dpft_account":1', b'"dpft_account":2'))
    with pytest.raises(LedgerError):
        account.entries()


def test_another_account_in_its_place_is_seen(path: Path, tmp_path: Path) -> None:
    account = create(path)
    create(tmp_path / "other.jsonl")
    os.replace(tmp_path / "other.jsonl", path)
    with pytest.raises(LedgerError, match="another account"):
        account.spend([(QUERY, 1)], "a query")
    path.unlink()
    with pytest.raises(LedgerError, match="cannot open"):
        account.spend([(QUERY, 1)], "a query")
    with pytest.raises(LedgerError, match="cannot read"):
        Account.open(path)


def test_nothing_is_admitted_that_is_not_on_the_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    account = create(path)
    calls: list[str] = []
    write, fsync = os.write, os.fsync

    def full_disk(fd: int, data: Any) -> int:
        write(fd, bytes(data)[:20])
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full_disk)
        with pytest.raises(LedgerError, match="must not happen"):
            account.spend([(QUERY, 1)], "a query")
    assert account.entries() == ()
    note: Callable[[str, Any], Any] = lambda name, call: lambda *args: calls.append(name) or call(*args)  # noqa: E731  # one line, used twice
    monkeypatch.setattr(os, "write", note("write", write))
    monkeypatch.setattr(os, "fsync", note("fsync", fsync))
    account.spend([(QUERY, 1)], "a query")
    assert calls == ["write", "fsync"] and len(account.entries()) == 1


def test_threads_at_once_admit_no_more_than_one_alone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    account = create(path)
    most = account.max_steps(QUERY)
    append = files.append

    def slow(*args: Any) -> None:
        threading.Event().wait(0.002)  # between the check and the line: without the lock others check here, too
        append(*args)

    monkeypatch.setattr(files, "append", slow)
    admitted: list[str] = []

    def pay() -> None:
        for _ in range(most):
            try:
                admitted.append(account.spend([(QUERY, 1)], "a query"))
            except BudgetExceededError:
                return

    threads = [threading.Thread(target=pay) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(admitted) == most == len(account.entries())
    assert {entry.name for entry in account.entries()} == set(admitted)


def test_a_child_that_was_forked_meanwhile_does_not_keep_the_lock(path: Path) -> None:
    """It has the file open for as long as it lives: a duplicate descriptor stands for it."""
    account = create(path)
    with files.locked(path) as (fd, _):
        child = os.dup(fd)
    try:
        done = threading.Thread(target=lambda: account.spend([(QUERY, 1)], "a query"), daemon=True)
        done.start()
        done.join(60)
        assert not done.is_alive() and len(account.entries()) == 1
    finally:
        os.close(child)


# --------------------------------------------------------------------------------------------------- runs that died
def test_settle_counts_what_the_ledger_says(path: Path, tmp_path: Path) -> None:
    account = create(path)
    most = account.max_steps(DP_SGD)
    ledger = Ledger.open(tmp_path / "run" / "ledger.jsonl", "new", mechanism=DP_SGD)
    account.reserve(ledger.run_id, [(DP_SGD, most)], "a training", ledger=ledger.path)
    for _ in range(7):
        ledger.record()
    assert account.settle() == []  # its ledger is open: it may still be running
    ledger.close()
    whole = ledger.path.read_bytes()
    for content, released in ((whole[:-5], 7), (whole, 7), (whole + b'{"rel', 8)):  # the release in flight counts
        ledger.path.write_bytes(content)
        account.reserve(ledger.run_id, [(DP_SGD, most)], "again", ledger=ledger.path, released=[(DP_SGD, released)])
        assert account.settle() == [ledger.run_id]
        assert account.uses() == [(DP_SGD, released)]
        assert account.settle() == []


@pytest.mark.parametrize("what", ["missing", "damaged", "another run's", "none"])
def test_a_ledger_that_says_nothing_leaves_the_reservation(path: Path, tmp_path: Path, what: str) -> None:
    account = create(path)
    file = tmp_path / "ledger.jsonl"
    with Ledger.open(file, "new", mechanism=DP_SGD) as ledger:
        ledger.record()
        ledger.record()
        run = ledger.run_id
    if what == "missing":
        file.unlink()
    elif what == "damaged":
        file.write_bytes(file.read_bytes().replace(b'"release":1', b'"release":2'))
    account.reserve(
        "x" if what == "another run's" else run, [(DP_SGD, 9)], "a training", ledger=None if what == "none" else file
    )
    assert account.settle() == [] and account.uses() == [(DP_SGD, 9)] and account.entries()[0].open


# --------------------------------------------------------------------------------------------------- the statement
def test_the_statement_says_for_whom_and_on_what_condition(path: Path, tmp_path: Path) -> None:
    account = create(path)
    account.spend([(Selection(((DP_SGD, 20), (QUERY.with_noise(20.0), 1)), 4.0), 1)], "a search")
    account.reserve("run", [(DP_SGD, 5)], "a training")
    said, text = account.statement(), account.markdown()
    assert said["epsilon"] == 3.0 and 0 < said["epsilon_spent"] < 3.0 and not said["exceeded"]
    words = ["(3, 1e-05)", "one example is added or removed", "however each use", "the records of a test", "a search"]
    for part in (*words, "mean 4, Poisson", "reserved, counted in full", account.account_id):
        assert part in text
    many = create(tmp_path / "c")
    many.spend([(dataclasses.replace(CUT, dataset_size=123_456_789, sample_rate=1e-7 / 3), 1)], "a training")
    assert "dataset_size 123456789" in many.markdown() and "sample_rate 3.333333333e-08" in many.markdown()
    other = create(tmp_path / "b", composition="pld", unit="user", examples_per_user=3)
    assert "one user is added" in other.markdown() and "if no use" in other.markdown()


def test_the_claim_is_not_rounded_below_the_budget(path: Path) -> None:
    account = create(path, epsilon=1.23456749)  # six digits would be 1.23457 or 1.23456
    assert "(1.235, 1e-05)" in account.markdown()
    assert "(1.001, 1e-05)" in create(path.with_name("b"), epsilon=1.000004).markdown()
