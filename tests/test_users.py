"""`by_user`: a user is one example; rows are drawn afresh, and nobody else's draw changes when a user is removed."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

import dpft
from dpft.errors import AccountingError, PrivacyConfigError
from dpft.privacy import Mechanism
from dpft.users import UserDataset, check_forwards, of_users
from tests.oracle import Grads, oracle, relative_error, trainable
from tests.training import Training, examples, tiny_llama

OWNERS = ["b", "a", "c", "b", "b", "d", "c", "b", "b", "e", "c", "c"]  # b has 5 rows, c 4, the others 1
PLACES = {name: [i for i, owner in enumerate(OWNERS) if owner == name] for name in "abcde"}
Change = list[Tensor]


def numbered(rows: int = 3, **options: Any) -> UserDataset:
    """Rows that are their own numbers."""
    return dpft.by_user(list(range(len(OWNERS))), OWNERS, rows=rows, **options)


@pytest.mark.parametrize("kind", ["list", "datasets", "array"])
def test_users_and_their_rows(kind: str) -> None:
    """In the order of their names; all rows where there are no more than k, and k of them where there are."""
    table = datasets.Dataset.from_dict(
        {"row": list(range(len(OWNERS))), "who": OWNERS, "number": list(map(ord, OWNERS))}
    )
    users = {
        "list": lambda: dpft.by_user([{"row": i} for i in range(len(OWNERS))], OWNERS, rows=4),
        "datasets": lambda: dpft.by_user(table, table["who"], rows=4),
        "array": lambda: dpft.by_user(table, torch.tensor(table["number"][:]), rows=4),
    }[kind]()
    assert len(users) == 5 and users.counts.tolist() == [1, 5, 4, 1, 1]
    drawn = [[item["row"] for item in items] for items in users.__getitems__([0, 1, 2, 3, 4])]
    assert [drawn[0], *drawn[2:]] == [PLACES[name] for name in "acde"]
    assert len(drawn[1]) == 4 and sorted(drawn[1]) == drawn[1] and set(drawn[1]) < set(PLACES["b"])
    assert [len(items) for items in users] == [1, 4, 4, 1, 1]  # an iteration ends
    tokens = [10, 20, 30, 11, 12, 5, 31, 13, 14, 6, 32, 33]
    assert users.lengths(tokens).tolist() == [20, 4 * 14, 4 * 33, 5, 6]
    for wrong in (-1, 5):
        with pytest.raises(IndexError):
            users[wrong]


def chi_squared(found: Counter[Any], cells: int) -> float:
    expected = sum(found.values()) / cells
    return sum((found[cell] - expected) ** 2 / expected for cell in found) + (cells - len(found)) * expected


def test_every_subset_of_a_users_rows_is_as_likely() -> None:
    users = numbered(rows=2)
    found = Counter(tuple(users[1]) for _ in range(4000))
    assert chi_squared(found, 10) < 55  # of 9 degrees of freedom: exceeded with probability 1e-8


def test_draws_of_users_and_of_steps_are_independent() -> None:
    """Of b and c in one batch, and of b in two batches: all pairs are as likely."""
    users = numbered(rows=1)
    batches = [users.__getitems__([1, 2]) for _ in range(4001)]
    together = Counter((b[0], c[0]) for b, c in batches)
    assert chi_squared(together, 20) < 80  # 19 degrees of freedom: 1e-9
    after = Counter((one[0][0], two[0][0]) for one, two in itertools.pairwise(batches))
    assert chi_squared(after, 25) < 90


def test_no_seed_decides_the_draws() -> None:
    """Whoever sets the seeds of Python, NumPy and torch draws other rows the next time."""
    users, found = dpft.by_user(list(range(1000)), [0] * 1000, rows=5), set()
    for _ in range(3):
        random.seed(0)
        torch.manual_seed(0)
        found.add(tuple(users[0]))
    assert len(found) == 3


@pytest.mark.slow
def test_worker_processes_draw_apart() -> None:
    """Each has a copy of the dataset. With a state to copy, two would draw the same for users of their own."""
    users = dpft.by_user(list(range(8000)), [i // 1000 for i in range(8000)], rows=3)
    drawn: list[tuple[int, ...]] = []
    for _ in range(2):
        loader = DataLoader(users, batch_size=1, num_workers=4, collate_fn=lambda items: items)  # type: ignore[arg-type]  # a sequence
        drawn += [tuple(row % 1000 for row in items[0]) for items in loader]
    assert len(drawn) == 16 and len(set(drawn)) == 16


# ---------------------------------------------------------------------------------------------- the clipped sum
def by_hash(users: UserDataset, user: int) -> list[int]:
    """k rows by what is in them: the same rows whoever else is there, as the coupling of the proof has them."""
    owned = [int(number) for number in users._numbers[user]]
    return sorted(owned, key=lambda number: str(users.dataset[number]))[: users.rows]


def by_place(users: UserDataset, user: int) -> list[int]:
    """k rows by a seed and the user's place in the dataset: those of all who stand behind a removed user change."""
    owned = [int(number) for number in users._numbers[user]]
    return sorted(random.Random(f"0 {user}").sample(owned, min(users.rows, len(owned))))


