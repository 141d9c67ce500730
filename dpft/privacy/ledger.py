"""The ledger: an append-only file with one line per release, on disk before the release happens.

A run that is killed and resumed reports the epsilon of the releases in the ledger, never less than was spent: every
release is written and fsynced *before* the parameters change, so a crash can only over-count. A checkpoint holds
only ``{run_id, count}``; a checkpoint that is behind the ledger continues from the ledger's count.

The file holds JSON lines, each with a CRC-32 of itself:

- the header: format, run id, configuration and schedule, and the mechanism of segment 0;
- ``segment``: every resume begins one, with the mechanism from there on;
- ``release``: its number, 1, 2, 3, ... without gaps, and its segment; under ``adaptive_clip`` also the clip norm of
  the next release, which follows from the noised counts up to this one;
- ``torn``: written at the next start, after a last line that a crash truncated. A torn line counts as a release.

A line that is damaged anywhere else, or a number out of order, is a :class:`~dpft.errors.LedgerError`: the count
cannot be known, so training does not continue. The CRC detects accidental damage, not tampering.

Nothing else that depends on the data is written: no losses, norms or sizes of drawn batches. Times are
truncated to the hour, because the time between two releases reveals how large the drawn batch was.
"""

from __future__ import annotations

import os
import uuid
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from dpft.errors import DPFTError, LedgerError
from dpft.privacy.accounting.accountant import Event, of_one_run
from dpft.privacy.ledger_file import decode, encode, fsync_directory, hour, lock, read_all, write
from dpft.privacy.mechanism import Mechanism

FORMAT = 1


@dataclass(frozen=True)
class LedgerContent:
    """The content of a ledger file.

    Attributes:
        run_id: UUID of the run, the same over all resumes.
        header: the first line.
        events: mechanism and number of releases of each segment, in order; segments without releases included.
        torn: number of truncated lines at the end that are not marked as torn yet; they are counted in ``events``.
        unterminated: whether the last line lacks its newline.
        clip_norms: for each release, the clip norm of the next one; None before one was recorded. A torn line keeps
            the one before: the releases that follow it were made with it, or were not made.
        schedules: what each segment planned, as :meth:`PrivacySchedule.to_dict` has it; None where it does not say.
    """

    run_id: str
    header: dict[str, Any]
    events: tuple[Event, ...]
    torn: int
    unterminated: bool
    clip_norms: tuple[float | None, ...] = ()
    schedules: tuple[dict[str, Any] | None, ...] = ()

    @property
    def count(self) -> int:
        """Releases, including torn lines."""
        return sum(count for _, count in self.events)

    def clip_norm_after(self, count: int) -> float | None:
        """As :meth:`Ledger.clip_norm_after`."""
        return self.clip_norms[count - 1] if count else None


