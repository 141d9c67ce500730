"""The account that a run pays from: rank 0 has it, the others hear whether it paid."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from dpft.engines.ranks import Ranks
from dpft.errors import LedgerError
from dpft.privacy.account.account import Account
from dpft.privacy.account.payer import Payer
from dpft.privacy.accounting.accountant import Event
from dpft.privacy.ledger import Ledger
from dpft.privacy.mechanism import UnitName


class SharedAccount:
    """An account, or the budget of a trial, on one or several processes.

    Args:
        ranks: the processes.
        account: the account or its file; only rank 0's is opened.

    Attributes:
        account_id: the same on all ranks.

    Raises:
        LedgerError: on all ranks, the error of rank 0.
    """

    def __init__(self, ranks: Ranks, account: Payer | str | os.PathLike[str]) -> None:
        self._ranks = ranks

        def find() -> Payer | None:
            if ranks.rank != 0:
                return None
            return Account.open(account) if isinstance(account, (str, os.PathLike)) else account

        self._payer = ranks.together(find)
        self.account_id = ranks.from_first("" if self._payer is None else self._payer.account_id)

    def _first(self, act: Callable[[Payer], None]) -> None:
        payer = self._payer
        self._ranks.together(lambda: None if payer is None else act(payer))

    def reserve(self, run_id: str, released: list[Event], planned: Event, ledger: Path, item: UnitName) -> None:
        """Reserve a training's releases, those before a restart included. A collective, before anything is released.

        Args:
            run_id: of the training.
            released: before a restart.
            planned: still to be released.
            ledger: its file.
            item: what one of its examples is.

        Raises:
            BudgetExceededError, AccountingError, LedgerError: on all ranks, as :meth:`Account.reserve`.
        """
        what = f"training of {planned[1] + sum(count for _, count in released)} steps"
        uses = [*released, planned]
        self._first(lambda payer: payer.reserve(run_id, uses, what, ledger=ledger, released=released, item=item))

    def finish(self, run_id: str, ledger: Path) -> None:
        """Free what the ledger does not have. No collective: ranks end at different times, and rank 0 has the account.

        A ledger that cannot be read leaves the reservation as it is, counted in full.
        """
        if self._payer is None:
            return
        try:
            content = Ledger.read(ledger)
        except LedgerError:
            return
        if content.run_id == run_id:
            self._payer.finish(run_id, [event for event in content.events if event[1] > 0])