def clipped(texts: Sequence[Any], owners: Sequence[str], clip: float, **options: Any) -> Change:
    """The clipped sum of all users."""
    model = dpft.wrap(tiny_llama().double(), max_grad_norm=clip)
    users = dpft.by_user(texts, owners, **options)
    batch: Any = users.collate()([users[i] for i in range(len(users))])
    model(**batch).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def change(without: str, draw: Any, clip: float, **options: Any) -> float:
    texts = examples(len(OWNERS))
    kept = [i for i, owner in enumerate(OWNERS) if owner != without]
    with mock.patch.object(UserDataset, "_draw", draw):
        whole = clipped(texts, OWNERS, clip, **options)
        less = clipped([texts[i] for i in kept], [OWNERS[i] for i in kept], clip, **options)
    return float(torch.cat([(a - b).flatten() for a, b in zip(whole, less, strict=True)]).norm())


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_a_removed_user_changes_the_sum_by_the_clip_norm(reduce: str) -> None:
    """Neighbouring datasets, given the draws: all rows of one user removed, of any number."""
    for user in "bc":
        assert change(user, by_hash, 0.02, rows=3, reduce=reduce) == pytest.approx(0.02, rel=1e-6)


def test_draws_by_seed_and_place_would_not_be_free() -> None:
    """What the module's docstring warns of: without a, c stands in another place, and has other rows."""
    assert change("a", by_place, 0.02, rows=1) > 0.0201


def of_users_in_float64(reduce: str) -> list[Grads]:
    """The gradient of each user, of those of rows alone, averaged or added up."""
    exact, found = oracle(tiny_llama(), default_collate(examples(len(OWNERS)))), []
    for places in PLACES.values():
        over = len(places) if reduce == "mean" else 1
        found.append({n: torch.stack([exact.grads[i][n] for i in places]).sum(0) / over for n in exact.grads[0]})
    return found


def length(gradient: Grads) -> float:
    return float(torch.stack([g.square().sum() for g in gradient.values()]).sum().sqrt())


def clipped_by_hand(gradients: Sequence[Grads], clip: float) -> Grads:
    factors = [min(1.0, clip / length(g)) for g in gradients]
    return {n: sum(g[n] * f for g, f in zip(gradients, factors, strict=True)) for n in gradients[0]}  # type: ignore[misc]  # no 0: there are some


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_a_training_on_users(tmp_path: Path, reduce: Any) -> None:
    """`prepare` to the optimiser: what is released is the sum of the users' clipped gradients over their number."""
    users = dpft.by_user(examples(len(OWNERS)), OWNERS, rows=5, reduce=reduce)
    exact = {name: of_users_in_float64(name) for name in ("mean", "sum")}
    clip = sorted(map(length, exact[reduce]))[2]  # some are clipped, some are not
    privacy = {"noise_multiplier": 0.0, "sample_rate": 1.0, "expected_batch_size": 5, "num_steps": 1}
    training = Training(
        tmp_path / "ledger.jsonl",
        dataset=users,
        changes=privacy | {"max_grad_norm": clip},
        max_physical_batch_size=2,
        lengths=users.lengths([6] * len(OWNERS)),
    )
    before = {name: p.detach().clone().double() for name, p in trainable(training.model).items()}
    training.train().close()
    after = trainable(training.model)
    released = {name: (before[name] - after[name].detach().double()) * 5 for name in before}
    assert relative_error(released, clipped_by_hand(exact[reduce], clip)) < 1e-5
    other = exact["sum" if reduce == "mean" else "mean"]
    assert relative_error(released, clipped_by_hand(other, clip)) > 1e-2


