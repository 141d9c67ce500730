"""An audit of dpft under an engine, as it is and with half of the noise; the ranks write what they found as JSON.

accelerate launch --config_file ... audit_worker.py OUTPUT_FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState

from accelerate import Accelerator
from dpft import GaussianNoise
from dpft.audit import WhiteBoxAudit, white_box
from tests.engines.on_cpu import make_accelerator
from tests.fixed_draws import fixed_draws
from tools.auditing import subject


def fresh() -> Accelerator:
    """An Accelerator as the first of a process would be."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = make_accelerator()
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        plugin.deepspeed_config |= {"zero_allow_untested_optimizer": True, "steps_per_print": 10**9}
    return accelerator


def audited(**options: Any) -> WhiteBoxAudit:
    with fixed_draws(int(os.environ["RANK"])):
        return white_box(
            fresh,
            subject.model(),
            subject.records(0),
            subject.configuration(),
            collate_fn=subject.collate,
            steps=24,
            canaries=8,
            max_physical_batch_size=4,
            **options,
        )


if __name__ == "__main__":
    output = Path(sys.argv[1])
    found = {"sound": audited().to_dict()}
    add = GaussianNoise.add_
    GaussianNoise.add_ = lambda self, tensor, std, place=None: add(self, tensor, std / 2, place)  # type: ignore[method-assign]  # the plant
    found["half"] = audited(static_shapes=True).to_dict()
    rank = dist.get_rank() if dist.is_initialized() else 0
    (output / f"{rank}.json").write_text(json.dumps(found))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