class Ledger:
    """An open ledger, locked against every other process. Create it with :meth:`open`, on one rank only.

    The caller must call :meth:`record` before a release changes the parameters, and must let its exception prevent the
    release.
    """

    def __init__(self, path: Path, fd: int, content: LedgerContent) -> None:
        """Use :meth:`open`."""
        self.path = path
        self._fd = fd
        self._pid = os.getpid()
        self._run_id = content.run_id
        self._events = list(content.events)
        self._clip_norms = list(content.clip_norms)
        self._failed = False
        self._finalizer = weakref.finalize(self, os.close, fd)
        _OPEN.add(self)

    # ------------------------------------------------------------------------------------------ open, close
    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        mode: Literal["new", "resume"],
        *,
        mechanism: Mechanism,
        config: dict[str, Any] | None = None,
        fingerprint: str | None = None,
        schedule: dict[str, Any] | None = None,
    ) -> Ledger:
        """Creates a ledger, or opens one to continue.

        Args:
            path: the file.
            mode: ``new``: it must not have any releases yet. ``resume``: it must exist and be undamaged.
            mechanism: of the releases to come; on resume it may differ from the earlier one.
            config: ``PrivacyConfig.to_dict()``, for the reader.
            fingerprint: ``PrivacyConfig.fingerprint()``.
            schedule: ``PrivacySchedule.to_dict()``, for the reader.

        Returns:
            The open ledger. Its lock ends with :meth:`close` or with the process, however that ends.

        Raises:
            LedgerError: another process has it open, it is missing, damaged, not empty in mode ``new``, or cannot be
                written.
        """
        if mode not in ("new", "resume"):
            raise LedgerError(f"mode={mode!r}; expected 'new' or 'resume'.")
        file = Path(path)
        fields = {"mechanism": mechanism.to_dict(), "fingerprint": fingerprint, "config": config, "schedule": schedule}
        try:
            if mode == "new":
                file.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(file, os.O_RDWR | os.O_APPEND | (os.O_CREAT if mode == "new" else 0), 0o644)
        except FileNotFoundError as error:
            raise LedgerError(
                f"no ledger at {file}: what was spent before is unknown. Give the path of the run's ledger, or, if "
                "nothing was ever released, open it with mode='new'."
            ) from error
        except OSError as error:
            raise LedgerError(f"cannot open the ledger {file}: {error}.") from error
        try:
            lock(fd, file)
            content = _start_new(fd, file, fields) if mode == "new" else _start_again(fd, file, fields)
        except BaseException:
            os.close(fd)
            raise
        return cls(file, fd, content)

    @staticmethod
    def read(path: str | os.PathLike[str]) -> LedgerContent:
        """Reads a ledger without locking or changing it, for reports.

        Raises:
            LedgerError: the file is missing, damaged, or not a ledger.
        """
        try:
            return _parse(Path(path).read_bytes(), Path(path))
        except OSError as error:
            raise LedgerError(f"cannot read the ledger {path}: {error}.") from error

    def close(self) -> None:
        """Closes the file and releases the lock. May be called more than once."""
        self._finalizer()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------ the releases
    def record(self, next_clip_norm: float | None = None) -> int:
        """Writes one release, and returns once it is on disk. Call it *before* the parameters change.

        Args:
            next_clip_norm: under ``adaptive_clip``, the clip norm of the release after this one.

        Returns:
            The number of the release, from 1.

        Raises:
            LedgerError: the write failed (disk full or gone), or this process may not write: the release must not
                happen. After a failed write every further call fails, until the ledger is opened with ``resume``.
        """
        if os.getpid() != self._pid:
            raise LedgerError(f"process {os.getpid()} inherited the ledger {self.path}; only its parent may write.")
        if not self._finalizer.alive:
            raise LedgerError(f"the ledger {self.path} is closed; open it with mode='resume' before releasing more.")
        if self._failed:
            raise LedgerError(
                f"writing to the ledger {self.path} failed before; end the run, free disk space, and resume."
            )
        number = self.count + 1
        clip = {} if next_clip_norm is None else {"next_clip_norm": next_clip_norm}
        line = encode({"release": number, "segment": len(self._events) - 1, "time": hour(), **clip})
        try:
            if os.fstat(self._fd).st_nlink == 0:
                raise OSError("the file was deleted while the run went on")
            write(self._fd, line)
        except BaseException as error:
            # Whatever the error (even a signal), part of a line may be in the file.
            self._failed = True
            if not isinstance(error, OSError):
                raise
            raise LedgerError(
                f"release {number} could not be written to the ledger {self.path} ({error}); it did not happen. Free "
                "disk space and resume."
            ) from error
        mechanism, count = self._events[-1]
        self._events[-1] = (mechanism, count + 1)
        self._clip_norms.append(next_clip_norm)
        return number

    @property
    def count(self) -> int:
        """Releases so far, over all resumes; truncated lines count."""
        return sum(count for _, count in self._events)

    @property
    def run_id(self) -> str:
        """UUID of the run, the same over all resumes."""
        return self._run_id

    def clip_norm_after(self, count: int) -> float | None:
        """The clip norm after ``count`` releases; None where none was recorded."""
        return self._clip_norms[count - 1] if count else None

    def events(self) -> list[Event]:
        """Mechanism and count of each segment, for :func:`~dpft.privacy.accounting.accountant.compose_epsilon`.

        Segments are merged only where the noise is correlated over them: where the sampler has epochs, each one starts
        a new one.
        """
        return of_one_run([event for event in self._events if event[1] > 0])

    # ------------------------------------------------------------------------------------------ checkpoints
    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: the run id, the count and a clip norm that adapts. No secret, no random state."""
        return resume_state(self)

    def check_resume(self, state: dict[str, Any]) -> None:
        """Checks that a checkpoint belongs to this ledger. A checkpoint that is behind the ledger is accepted.

        Args:
            state: the checkpoint's :meth:`state_dict`.

        Raises:
            LedgerError: this is another run's ledger, or it counts fewer releases than the checkpoint.
        """
        try:
            run_id, count = str(state["run_id"]), int(state["count"])
        except (KeyError, TypeError, ValueError) as error:
            raise LedgerError(f"the checkpoint's ledger state is {state!r}; expected run_id and count.") from error
        if run_id != self.run_id:
            raise LedgerError(
                f"the checkpoint belongs to run {run_id}, and the ledger {self.path} to run {self.run_id}; give the "
                "ledger that was written with the checkpoint."
            )
        if count > self.count:
            raise LedgerError(
                f"the checkpoint counts {count} releases and the ledger {self.path} only {self.count}: it is an old "
                "copy, or was truncated; give the ledger that was written with the checkpoint."
            )
        if (norm := self.clip_norm_after(count)) != state.get("clip_norm"):
            raise LedgerError(
                f"the checkpoint has the clip norm {state.get('clip_norm')} after {count} releases, and the ledger "
                f"{self.path} has {norm}; give the ledger that was written with the checkpoint."
            )


def resume_state(ledger: Any) -> dict[str, Any]:
    """What a checkpoint has of a :class:`Ledger`, or of one that is shared by several processes."""
    norm = ledger.clip_norm_after(ledger.count)
    return {"run_id": ledger.run_id, "count": ledger.count} | ({} if norm is None else {"clip_norm": norm})


# A forked child (a DataLoader's worker) would share the lock, and hold it after its parent died.
_OPEN: weakref.WeakSet[Ledger] = weakref.WeakSet()


def _close_in_child() -> None:
    for ledger in list(_OPEN):
        ledger.close()


os.register_at_fork(after_in_child=_close_in_child)


# ------------------------------------------------------------------------------------------------- the file
def _start_new(fd: int, file: Path, fields: dict[str, Any]) -> LedgerContent:
    data = read_all(fd)
    before = _parse(data, file) if data else None
    if before is not None and (count := before.count):
        raise LedgerError(
            f"the ledger {file} has {count} releases already. To continue that run, open it with mode='resume'; for "
            "a new run choose another path. Deleting it makes the epsilon that was spent on these data unknown."
        )
    # The id of a start that died before its first release is kept: under it an account may have a reservation, which
    # this start's takes the place of. Under another id nobody could tell that nothing of it was released.
    run_id = str(uuid.uuid4()) if before is None else before.run_id
    header = {"dpft_ledger": FORMAT, "run_id": run_id, "created": hour(), **fields}
    try:
        os.ftruncate(fd, 0)
        write(fd, encode(header))
        fsync_directory(file)
    except OSError as error:
        raise LedgerError(f"cannot write the ledger {file}: {error}.") from error
    return _parse(read_all(fd), file)


def _start_again(fd: int, file: Path, fields: dict[str, Any]) -> LedgerContent:
    content = _parse(read_all(fd), file)
    repair = b"\n" if content.unterminated else b""
    if content.torn:
        repair += encode({"torn": content.torn})
    try:
        write(fd, repair + encode({"segment": len(content.events), "time": hour(), **fields}))
        fsync_directory(file)
    except OSError as error:
        raise LedgerError(f"cannot write the ledger {file}: {error}.") from error
    return _parse(read_all(fd), file)


def _parse(data: bytes, file: Path) -> LedgerContent:
    """Reads every line; any damage other than a torn end is an error."""
    lines = data.split(b"\n")
    unterminated = bool(lines.pop())  # what follows the last newline: nothing, in a whole file
    if unterminated:
        lines.append(data[data.rfind(b"\n") + 1 :])
    header = decode(lines[0]) if lines else None
    if header is None or "dpft_ledger" not in header:
        raise LedgerError(
            f"{file} does not begin with a complete ledger header: it is not a ledger, is damaged, or its run died "
            "before its first release. Restore it from a backup; delete it only if that run released nothing."
        )
    if header["dpft_ledger"] != FORMAT:
        raise LedgerError(f"{file} has ledger format {header['dpft_ledger']!r}; this dpft reads {FORMAT}.")
    try:
        mechanisms, counts, torn = [Mechanism.from_dict(header["mechanism"])], [0], 0
        norms: list[float | None] = []
        schedules = [header.get("schedule")]
        for number, raw in enumerate(lines[1:], start=2):
            line = decode(raw)
            if line is None:
                torn += 1
                counts[-1] += 1
                norms.append(norms[-1] if norms else None)
            elif "torn" in line:
                if line["torn"] != torn:
                    raise LedgerError(_damaged(file, number, f"marks {line['torn']} torn lines, and {torn} are there"))
                torn = 0
            elif torn:
                raise LedgerError(_damaged(file, number - 1, "is damaged, and is not the last"))
            elif "release" in line:
                if line["release"] != sum(counts) + 1 or line["segment"] != len(counts) - 1:
                    came = f"is release {line['release']} of segment {line['segment']}"
                    raise LedgerError(
                        _damaged(file, number, f"{came}, expected {sum(counts) + 1} of {len(counts) - 1}")
                    )
                counts[-1] += 1
                norms.append(_clip_norm(line, file, number))
            elif line.get("segment") == len(counts):
                mechanisms.append(Mechanism.from_dict(line["mechanism"]))
                counts.append(0)
                schedules.append(line.get("schedule"))
            else:
                raise LedgerError(_damaged(file, number, "is not one that this version writes"))
        run_id = str(header["run_id"])
    except LedgerError:
        raise
    except (DPFTError, KeyError, TypeError, AttributeError) as error:
        raise LedgerError(f"the ledger {file} is damaged: {error!r}. Restore it from a backup.") from error
    events = tuple(zip(mechanisms, counts, strict=True))
    return LedgerContent(run_id, header, events, torn, unterminated, tuple(norms), tuple(schedules))


def _clip_norm(line: dict[str, Any], file: Path, number: int) -> float | None:
    norm = line.get("next_clip_norm")
    if norm is not None and not (isinstance(norm, (int, float)) and norm > 0):
        raise LedgerError(_damaged(file, number, f"has the clip norm {norm!r}"))
    return norm


def _damaged(file: Path, number: int, what: str) -> str:
    return f"the ledger {file} is damaged: line {number} {what}. What was spent is unknown; restore it from a backup."
