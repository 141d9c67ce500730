"""What a training or a figure is paid from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from dpft.privacy.account.events import Protects, Use
from dpft.privacy.mechanism import AccountantName, UnitName


class Payer(Protocol):
    """What ``prepare`` and the queries pay from: an account, or the budget of one trial of a search."""

    account_id: str
    delta: float
    protects: Protects
    composition: AccountantName

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
        """As :meth:`dpft.Account.reserve`."""

    def finish(self, name: str, uses: Sequence[Use]) -> None:
        """As :meth:`dpft.Account.finish`."""

    def spend(self, uses: Sequence[Use], what: str, *, item: UnitName = "example") -> str:
        """As :meth:`dpft.Account.spend`."""