class Read(list[Any]):
    """Rows that note which of them are read."""

    def __init__(self, rows: Sequence[Any]) -> None:
        super().__init__(rows)
        self.read: list[int] = []

    def __getitem__(self, number: Any) -> Any:
        self.read.append(number)
        return super().__getitem__(number)


def test_each_step_draws_rows_afresh(tmp_path: Path) -> None:
    """And before the first step no rows are drawn, but the first ones of users are compared between ranks."""
    rows = Read(examples(24))
    users = dpft.by_user(rows, [0] * 12 + [1] * 12, rows=3)
    training = Training(
        tmp_path / "ledger.jsonl",
        dataset=users,
        changes={"sample_rate": 1.0, "expected_batch_size": 2, "num_steps": 6},
    )
    rows.read.clear()
    drawn = []
    for batch in training.physical():
        assert batch["row_reduction"] == "mean" and batch["example_ids"].tolist() == [0, 0, 0, 1, 1, 1]
        drawn.append(tuple(rows.read))
        rows.read.clear()
    training.close()
    assert len(drawn) == 6 and all(len(numbers) == 6 for numbers in drawn)
    for part in (slice(0, 3), slice(3, 6)):  # that two of six draws of 220 subsets are equal: 7 %; four: 1e-6
        assert len({numbers[part] for numbers in drawn}) >= 3
    assert all(max(numbers[:3]) < 12 <= min(numbers[3:]) for numbers in drawn)


def test_the_statement_and_the_accountant_are_those_of_users(tmp_path: Path) -> None:
    training = Training(tmp_path / "ledger.jsonl", dataset=numbered_texts(), changes={"expected_batch_size": 2})
    schedule = training.run.schedule
    assert schedule.mechanism == Mechanism(sampler="poisson", noise_multiplier=1.0, sample_rate=2 / 5)
    training.train().close()
    statement = dpft.privacy_statement_markdown(training.run.report())
    assert (
        "| Privacy unit | user (all rows of one user; at most 2 of them are used in a step, drawn afresh" in statement
    )
    with pytest.raises(dpft.LedgerError):  # other rows are another configuration
        Training(tmp_path / "ledger.jsonl", dataset=numbered_texts(3), changes={"expected_batch_size": 2})
    named = Training(
        tmp_path / "b.jsonl", dataset=numbered_texts(), changes={"expected_batch_size": 2, "item": "patient"}
    )
    assert named.run.schedule.item == "patient"
    named.close()


def test_a_training_on_users_pays_from_an_account_for_users(tmp_path: Path) -> None:
    """Beside figures of their rows; rows alone, which protect nobody's others, do not."""
    account = dpft.Account.create(
        tmp_path / "account.jsonl", epsilon=50.0, delta=1e-3, unit="user", examples_per_user=3
    )
    options: dict[str, Any] = {"account": account, "test_seed": None, "changes": {"expected_batch_size": 2}}
    training = Training(tmp_path / "ledger.jsonl", dataset=numbered_texts(), **options)
    assert account.uses() == [(training.run.schedule.mechanism, 3)] and account.entries()[0].item == "user"
    training.train().run.close()
    assert account.uses() == [(training.run.schedule.mechanism, 3)]
    assert "a user is one example" in account.markdown() and "at most 3 examples each" in account.markdown()
    dpft.private_mean([0.5] * 6, low=0, high=1, account=account, noise_multiplier=20.0)
    with pytest.raises(AccountingError, match="by_user makes users the examples"):
        Training(tmp_path / "rows.jsonl", dataset=examples(len(OWNERS)), **options)

    class OfOnesOwn(list):  # type: ignore[type-arg]  # whose items are users, however they are made
        privacy_unit = "user"

    Training(tmp_path / "own.jsonl", dataset=OfOnesOwn(examples(len(OWNERS))), **options).run.close()
    assert [entry.item for entry in account.entries()] == ["user", "example", "user"]


def numbered_texts(rows: int = 2) -> UserDataset:
    return dpft.by_user(examples(len(OWNERS)), OWNERS, rows=rows)


def test_memory_is_planned_for_the_rows_of_users(tmp_path: Path) -> None:
    """`max_physical_batch_size="auto"`: so many rows as fit, and not so many users."""
    sizes = {}
    for name, dataset in {
        "rows": examples(48),
        "users": dpft.by_user(examples(48), list(range(12)) * 4, rows=3),
    }.items():
        with mock.patch.dict(
            dpft.prepare.__globals__, {"_planned_batch": lambda *_: mock.Mock(batch_size=7, allowance=0)}
        ):
            training = Training(
                tmp_path / name,
                dataset=dataset,
                max_physical_batch_size="auto",
                seq_len=6,
                changes={"sample_rate": 1.0, "expected_batch_size": 12},
            )
        sizes[name] = len(next(iter(training.loader))["example_weight"])
        training.close()
    assert sizes == {"rows": 7, "users": 2}


