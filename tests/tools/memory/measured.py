"""Profiles of a model of known size, for the tests of the tracker and of simulation."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch

from tools.memory.memory_process import measure_memory
from tools.memory.setup import Setup

MIB = 2**20
WIDTH, LAYERS, VOCAB, TOKENS = 64, 2, 320, 96
TINY = Setup(VOCAB, WIDTH, LAYERS, num_heads=2, seq_len=TOKENS, intermediate_dim=96, num_iter=1, warmup_iter=1)
PARAMETERS = 2 * VOCAB * WIDTH + LAYERS * (4 * WIDTH**2 + 3 * WIDTH * 96 + 2 * WIDTH) + WIDTH
NUMBER_OF_PARAMETERS = 3 + LAYERS * 9


def measured(name: str, **changes: Any) -> dict[str, Any]:
    """What a memory process would answer, here in the process of the test; once for all tests that ask for it."""
    return _measured(name, replace(TINY, **changes))


@functools.cache
def _measured(name: str, setup: Setup) -> dict[str, Any]:
    # What oneDNN's kernels take for themselves depends on the processor, and so would the moment of the peak.
    with torch.backends.mkldnn.flags(enabled=False):
        found = measure_memory(setup, name)
    assert found["status"] == "ok", found["reason"]
    return found


def at(found: dict[str, Any], name: str) -> dict[str, float]:
    """The components of a snapshot, in bytes."""
    (snapshot,) = [s for s in found["snapshots"] if s["name"] == name]
    return {key.removesuffix("_mb"): mb * MIB for key, mb in snapshot["components"].items()}
