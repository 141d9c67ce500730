"""--user-column: all records of a user are one example, so that dpft samples, clips and accounts users.

A user's example is at most K of their records, each of them one row; its loss is the mean over the tokens of all its
rows (``document_losses``), whose gradient is clipped once. Which records are used follows from the seed and from that
user's own records, whatever their order: who else is in the data, or leaves it, changes nothing about it.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from finetune.data.checks import BATCH, share
from finetune.data.documents import longest, token_counts


class Users:
    """Users as examples, map-style: ``users[i]`` is ``{"rows": [...]}``, the tokens of their records.

    Only the numbers of the records are in memory.

    Attributes:
        records: the tokenised records of all users.
        numbers: for each user the numbers of the records that are used.
        owned: for each user how many records there are; not for publication.
        added: rows of further users, such as canaries.
    """

    def __init__(
        self,
        records: Dataset,
        numbers: Sequence[np.ndarray],
        owned: np.ndarray,
        added: Sequence[list[list[int]]] = (),
    ) -> None:
        self.records, self.numbers, self.owned, self.added = records, numbers, owned, added

    def __len__(self) -> int:
        return len(self.numbers) + len(self.added)

    def __getitem__(self, user: int) -> dict[str, Any]:
        if not 0 <= user < len(self):  # an IndexError is what ends an iteration
            raise IndexError(f"user {user} of {len(self)}")
        if user >= len(self.numbers):
            return {"rows": self.added[user - len(self.numbers)]}
        return {"rows": self.records[self.numbers[user].tolist()]["input_ids"]}

    @property
    def lengths(self) -> list[int]:
        """For each user the tokens in memory of a batch of that user alone: rows, times the longest one."""
        counts = np.array(token_counts(self.records) or [0])
        added = [len(rows) * max(map(len, rows)) for rows in self.added]
        return [len(numbers) * int(counts[numbers].max()) for numbers in self.numbers] + added

    @property
    def most_tokens(self) -> int:
        """Tokens of a user in memory, at most, padding included: most records of a user, times the longest one."""
        return max(len(numbers) for numbers in self.numbers) * longest(self.records)

    def with_users(self, added: Sequence[list[list[int]]]) -> Users:
        """These users and others, given by their rows."""
        return Users(self.records, self.numbers, self.owned, [*self.added, *added])

    def summary(self, column: str, at_most: int) -> str:
        """What whoever trains should know, in a line that is not for publication.

        Args:
            column: that names the users.
            at_most: records of each that are used.
        """
        total, most = int(self.owned.sum()), int(self.owned.max())
        unused = int(np.maximum(self.owned - at_most, 0).sum())
        return (
            f"  {len(self.numbers):,} users by {column!r}; the one with most has {share(most, total)} of the records; "
            f"{share(unused, total)} beyond --records-per-user {at_most} are not used"
        )


def group_users(records: Dataset, users: Iterable[str], at_most: int, seed: int) -> Users:
    """Make each user one example.

    Removing all records of a user removes one example and leaves the others as they are.

    Args:
        records: tokenised; ``input_ids`` of each record.
        users: the user of each record, in the same order.
        at_most: records K of a user that are used: those with the smallest hashes of seed, user and tokens.
        seed: public.

    Returns:
        The users, in the order of their names.
    """
    names: dict[str, int] = {}
    codes = np.empty(len(records), dtype=np.int64)
    hashes = np.empty(len(records), dtype=np.uint64)
    who = iter(users)
    done = 0
    for batch in records.with_format("numpy", dtype=np.int64).iter(BATCH):
        for ids in batch["input_ids"]:
            user = next(who)
            codes[done] = names.setdefault(user, len(names))
            found = hashlib.blake2b(f"{seed}\0{user}\0".encode() + np.asarray(ids, dtype=np.int64).tobytes())
            hashes[done] = np.frombuffer(found.digest()[:8], dtype=np.uint64)[0]
            done += 1
    rank = np.empty(len(names), dtype=np.int64)
    rank[[names[name] for name in sorted(names)]] = np.arange(len(names))
    codes = rank[codes]
    order = np.lexsort((hashes, codes))
    starts = np.searchsorted(codes[order], np.arange(len(names) + 1))
    chosen = [order[a : min(b, a + at_most)] for a, b in itertools.pairwise(starts)]
    return Users(records, chosen, np.diff(starts))


def user_words(column: str, at_most: int) -> str:
    """What an example is, for the privacy statement."""
    return f"user (all records with one value of column {column!r}, of which at most {at_most} are used)"