@pytest.mark.slow  # the import of Trainer
def test_trainer_takes_users(tmp_path: Path) -> None:
    arguments = dpft.DPTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        noise_multiplier=1.0,
        target_delta=1e-3,
        expected_batch_size=4,
        max_grad_norm=1.0,
        per_device_train_batch_size=2,
        report_to="none",
        use_cpu=True,
    )
    users = dpft.by_user(examples(48), list(range(12)) * 4, rows=3)
    trainer = dpft.DPTrainer(model=tiny_llama(), args=arguments, train_dataset=users)
    trainer.train()
    schedule = trainer.private_loader.privacy.schedule
    assert schedule.item == users.item and schedule.sample_rate == 4 / 12


def test_what_ranks_compare_is_not_drawn() -> None:
    """Equal for equal data, whatever is drawn."""
    users, again = numbered(rows=1), numbered(rows=1)
    marks = [users.undrawn[i] for i in range(5)]
    assert (
        marks == [again.undrawn[i] for i in range(5)] == [(PLACES[name], PLACES[name][0], "mean") for name in "abcde"]
    )
    assert len(users.undrawn) == 5
    given = dpft.PrivacyConfig(**CONFIG)
    wrapped = mock.Mock(undrawn=marks)  # a dataset that draws from users
    assert of_users(wrapped, given, None, 1) == (given, None, marks)
    assert of_users([1], given, None, 2) == (given, None, [1])


# ------------------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 0}, "rows=0 of a user; expected a whole number >= 1"),
        ({"rows": True}, "rows=True of a user"),
        ({"reduce": "max"}, "reduce='max'"),
        ({"users": OWNERS[1:]}, "11 users for 12 rows"),
        ({"users": [], "dataset": []}, "no users"),
        ({"users": [*OWNERS[1:], 3]}, "the user of row 11 is of type int and that of row 0 of str"),
        ({"users": [None] * 12}, "the user of row 0 is of type NoneType"),
        ({"users": torch.full((12,), torch.nan)}, "the user of row 0 is of type float"),
    ],
)
def test_what_is_no_user_is_refused(changes: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"dataset": list(range(12)), "users": OWNERS, "rows": 2, **changes}
    with pytest.raises(PrivacyConfigError, match=message):
        dpft.by_user(given.pop("dataset"), given.pop("users"), **given)


def test_what_does_not_go_with_users_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PrivacyConfigError, match="Leave unit and examples_per_user out"):
        Training(tmp_path / "a.jsonl", dataset=numbered_texts(), changes={"unit": "user", "examples_per_user": 5})
    with pytest.raises(PrivacyConfigError, match="tokens of shape"):
        numbered().lengths([1, 2])

    def pairs(rows: list[dict[str, Tensor]]) -> dict[str, Any]:
        return {**default_collate(rows), "rows_per_example": 1}

    training = Training(tmp_path / "b.jsonl", dataset=numbered_texts(), collate_fn=pairs, changes={"sample_rate": 1.0})
    with pytest.raises(PrivacyConfigError, match="dpft numbers the users itself"):
        next(iter(training.loader))
    training.close()
    with pytest.raises(PrivacyConfigError, match="Use sp_size 1"):
        of_users(numbered(), dpft.PrivacyConfig(**CONFIG), None, 2)
    account = dpft.Account.create(tmp_path / "account.jsonl", epsilon=8.0, delta=1e-3)
    with pytest.raises(AccountingError, match="create an account with unit='user'"):
        few = {"expected_batch_size": 2}
        Training(tmp_path / "c.jsonl", dataset=numbered_texts(), account=account, test_seed=None, changes=few)
    assert account.entries() == ()
    with pytest.raises(PrivacyConfigError, match="different numbers of rows"):
        check_forwards(numbered(), "per_example", True)
    for fine in (("one_pass", True), ("per_example", False)):
        check_forwards(numbered(), *fine)


CONFIG: dict[str, Any] = {"noise_multiplier": 1.0, "num_steps": 1, "expected_batch_size": 2, "target_delta": 1e-3}
