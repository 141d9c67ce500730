"""Two ranks, launched as users do: what is refused on one is refused on both, and no parameter has moved.

The wrong things are done in `refusals_worker.py`, all in the launch of an engine whose sums `test_matrix.py` judges.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.engines.conftest import SITUATIONS

pytestmark = pytest.mark.slow

# What the message names, for each setting that rank 1 has otherwise.
DISAGREE = {
    "noise": "noise_multiplier",
    "epsilon": "target_epsilon",
    "clip norm": "max_grad_norm",
    "batch size": "expected_batch_size",
    "steps": "num_steps",
    "delta": "target_delta",
    "clip function": "clip_function",
    "clipping": "clipping",
    "strategy": "strategy",
    "physical": "max_physical_batch_size",
    "length": "number of examples",
    "order": "order of the examples",
    "users": "order of the examples",
    "reduction of users": "order of the examples",
    "lengths": "'lengths': rank 0 has None",
    "other lengths": "'lengths': rank 0 has '",
    "seed": "test_seed",
    "workers": "num_workers",
    "trainable": "parameters",
    "version": "version of torch",
    "invalid": "max_physical_batch_size is 0",
    "data loader": "DataLoader",
    "fp16": "float16",
    "batch norm": "BatchNorm",
    "no clipping": "clipping='none'",
    "foreign": r"[7, 3]",
}
CHANGES = {
    "unfreeze before_forward": "embed_tokens",
    "unfreeze before_step": "embed_tokens",
    "replace before_forward": "lm_head.weight",
    "replace before_step": "lm_head.weight",
    "add before_forward": "more",
    "add before_step": "more",
    "drop_hooks before_step": "step hook",
    "skip_one before_step": "elements were noised",
    "more_groups before_step": "after dpft.prepare",
    "rows mixed by detached values": "run alone and without its padding",
    "random state not saved": "preserve_rng_state",
    "random states differ": "saw different gradients",
}
DEEPSPEED = {
    "swap before_step": "replaced by a SGD",
    "drop_hooks_unseen before_step": "stepped on none",
    "a second training": "already",
    "retried release": "came after its logical batch was released",
}
RELEASED = ("skip_one", "retried")  # their error comes after the line in the ledger


@pytest.mark.parametrize("engine", SITUATIONS)
def test_what_two_ranks_refuse(engine: str, launched: Callable[[str], Path]) -> None:
    """Each case with an error of dpft on both ranks, that names what is wrong; DDP also sees ranks disagree."""
    output = launched(engine)
    expected = {**CHANGES, **(DEEPSPEED if engine.startswith("zero") else {})}
    if engine == "ddp":
        expected |= {**DISAGREE, "unfrozen on one rank": "embed_tokens"}
    if engine == "zero2":
        expected["layers of one rank"] = "the ranks used different parameters"
    if engine == "fsdp2":
        del expected["replace before_step"]  # FSDP2 puts its own parameter back, so nothing is wrong then
    for rank in range(2):
        seen: dict[str, Any] = json.loads((output / f"refusals.{rank}").read_text())
        fine = seen.pop("nothing wrong")
        assert fine["error"] is None and fine["moved"] and fine["steps"] == 1, "the loop itself must work"
        assert seen.keys() == expected.keys()
        for name, note in seen.items():
            by_engine = engine == "zero3" and name.split()[0] in ("replace", "add")
            if by_engine:  # DeepSpeed itself cannot run a module with a parameter that it has not sharded
                assert "ds_status" in note["says"] or note["refused"], (rank, name, note)
            else:
                assert note["refused"] and expected[name] in note["says"], (rank, name, note)
            assert not note.get("moved"), (rank, name, note)
            # The ledger may count more than was released, never less.
            assert note.get("steps", 0) == int(name.startswith(RELEASED)), (rank, name, note)
