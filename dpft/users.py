"""Users as the unit: an example of the dataset is a user, of whose rows some are drawn afresh at each participation.

The gradient of a user is that of the mean, or the sum, of the losses of at most k of the user's rows, clipped to C. So
one user changes a clipped sum by at most C (:mod:`dpft.privacy.mechanism`), as an example with one row does, and every
theorem there holds with "user" for "example", whatever the sampler of the users is.

**Drawing the rows afresh costs no privacy.** For each user and each step let w be the random numbers that choose the
rows, should the user be drawn at that step: they are independent of each other, of who is drawn, of the noise, and of
the data. Fix the w of all users and steps. Then the clipped gradient of a user at a step is a function of that user's
rows and of the earlier releases, of length at most C, and nobody else's changes if the user is removed: the theorems
hold for such functions. They hold for each value of w, and the law of w is the same with and without the user. So the
bound holds for the releases and w together, and without w by post-processing.

It takes the independence. If w followed from the place of a user in the dataset and a fixed seed, or from a generator
that users share and whose state worker processes copy, then removing one user could change the rows of others, and
with them the sum by more than C. Each draw here therefore asks the operating system: there is no seed and no state,
nothing to copy into a worker or to restore at a resume, and nothing that two ranks share.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import default_collate

from dpft.errors import PrivacyConfigError
from dpft.privacy.config import PrivacyConfig
from dpft.privacy.mechanism import UnitName

__all__ = ["UserDataset", "by_user"]

Collate = Callable[[list[Any]], Mapping[str, Any]]
Numbers = npt.NDArray[np.int64]


def by_user(dataset: Any, users: Iterable[Any], *, rows: int, reduce: Literal["mean", "sum"] = "mean") -> UserDataset:
    """Make each user one example, for :func:`dpft.prepare`.

    ::

        users = dpft.by_user(dataset, names, rows=4)
        model, optimizer, loader = dpft.prepare(
            accelerator, model, optimizer, users, privacy, collate_fn=collate
        )

    ``expected_batch_size``, ``max_physical_batch_size`` and the number of examples then count users. A user without
    rows is no user: nobody is in the dataset without a row.

    Args:
        dataset: the rows of all users: anything with ``len`` and indexing.
        users: the user of each row, in the same order, as a text or a whole number.
        rows: k >= 1: how many rows of a user are used in a step, at most. Drawn without replacement, each time that
            the user is drawn; all of them where a user has no more.
        reduce: what the loss of a user is of the losses of the rows: their ``mean`` or their ``sum``. Both are clipped
            to the same norm: with ``sum`` users with more rows weigh more, up to C.

    Returns:
        The dataset of users, in the order of their names.

    Raises:
        PrivacyConfigError: an argument out of range; another number of users than of rows; users that are not all
            texts or all whole numbers.
    """
    if type(rows) is not int or rows < 1:
        raise PrivacyConfigError(f"rows={rows!r} of a user; expected a whole number >= 1.")
    if reduce not in ("mean", "sum"):
        raise PrivacyConfigError(f"reduce={reduce!r} of a user's rows; expected 'mean' or 'sum'.")
    names = users.tolist() if hasattr(users, "tolist") else list(users)
    if len(names) != len(dataset):
        raise PrivacyConfigError(
            f"{len(names)} users for {len(dataset)} rows; expected the user of each row, in the same order."
        )
    if not names:
        raise PrivacyConfigError("a dataset without rows has no users; expected at least one row.")
    kind = type(names[0])
    wrong = next((place for place, name in enumerate(names) if type(name) is not kind or kind not in (str, int)), None)
    if wrong is not None:
        raise PrivacyConfigError(
            f"the user of row {wrong} is of type {type(names[wrong]).__name__} and that of row 0 of {kind.__name__}; "
            "expected all texts or all whole numbers: a person under two names would be two users."
        )
    codes = {name: code for code, name in enumerate(sorted(set(names)))}
    owner = np.fromiter((codes[name] for name in names), np.int64, len(names))
    order = np.argsort(owner, kind="stable")
    starts = np.searchsorted(owner[order], np.arange(len(codes) + 1))
    return UserDataset(dataset, [order[a:b] for a, b in itertools.pairwise(starts)], rows, reduce)


class UserDataset:
    """Users as examples: ``data[i]`` is a list of rows of user i, drawn afresh at each call. See :func:`by_user`.

    Attributes:
        dataset: the rows of all users.
        rows: of a user that are used at most.
        reduce: of the losses of these.
    """

    def __init__(self, dataset: Any, numbers: Sequence[Numbers], rows: int, reduce: Literal["mean", "sum"]) -> None:
        self.dataset, self.rows, self.reduce = dataset, rows, reduce
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, user: int) -> list[Any]:
        return self.__getitems__([user])[0]

    def __getitems__(self, users: Sequence[int]) -> list[list[Any]]:
        """Rows of several users, which a ``datasets.Dataset`` reads at once."""
        drawn = [self._draw(user) for user in users]
        flat = list(itertools.chain.from_iterable(drawn))
        many = getattr(self.dataset, "__getitems__", None)
        items = iter(many(flat) if many is not None else [self.dataset[number] for number in flat])
        return [list(itertools.islice(items, len(numbers))) for numbers in drawn]

    def _draw(self, user: int) -> list[int]:
        """The numbers of the rows of a user for one participation: a uniform subset, from the operating system."""
        if not 0 <= user < len(self):  # an IndexError is what ends an iteration
            raise IndexError
        owned = self._numbers[user]
        if len(owned) <= self.rows:
            return [int(number) for number in owned]
        return [int(owned[place]) for place in sorted(random.SystemRandom().sample(range(len(owned)), self.rows))]

    @property
    def counts(self) -> Numbers:
        """``[users]``: how many rows each has. Private: not for publication."""
        return np.array([len(owned) for owned in self._numbers])

    def lengths(self, tokens: Sequence[int] | npt.NDArray[np.integer[Any]]) -> Numbers:
        """``[users]``: the tokens of a user at most, padding included; the ``lengths`` of :func:`dpft.prepare`.

        Args:
            tokens: of each row of ``dataset``.

        Raises:
            PrivacyConfigError: another number of them than of rows.
        """
        found = np.asarray(tokens)
        if found.shape != (len(self.dataset),):
            raise PrivacyConfigError(
                f"tokens of shape {list(found.shape)} for {len(self.dataset)} rows; expected one number for each row."
            )
        return np.array([min(len(owned), self.rows) * int(found[owned].max()) for owned in self._numbers])

    @property
    def item(self) -> str:
        """What an example is, for the statement."""
        return f"user (all rows of one user; at most {self.rows} of them are used in a step, drawn afresh each time)"

    privacy_unit: ClassVar[UnitName] = "user"
    """What one example is, for an account; a dataset of one's own whose examples are users says so too."""

    @property
    def undrawn(self) -> Undrawn:
        """What ranks compare, as their draws differ."""
        return Undrawn(self.dataset, self._numbers, self.reduce)

    def configured(self, privacy: PrivacyConfig) -> PrivacyConfig:
        """The configuration with the user named as its unit.

        Raises:
            PrivacyConfigError: it already counts several examples of a user.
        """
        if privacy.unit == "user":
            raise PrivacyConfigError(
                "unit='user' with a dataset of users: it is for single rows as examples, and here a user is one "
                "example. Leave unit and examples_per_user out, or pass the rows themselves."
            )
        return privacy if privacy.item is not None else dataclasses.replace(privacy, item=self.item)

    def collate(self, collate_fn: Collate | None = None) -> Collate:
        """From a collate function of rows to one of users: all their rows, and ``example_ids`` ``[rows]``.

        Args:
            collate_fn: list of rows -> dictionary of tensors, one row for each. None: torch's default.

        Returns:
            A function of a list of users; it raises PrivacyConfigError where a row of a user has itself several rows.
        """
        return _CollateUsers(collate_fn or default_collate, self.reduce)


