"""One launch of an engine, for all tests that judge what it did."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engines.launching import launch, succeed

WORKER = Path(__file__).with_name("engine_worker.py")
SITUATIONS = ("ddp", "fsdp2", "zero2", "zero3")  # the others differ from these in what the matrix alone covers


@pytest.fixture(scope="session")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Engine -> the folder that its ranks wrote into, by one launch even where pytest-xdist has several processes."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent

    def folder_of(engine: str) -> Path:
        scratch, ended = shared / f"launch-{engine}", shared / f"launch-{engine}.json"
        with (shared / f"launch-{engine}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not scratch.exists():
                (scratch / "output").mkdir(parents=True)
                words = ["all" if engine in SITUATIONS else "matrix", *(["disagree"] if engine == "ddp" else [])]
                done = launch(engine, WORKER, str(scratch / "output"), *words, scratch=scratch)
                ended.write_text(json.dumps({"args": done.args, "returncode": done.returncode, "stdout": done.stdout}))
        assert ended.exists(), f"the launch of {engine} did not end, as another test says"
        succeed(subprocess.CompletedProcess(**json.loads(ended.read_text())))
        return scratch / "output"

    return folder_of
