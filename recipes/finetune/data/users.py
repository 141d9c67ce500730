"""--user-column: all records of a user are one example, so that dpft samples, clips and accounts users.

A user's example is at most K of their records, each of them one row. Its loss is one number of all these rows: the
mean over their tokens (``document_losses``) or over the records (:func:`mean_of_users`); its gradient is clipped once.
Which records are used follows from the seed and from that user's own records, whatever their order: who else is in the
data, or leaves it, changes nothing about it. Or they are drawn afresh each time by :func:`dpft.by_user`, which says
why that costs no privacy.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset

import dpft
from finetune.data.checks import BATCH, share
from finetune.data.documents import longest, token_counts

Collate = Callable[[Sequence[dict[str, Any]]], dict[str, torch.Tensor]]


class Users:
    """Users as examples, map-style: ``users[i]`` is ``{"records": [...]}``, their tokenised records.

    Only the numbers of the records are in memory.

    Attributes:
        records: the tokenised records of all users.
        numbers: for each user the numbers of the records that are used, or of those that they are drawn from.
        owned: for each user how many records there are; not for publication.
        added: records of further users, such as canaries.
        at_most: records of a user in a step.
        drawn: the same users with records drawn afresh each time; None: they are always the same.
    """

    def __init__(
        self,
        records: Dataset,
        numbers: Sequence[np.ndarray],
        owned: np.ndarray,
        added: Sequence[list[dict[str, Any]]] = (),
        *,
        at_most: int,
        drawn: dpft.UserDataset | None = None,
    ) -> None:
        self.records, self.numbers, self.owned, self.added = records, numbers, owned, added
        self.at_most, self.drawn = at_most, drawn

    @property
    def fresh(self) -> bool:
        """Whether records are drawn afresh each time."""
        return self.drawn is not None

    def __len__(self) -> int:
        return len(self.numbers) + len(self.added)

    def __getitem__(self, user: int) -> dict[str, Any]:
        if not 0 <= user < len(self):  # an IndexError is what ends an iteration
            raise IndexError(f"user {user} of {len(self)}")
        if user >= len(self.numbers):
            return {"records": self.added[user - len(self.numbers)]}
        if self.drawn is not None:
            return {"records": self.drawn[user]}
        return {"records": [self.records[number] for number in self.numbers[user].tolist()]}

    privacy_unit: ClassVar[str] = "user"  # for an account that pays

    @property
    def undrawn(self) -> Any:
        """What ranks compare of these users: as their draws differ, it is not those."""
        return self if self.drawn is None else self.drawn.undrawn

    @property
    def lengths(self) -> list[int]:
        """For each user the tokens in memory of a batch of that user alone, at most: rows, times the longest one."""
        counts = np.array(token_counts(self.records) or [0])
        added = [len(some) * max(len(record["input_ids"]) for record in some) for some in self.added]
        return [min(len(numbers), self.at_most) * int(counts[numbers].max()) for numbers in self.numbers] + added

    @property
    def most_tokens(self) -> int:
        """Tokens of a user in memory, at most, padding included: most records of a user, times the longest one."""
        return min(max(map(len, self.numbers)), self.at_most) * longest(self.records)

    def with_users(self, added: Sequence[list[dict[str, Any]]]) -> Users:
        """These users and others, given by their records."""
        added = [*self.added, *added]
        return Users(self.records, self.numbers, self.owned, added, at_most=self.at_most, drawn=self.drawn)

    def summary(self, column: str) -> str:
        """What whoever trains should know, in a line that is not for publication.

        Args:
            column: that names the users.
        """
        total, most = int(self.owned.sum()), int(self.owned.max())
        unused = int(np.maximum(self.owned - self.at_most, 0).sum())
        return (
            f"  {len(self.numbers):,} users by {column!r}; the one with most has {share(most, total)} of the records; "
            f"{share(unused, total)} beyond --records-per-user {self.at_most} are not used{' in a step' * self.fresh}"
        )


def group_users(records: Dataset, users: Iterable[str], at_most: int, seed: int, fresh: bool = False) -> Users:
    """Make each user one example.

    Removing all records of a user removes one example and leaves the others as they are.

    Args:
        records: tokenised; ``input_ids`` of each record.
        users: the user of each record, in the same order, and no more.
        at_most: records K of a user that are used: those with the smallest hashes of seed, user and tokens.
        seed: public.
        fresh: draw the records of a user afresh each time, instead of by these hashes.

    Returns:
        The users, in the order of their names.
    """
    names: dict[str, int] = {}
    codes = np.empty(len(records), dtype=np.int64)
    hashes = np.empty(len(records), dtype=np.uint64)
    batches = records.select_columns("input_ids").with_format("numpy", dtype=np.int64).iter(BATCH)
    tokens = (ids for batch in batches for ids in batch["input_ids"])
    for done, (user, ids) in enumerate(zip(users, tokens, strict=True)):
        codes[done] = names.setdefault(user, len(names))
        found = hashlib.blake2b(f"{seed}\0{user}\0".encode() + np.asarray(ids, dtype=np.int64).tobytes())
        hashes[done] = np.frombuffer(found.digest()[:8], dtype=np.uint64)[0]
    rank = np.empty(len(names), dtype=np.int64)
    rank[[names[name] for name in sorted(names)]] = np.arange(len(names))
    codes = rank[codes]
    order = np.lexsort((hashes, codes))
    starts = np.searchsorted(codes[order], np.arange(len(names) + 1))
    chosen = [order[a : b if fresh else min(b, a + at_most)] for a, b in itertools.pairwise(starts)]
    drawn = dpft.by_user(records, codes, rows=at_most) if fresh else None  # codes are in the order of the names too
    return Users(records, chosen, np.diff(starts), at_most=at_most, drawn=drawn)


def of_users(collate: Collate) -> Collate:
    """From a recipe's collate function of records, one row each, to that of users: with ``example_ids`` ``[R]``."""

    def collate_users(users: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = collate([record for user in users for record in user["records"]])
        counts = torch.tensor([len(user["records"]) for user in users])
        return batch | {"example_ids": torch.arange(len(users)).repeat_interleave(counts)}

    return collate_users


def mean_of_users(losses: torch.Tensor, example_ids: torch.Tensor) -> torch.Tensor:
    """The mean loss of each user's records, ``[U]``, of the losses and the users of the records, ``[R]``."""
    ids = example_ids.to(losses.device)
    users = int(ids.max()) + 1
    sums = losses.new_zeros(users).index_add(0, ids, losses)
    return sums / losses.new_zeros(users).index_add(0, ids, torch.ones_like(losses))


def unit_of(options: Any) -> str | None:
    """What an example is, where it is a user and not a record, by the options of a recipe."""
    if options.user_column is None:
        return None
    return user_words(options.user_column, options.records_per_user, options.records_drawn == "afresh")


def user_words(column: str, at_most: int, fresh: bool = False) -> str:
    """What an example is, for the privacy statement."""
    used = "used in a step, drawn afresh each time" if fresh else "used"
    return f"user (all records with one value of column {column!r}, of which at most {at_most} are {used})"
