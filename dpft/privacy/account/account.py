"""An account: one file that every training and every query on the same records pays from, before it acts."""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpft.errors import BudgetExceededError, LedgerError, PrivacyConfigError
from dpft.privacy.account import file as files
from dpft.privacy.account.composition import uses_epsilon
from dpft.privacy.account.events import (
    Protects,
    Release,
    Use,
    check_header,
    check_item,
    check_use,
    check_words,
    less,
    one_training,
    released_by,
    whole,
)
from dpft.privacy.account.file import AccountContent, Entry
from dpft.privacy.account.filter import PrivacyFilter, check_budget
from dpft.privacy.account.statement import account_markdown, stated, stated_use
from dpft.privacy.accounting.accountant import rounded_up
from dpft.privacy.ledger import Ledger
from dpft.privacy.mechanism import AccountantName, AdjacencyName, Mechanism, UnitName

_MOST_STEPS, _LARGEST_NOISE = 10**9, 1e5


class Account:
    """One (epsilon, delta) budget for everything that is computed from the same records.

    Every use is on disk before it releases anything, and is refused if it does not fit beside all others: those that
    are finished count with what they released, those that are open with all that they reserved. The file is locked
    while a line is added, so that processes can pay from it at once.

    Use :meth:`create` once for a set of records, and :meth:`open` from then on.

    Attributes:
        path: the file.
        account_id: UUID.
        epsilon: of the budget.
        delta: of the budget.
        composition: ``rdp`` (a filter: uses may be chosen by earlier results) or ``pld`` (tighter, for uses that are
            all fixed beforehand).
        order: the filter's Renyi order; None with ``pld``.
        protects: adjacency, unit, and examples per user; a run on other examples is refused.
        records: which records these are, in words.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """As :meth:`open`."""
        self.path = Path(path)
        # Where ledgers are found from. Behind a link, ".." would be another folder than the one that was meant.
        self._folder = Path(os.path.realpath(path)).parent
        header = files.read(self.path).header
        try:
            self.account_id, self.records = str(header["account_id"]), str(header["records"])
            self.epsilon, self.delta = float(header["epsilon"]), float(header["delta"])
            self.composition: AccountantName = header["composition"]
            self.order: float | None = header["order"]
            self.protects = Protects(header["adjacency"], header["unit"], header["examples_per_user"])
        except (KeyError, TypeError, ValueError) as error:
            raise LedgerError(f"the account {path} is damaged: {error!r}. Restore it from a backup.") from error

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        *,
        epsilon: float,
        delta: float,
        composition: AccountantName = "rdp",
        order: float | None = None,
        typical: Release | None = None,
        adjacency: AdjacencyName = "add_or_remove_one",
        unit: UnitName = "example",
        examples_per_user: int | None = None,
        records: str = "",
    ) -> Account:
        """Create the account of a set of records.

        Args:
            path: the file; it must not exist.
            epsilon: the budget, > 0.
            delta: the budget, in (0, 1).
            composition: ``rdp``: the budget holds although uses are chosen by earlier results. ``pld``: it holds if
                all uses, and when they stop, are fixed before the first result is seen; and more of them fit.
            order: the Renyi order of the filter; None: that at which most releases of ``typical`` fit.
            typical: the release that will be made most often, such as ``schedule.mechanism`` of the trainings to come;
                None: Gaussian noise without sampling. Everything else can be paid, too.
            adjacency: which datasets are neighbours: ``add_or_remove_one`` (``poisson``, ``truncated_poisson``),
                ``replace_one`` (``fixed_size``) or ``zero_out`` (``shuffle``, ``poisson``).
            unit: whom the budget protects: ``example``, or ``user``, all of somebody's records together. Trainings on
                users (:func:`dpft.by_user`) pay from an account for users alone.
            examples_per_user: with unit ``user``, where uses count single records, too: an upper bound on those that
                one user has, which the data keeps. None: a user is one example of every use.
            records: which records these are, in words, for the statement.

        Raises:
            PrivacyConfigError: a value out of range.
            AccountingError: no theorem for this unit with this composition.
            LedgerError: the file exists or cannot be written.
        """
        protects = Protects(adjacency, unit, examples_per_user)
        check_header(composition, protects, records)
        check_budget(epsilon, delta)
        if composition == "rdp":
            order = PrivacyFilter(epsilon, delta, order=order, typical=typical, protects=protects).order
        elif order is not None or typical is not None:
            raise PrivacyConfigError(
                f"order={order!r}, typical={typical!r} with composition='pld', which has no Renyi order; leave it out."
            )
        fields = {
            "account_id": str(uuid.uuid4()),
            "epsilon": float(epsilon),
            "delta": float(delta),
            "composition": composition,
            "order": order,
            **protects._asdict(),
            "records": records,
        }
        files.create(Path(path), fields)
        return cls(path)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Account:
        """Open an account that exists.

        Raises:
            LedgerError: missing, damaged, or no account.
        """
        return cls(path)

    # ------------------------------------------------------------------------------------------ paying
    def reserve(
        self,
        name: str,
        uses: Sequence[Use],
        what: str,
        *,
        ledger: Path | None = None,
        released: Sequence[Use] = (),
        item: UnitName = "example",
    ) -> None:
        """Reserve all that a use may release, before it releases anything; on disk when this returns.

        Args:
            name: unique; the run's id for a training. A second reservation takes the place of the first one.
            uses: mechanisms with their largest numbers of releases. Steps with correlated noise are one training's.
            what: what it is, in words.
            ledger: of a training, so that :meth:`settle` can read what a crashed one released.
            released: of a training that goes on, what it released before; part of ``uses``.
            item: what one example of the mechanisms is: a record (``example``), or all records of a ``user``.

        Raises:
            BudgetExceededError: it does not fit; it must not begin.
            AccountingError: no theorem composes it with this account, or the account protects another unit.
            LedgerError: the account is missing, damaged or an old copy, or could not be written.
        """
        where = None if ledger is None else os.path.relpath(os.path.realpath(ledger), self._folder)
        uses, released = one_training(uses), one_training(released)
        self._reserve(files.reservation(name, what, tuple(uses), where, item=item), uses, released, item)

    def _reserve(self, line: dict[str, Any], uses: Sequence[Use], released: Sequence[Use], item: UnitName) -> None:
        name, what = line["reserve"], line["what"]
        check_words(name, what)
        check_item(uses, self.protects, item)
        with files.locked(self.path) as (fd, content):
            if content.header["account_id"] != self.account_id:
                raise LedgerError(f"{self.path} is another account than the one that was opened; open it again.")
            before = content.entry(name)
            if released and before is None:
                raise LedgerError(
                    f"the account {self.path} does not know the run {name}, which has releases: it is an old copy. "
                    "Give the account that the run paid from."
                )
            if before is not None:
                self._check_before(before, released, line["ledger"])
            others = [use for entry in content.entries if entry.name != name for use in entry.uses]
            self._check_fits(others, uses, what, content)
            files.append(fd, content, self.path, line)

    def finish(self, name: str, uses: Sequence[Use]) -> None:
        """Replace a reservation by what was released; the rest is free again. ``uses`` counts whatever it says.

        Raises:
            AccountingError: a number of releases that is none.
            LedgerError: no such reservation, it has ended with more releases, or the account could not be written.
        """
        uses = released_by(uses)
        with files.locked(self.path) as (fd, content):
            if (before := content.entry(name)) is None:
                raise LedgerError(f"the account {self.path} has no use named {name!r}; it may be an old copy.")
            self._check_before(before, uses)
            files.append(fd, content, self.path, files.finish(name, tuple(uses)))

    def _check_before(self, before: Entry, released: Sequence[Use], ledger: str | None = None) -> None:
        """Refuse who knows of fewer releases than a use ended with, and a second ledger beside that of an open one."""
        if not before.open and less(released, before.uses):
            raise LedgerError(
                f"the account {self.path} counts more releases of the run {before.name} than its ledger: the ledger "
                "is an old copy. Give the ledger that the run wrote last."
            )
        if not before.open or before.ledger is None or ledger is None:
            return
        first = self._folder / before.ledger
        try:
            copied = not first.samefile(self._folder / ledger) and Ledger.read(first).run_id == before.name
        except (OSError, LedgerError):
            return
        if copied:
            raise LedgerError(
                f"the run {before.name} is open with the ledger {first}, and {ledger} is a copy of it: the releases "
                "of both would be counted once. Go on with the first, or end it: account.settle(), where it died."
            )

    def spend(self, uses: Sequence[Use], what: str, *, item: UnitName = "example") -> str:
        """Pay for releases that are made at once, *before* they are made.

        Args:
            uses: mechanisms with their numbers of releases; each use of correlated noise is a training of its own.
            what: what it is, in words.
            item: as :meth:`reserve`.

        Returns:
            The name under which the account has them.

        Raises:
            BudgetExceededError, AccountingError, LedgerError: as :meth:`reserve`; nothing may be released.
        """
        name, uses = str(uuid.uuid4()), whole(uses)
        self._reserve(files.reservation(name, what, tuple(uses), None, open_=False, item=item), uses, (), item)
        return name

    def settle(self) -> list[str]:
        """Free what trainings that died had reserved beyond the releases in their ledgers.

        A training that still has its ledger open is left alone; so is one whose ledger is missing, damaged or another
        run's: its reservation stays counted in full. A release of which the ledger has only a torn line counts.

        Returns:
            The names of the uses that were settled.
        """
        settled = []
        for entry in files.read(self.path).entries:
            if entry.open and entry.ledger is not None and self._settle(entry, self._folder / entry.ledger):
                settled.append(entry.name)
        return settled

    def _settle(self, entry: Entry, ledger: Path) -> bool:
        with files.at_rest(ledger) as content:  # so that it cannot be resumed before the line is written
            if content is None or content.run_id != entry.name:
                return False
            self.finish(entry.name, [event for event in content.events if event[1] > 0])
            return True

    def _check_fits(self, others: list[Use], uses: Sequence[Use], what: str, content: AccountContent) -> None:
        for use in uses:
            check_use(use, self.protects, self.composition)
        if self._fits([*others, *uses]):
            return
        before, after = (self._shown(some) for some in (others, [*others, *uses]))
        pending = sum(entry.open for entry in content.entries)
        hint = f" {pending} reservations are open: account.settle() frees those of runs that died." if pending else ""
        raise BudgetExceededError(
            f"{what} does not fit into the account {self.path} of epsilon {self.epsilon:g} at delta {self.delta:g}: "
            f"{before} is spent or reserved, and it would be {after}. Nothing was released. "
            f"account.max_steps and account.noise_multiplier say what fits.{hint}"
        )

    # ------------------------------------------------------------------------------------------ what is left
    def _fits(self, uses: Sequence[Use]) -> bool:
        if self.composition == "pld":
            return self._epsilon(uses) <= self.epsilon
        return self._filter().admits(uses)

    def _shown(self, uses: Sequence[Use]) -> str:
        """What uses take of the budget, as :meth:`_fits` compares it."""
        if self.composition == "pld":
            return f"epsilon {rounded_up(self._epsilon(uses))}"
        guard = self._filter()
        return f"{guard.rdp(uses):.4g} of {guard.budget:.4g} (Renyi, order {guard.order:g})"

    def _filter(self) -> PrivacyFilter:
        return PrivacyFilter(self.epsilon, self.delta, order=self.order, protects=self.protects)

    def _epsilon(self, uses: Sequence[Use]) -> float:
        return uses_epsilon(uses, self.delta, self.protects, self.composition)

    def entries(self) -> tuple[Entry, ...]:
        """Every use, in the order in which they began."""
        return files.read(self.path).entries

    def uses(self) -> list[Use]:
        """What counts: the releases of finished uses, and the reservations of open ones."""
        return [use for entry in self.entries() for use in entry.uses]

    def spent(self) -> float:
        """Epsilon, at the account's delta, of what was released or is reserved, as if it had been fixed beforehand.

        What holds in any case with ``rdp`` is the budget: an epsilon that was reached at a time that was chosen by
        results is :meth:`PrivacyFilter.odometer`'s.
        """
        return self._epsilon(self.uses())

    @property
    def remaining(self) -> float:
        """The budget's epsilon less :meth:`spent`, at least 0. Epsilons do not add up: :meth:`max_steps` is exact."""
        return max(0.0, self.epsilon - self.spent())

    def max_steps(self, mechanism: Release, limit: int = _MOST_STEPS) -> int:
        """The largest number of further releases of a mechanism that fits; 0 if none does.

        With correlated noise they are those of one further training.

        Raises:
            AccountingError: no theorem composes it with this account.
        """
        check_use((mechanism, 1), self.protects, self.composition)
        before = self.uses()

        def fits(steps: int) -> bool:
            return self._fits([*before, (mechanism, steps)])

        if isinstance(mechanism, Mechanism) and mechanism.strategy is not None:
            limit = min(limit, mechanism.strategy.steps)
        low, high = 0, 1
        while high <= limit and fits(high):
            low, high = high, high * 4
        high = min(high, limit + 1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def noise_multiplier(self, mechanism: Mechanism, steps: int, rel_tol: float = 1e-3) -> float:
        """The smallest noise multiplier, to ``rel_tol``, with which ``steps`` further releases fit.

        Args:
            mechanism: its own noise multiplier is ignored.
            steps: number of releases, >= 1.
            rel_tol: relative; the result errs on the side of more noise.

        Raises:
            BudgetExceededError: no noise makes them fit.
            AccountingError: no theorem composes them with this account.
        """
        check_use((mechanism.with_noise(1.0), steps), self.protects, self.composition)
        before = self.uses()

        def fits(sigma: float) -> bool:
            return self._fits([*before, (mechanism.with_noise(sigma), steps)])

        high = 1.0
        while not fits(high):
            high *= 2
            if high > _LARGEST_NOISE:
                raise BudgetExceededError(
                    f"no noise multiplier up to {_LARGEST_NOISE:g} makes {steps} releases fit into the account "
                    f"{self.path}: it is spent or reserved. account.settle() frees what runs that died had reserved."
                )
        low = high / 2
        while fits(low) and low > 0.05:
            low, high = low / 2, low
        while high / low > 1 + max(rel_tol, 1e-9):
            middle = math.sqrt(low * high)
            low, high = (low, middle) if fits(middle) else (middle, high)
        return high

    # ------------------------------------------------------------------------------------------ statement
    def statement(self) -> dict[str, Any]:
        """Everything a reader needs to judge the guarantee, JSON-serialisable. Nothing in it depends on data."""
        entries = self.entries()
        uses = [use for entry in entries for use in entry.uses]
        return {
            "account": self.account_id,
            "records": self.records,
            "epsilon": self.epsilon,
            "delta": self.delta,
            "exceeded": not self._fits(uses),
            "epsilon_spent": self._epsilon(uses),
            "composition": self.composition,
            "order": self.order,
            **stated(self.protects, self.composition, self.order),
            "uses": [stated_use(entry) for entry in entries],
        }

    def markdown(self) -> str:
        """:meth:`statement` as Markdown, beginning with a heading of level two."""
        return account_markdown(self.statement())
