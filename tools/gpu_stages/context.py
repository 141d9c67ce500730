"""What a stage is given, and where it puts what it finds."""

from __future__ import annotations

import importlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tools.common.json_files import write_json

PARTIAL, DONE, WRONG, FAILED, SKIPPED = "partial", "done", "wrong", "failed", "not run"


@dataclass
class Context:
    """Of one run of one stage, in its process.

    Attributes:
        path: the stage's JSON file, written whole after every row.
        name: of the stage.
        rehearse: on the CPU, with tiny shapes.
        seconds: that the stage may take; what would not end in time is left out by the stage itself.
        rows: what was found so far.
    """

    path: Path
    name: str
    rehearse: bool
    seconds: float
    rows: list[dict[str, Any]] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    @property
    def device(self) -> str:
        """``"cuda"``, or ``"cpu"`` in a rehearsal."""
        return "cpu" if self.rehearse else "cuda"

    @property
    def left(self) -> float:
        """Seconds."""
        return self.seconds - (time.monotonic() - self.began)

    def add(self, **row: Any) -> None:
        """Keep a row."""
        self.rows.append(row)
        self.write(PARTIAL)

    def write(self, status: str, **more: Any) -> None:
        """The file, with all rows so far."""
        taken = time.monotonic() - self.began
        fields = {
            "stage": self.name,
            "status": status,
            "rehearsal": self.rehearse,
            "seconds": taken,
            "process_seconds": time.process_time(),
        }
        write_json(self.path, {**fields, **more, "rows": self.rows})

    def synchronize(self) -> None:
        """Wait for the GPU, if there is one."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def missing(self, *packages: str) -> list[str]:
        """Those of the packages that cannot be imported."""
        return [name for name in packages if not _imports(name)]


def _imports(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True
