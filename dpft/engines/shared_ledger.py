"""One ledger for all ranks: rank 0 has the file open, the others a copy of its content."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpft.engines.ranks import Ranks
from dpft.errors import LedgerError
from dpft.privacy.accounting.accountant import Event, of_one_run
from dpft.privacy.config import PrivacyConfig
from dpft.privacy.ledger import Ledger, LedgerContent, resume_state
from dpft.privacy.mechanism import Mechanism
from dpft.privacy.schedule import PrivacySchedule


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
        self._clip_norms = list(content.clip_norms)

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

    @property
    def starts(self) -> list[int]:
        """How many releases there were at each start that has made some."""
        counts = [count for _, count in self.content().events]
        return [sum(counts[:number]) for number, count in enumerate(counts) if count]

    def events(self) -> list[Event]:
        """As :meth:`Ledger.events`."""
        return of_one_run([event for event in self.content().events if event[1] > 0])

    def content(self) -> LedgerContent:
        """The content of the file, for a report."""
        *before, (mechanism, count) = self._content.events
        events = (*before, (mechanism, count + self._released))
        return replace(self._content, events=events, clip_norms=tuple(self._clip_norms))

    def clip_norm_after(self, count: int) -> float | None:
        """As :meth:`Ledger.clip_norm_after`: the same on all ranks."""
        return self._clip_norms[count - 1] if count else None

    def record(self, next_clip_norm: float | None = None) -> int:
        """Write one release on rank 0; returns on every rank once it is on disk. A collective.

        Args:
            next_clip_norm: as :meth:`Ledger.record`; the same on all ranks.

        Raises:
            LedgerError: on all ranks; the release must not happen on any.
        """
        self._ranks.together(lambda: self._file.record(next_clip_norm) if self._file is not None else None)
        self._released += 1
        self._clip_norms.append(next_clip_norm)
        return self.count

    def state_dict(self) -> dict[str, Any]:
        """As :meth:`Ledger.state_dict`."""
        return resume_state(self)

    def check_resume(self, state: dict[str, Any]) -> None:
        """As :meth:`Ledger.check_resume`, on all ranks together."""
        check = Ledger.check_resume
        self._ranks.together(lambda: check(self, state))  # type: ignore[arg-type]  # it asks for run_id, count and path

    def close(self) -> None:
        """Close the file and release its lock. May be called more than once."""
        if self._file is not None:
            self._file.close()


def _differences(before: Mechanism, now: Mechanism) -> str:
    """What differs, in words. The numbers of a strategy follow from its other constants, and may be many."""
    sides = []
    for mechanism in (before, now):
        values = mechanism.to_dict()
        values |= {f"{name} of the noise": value for name, value in values.pop("strategy", {}).items()}
        sides.append(values)
    a, b = sides
    names = [name for name in {**a, **b} if a.get(name) != b.get(name)]
    few = [name for name in names if not isinstance(a.get(name, b.get(name)), list)]
    return ", ".join(f"{name} {a.get(name)}, now {b.get(name)}" for name in few or names)


def open_ledger(
    path: Path,
    privacy: PrivacyConfig,
    schedule: PrivacySchedule,
    clipping: str,
    seeded: bool,
    account: str | None = None,
    isolated: bool = True,
) -> Ledger:
    """Open a run's ledger: a new one, or to resume one of the same mechanism, paid from the same account.

    Raises:
        LedgerError: it has releases of another mechanism, of other examples, or made under other conditions.
    """
    # The statement is of all releases: whether they are private, how their noise was drawn, what was not checked.
    conditions = {
        "clipped": clipping != "none",
        "seeded": seeded,
        "secure_rng": privacy.secure_rng,
        "isolated": isolated,
    }
    content = Ledger.read(path) if path.exists() and path.stat().st_size > 0 else None
    resume = content is not None and content.count > 0
    if content is not None and resume:
        others = [mechanism for mechanism, count in content.events if count and mechanism != schedule.mechanism]
        if others:
            raise LedgerError(
                f"the ledger {path} has releases of another mechanism than the one planned: "
                f"{_differences(others[0], schedule.mechanism)}. Resume with the configuration of the run that wrote "
                "it, or choose another ledger_path for a new run."
            )
        written = {"isolated": True} | (content.header.get("config") or {})  # older ledgers do not say
        before = {name: written.get(name) for name in conditions}
        if before != conditions:
            raise LedgerError(
                f"the ledger {path} was written under {before} and this run is {conditions}: clipped or not, "
                "with a known test seed or not, with secure_rng or not, and with rows checked or isolation='off' "
                "cannot be mixed. Choose another ledger_path."
            )
        payer = (content.header.get("config") or {}).get("account")
        if payer != account:
            raise LedgerError(
                f"the releases in the ledger {path} were paid from {payer or 'no account'}, and this run pays from "
                f"{account or 'none'}. Pass the account=... of the run that wrote it, or choose another ledger_path."
            )
        adaptive = (content.header.get("config") or {}).get("adaptive_clip")
        if adaptive != privacy.to_dict().get("adaptive_clip"):
            raise LedgerError(
                f"the ledger {path} was written with adaptive_clip={adaptive} and now it is {privacy.adaptive_clip}: "
                "the clip norm could not go on from it. Resume with the configuration of the run that wrote it, or "
                "choose another ledger_path."
            )
        item = (content.header.get("config") or {}).get("item")
        if item != privacy.item:
            raise LedgerError(
                f"the ledger {path} counts releases of examples that are each one {item or 'example'}, and now one is "
                f"a {privacy.item or 'example'}: no statement covers both. Resume with the configuration of the run "
                "that wrote it, or choose another ledger_path."
            )
    return Ledger.open(
        path,
        "resume" if resume else "new",
        mechanism=schedule.mechanism,
        config=privacy.to_dict() | conditions | ({} if account is None else {"account": account}),
        fingerprint=privacy.fingerprint(),
        schedule=schedule.to_dict(),
    )
