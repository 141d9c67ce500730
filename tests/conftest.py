"""What every test needs: no network, caches of its own, the same random numbers on every run."""

from __future__ import annotations

import atexit
import multiprocessing.process
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator
from typing import Any, NoReturn
from unittest import mock

# Before torch, transformers or deepspeed is imported, and inherited by the processes that tests start.
_SCRATCH = tempfile.mkdtemp(prefix="dpft-tests-")
atexit.register(shutil.rmtree, _SCRATCH, ignore_errors=True)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = os.path.join(_SCRATCH, "huggingface")  # also hides the user's default Accelerate config
# A process killed while it builds an extension leaves a lock that makes all later builds wait for ever.
os.environ["TORCH_EXTENSIONS_DIR"] = os.path.join(_SCRATCH, "torch_extensions")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait starve the tests beside them
os.environ["MPLBACKEND"] = "Agg"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # tests fork, and a forked tokenizer warns about its threads

import hypothesis
import pytest
import torch

# No deadline: another process on the machine must not fail a test. Derandomised: a red run can be repeated.
hypothesis.settings.register_profile("dpft", deadline=None, derandomize=True, print_blob=True, database=None)
hypothesis.settings.load_profile("dpft")

# The models are tiny, and `make test` runs two processes: more threads would only wait for each other.
torch.set_num_threads(1)


def _refuse(*_: Any, **__: Any) -> NoReturn:
    pytest.fail("starts a process: mark the test `@pytest.mark.slow`")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Only tests that are marked ``slow`` start processes, in their fixtures too."""
    if item.get_closest_marker("slow"):
        return (yield)
    with (
        mock.patch.object(subprocess.Popen, "__init__", _refuse),
        mock.patch.object(multiprocessing.process.BaseProcess, "start", _refuse),
    ):
        return (yield)


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    """Seeds torch's global generator, and gives back what a test may have changed for the whole process."""
    dtype = torch.get_default_dtype()
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)
    accelerate = sys.modules.get("accelerate.state")
    if accelerate is not None and accelerate.GradientState._shared_state:
        # All Accelerators share it. A test that raised within a logical batch leaves "do not step yet" behind.
        accelerate.GradientState._shared_state["sync_gradients"] = True
