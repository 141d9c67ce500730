"""One ledger for all ranks: rank 0 has the file open, the others a copy of its content."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpft.engines.ranks import Ranks
from dpft.privacy.accountant import Event
from dpft.privacy.ledger import Ledger, LedgerContent


class SharedLedger:
    """The ledger of a run on one or several processes, with its content on all of them.

    Args:
        ranks: the processes.
        open_file: opens the file; called on rank 0 alone.

    Raises:
        LedgerError: on all ranks, the error of rank 0.
    """

    def __init__(self, ranks: Ranks, open_file: Callable[[], Ledger]) -> None:
        self._ranks = ranks
        self._file: Ledger | None = ranks.together(lambda: open_file() if ranks.rank == 0 else None)
        try:
            said = ranks.together(self._say)
            path, content = ranks.from_first(said)  # type: ignore[misc]  # rank 0 has it, and it is rank 0's that comes
        except BaseException:
            self.close()
            raise
        self.path: Path = path
        self._content: LedgerContent = content
        self._released = 0

    def _say(self) -> tuple[Path, LedgerContent] | None:
        return None if self._file is None else (self._file.path, Ledger.read(self._file.path))

    @property
    def run_id(self) -> str:
        """As :attr:`Ledger.run_id`."""
        return self._content.run_id

    @property
    def count(self) -> int:
        """As :attr:`Ledger.count`: the same on all ranks."""
        return self._content.count + self._released

    def events(self) -> list[Event]:
        """As :meth:`Ledger.events`."""
        return [event for event in self.content().events if event[1] > 0]

    def content(self) -> LedgerContent:
        """The content of the file, for a report."""
        *before, (mechanism, count) = self._content.events
        events = (*before, (mechanism, count + self._released))
        return LedgerContent(self.run_id, self._content.header, events, self._content.torn, self._content.unterminated)

    def record(self) -> int:
        """Write one release on rank 0; returns on every rank once it is on disk. A collective.

        Raises:
            LedgerError: on all ranks; the release must not happen on any.
        """
        self._ranks.together(lambda: self._file.record() if self._file is not None else None)
        self._released += 1
        return self.count

    def state_dict(self) -> dict[str, Any]:
        """As :meth:`Ledger.state_dict`."""
        return {"run_id": self.run_id, "count": self.count}

    def check_resume(self, state: dict[str, Any]) -> None:
        """As :meth:`Ledger.check_resume`, on all ranks together."""
        check = Ledger.check_resume
        self._ranks.together(lambda: check(self, state))  # type: ignore[arg-type]  # it asks for run_id, count and path

    def close(self) -> None:
        """Close the file and release its lock. May be called more than once."""
        if self._file is not None:
            self._file.close()