def of_users(
    dataset: Any, privacy: PrivacyConfig, collate_fn: Collate | None, sequence: int
) -> tuple[PrivacyConfig, Collate | None, Any]:
    """Configuration, collate function and what ranks compare, for a dataset: as given, unless it is one of users.

    Args:
        dataset: any.
        privacy: of the training.
        collate_fn: of rows.
        sequence: over how many ranks the tokens of an example are spread.

    Raises:
        PrivacyConfigError: the ranks of one sequence would each draw other rows; or see
            :meth:`UserDataset.configured`.
    """
    if not isinstance(dataset, UserDataset):
        return privacy, collate_fn, getattr(dataset, "undrawn", dataset)
    if sequence > 1:
        raise PrivacyConfigError(
            f"a dataset of users with sp_size {sequence}: the ranks that share the tokens of one example would each "
            "draw other rows of the user. Use sp_size 1."
        )
    return dataset.configured(privacy), dataset.collate(collate_fn), dataset.undrawn


def most_rows(dataset: Any) -> int:
    """How many rows of the model an example of a dataset can have: 1, unless it is one of users."""
    return min(dataset.rows, int(dataset.counts.max())) if isinstance(dataset, UserDataset) else 1


def check_forwards(dataset: Any, strategy: str, sends_at_once: bool) -> None:
    """Refuse one forward for each row where each is a collective: ranks have different numbers of rows.

    Args:
        dataset: any.
        strategy: of the wrapped model.
        sends_at_once: whether the engine gathers or sends in each forward or backward.

    Raises:
        PrivacyConfigError: a dataset of users, one example at a time, under such an engine.
    """
    if isinstance(dataset, UserDataset) and strategy == "per_example" and sends_at_once:
        raise PrivacyConfigError(
            "a dataset of users, one example at a time, under FSDP2, ZeRO-2 or ZeRO-3: each row is a forward in which "
            "all ranks take part, and their users have different numbers of rows. Use DDP or ZeRO-1, or another "
            "strategy."
        )


class Undrawn:
    """For each user the numbers of all rows, the first row, and what the loss is of theirs."""

    def __init__(self, dataset: Any, numbers: Sequence[Numbers], reduce: str) -> None:
        self._dataset, self._numbers, self._reduce = dataset, numbers, reduce

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, user: int) -> tuple[list[int], Any, str]:
        owned = self._numbers[user]
        return owned.tolist(), self._dataset[int(owned[0])], self._reduce


class _CollateUsers:
    """See :meth:`UserDataset.collate`; a class, so that worker processes that are spawned can be sent it."""

    def __init__(self, collate_rows: Collate, reduce: str) -> None:
        self._collate_rows, self._reduce = collate_rows, reduce

    def __call__(self, users: list[Any]) -> Mapping[str, Any]:
        batch: Any = self._collate_rows([row for rows in users for row in rows])
        if not isinstance(batch, Mapping):
            return batch  # which the loader refuses
        if several := {"example_ids", "rows_per_example", "row_reduction"} & set(batch):
            raise PrivacyConfigError(
                f"collate_fn returned {', '.join(sorted(several))} for rows of users; expected one row of tensors for "
                "each row of a user, of which dpft numbers the users itself."
            )
        counts = torch.tensor([len(rows) for rows in users])
        ids = torch.arange(len(users)).repeat_interleave(counts)
        return {**batch, "example_ids": ids, **({"row_reduction": "mean"} if self._reduce == "mean" else {})}
