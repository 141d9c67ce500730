"""Lets the ready Accelerate configurations run on a CPU, which Accelerate by itself gets wrong without an error.

For tests alone: the process group is gloo, the device the CPU, and DeepSpeed builds no extension. A DeepSpeed config
would otherwise give every rank the whole data, FSDP neither shard nor synchronise, MULTI_GPU look for a GPU. The
environment that it needs besides is set by :mod:`tests.engines.launching`.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from accelerate import Accelerator


def use_cpu() -> None:
    """Call it before the Accelerator is made."""
    torch.set_num_threads(1)

    def backend(self: Any, *_: Any, **__: Any) -> tuple[Any, DistributedType]:
        if "LOCAL_RANK" not in os.environ:
            return None, DistributedType.NO
        return "gloo", DistributedType.MULTI_GPU

    PartialState._prepare_backend = backend  # type: ignore[method-assign]  # the one way to gloo under every launcher
    spread = int(os.environ.get("PARALLELISM_CONFIG_SP_SIZE", "1")) > 1  # FSDP2 with DeepSpeed's attention
    if spread or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true":
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}  # only inference uses what it would build


class OnCPU(Accelerator):
    """With DeepSpeed, the given optimiser is not replaced by one that is compiled first."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.state.deepspeed_plugin is not None:
            self.state.deepspeed_plugin.deepspeed_config["zero_force_ds_cpu_optimizer"] = False


def make_accelerator(**options: Any) -> Accelerator:
    """An Accelerator on the CPU."""
    use_cpu()
    return OnCPU(**options)


def forget_ulysses() -> None:
    """Ends the registration of DeepSpeed's attention, which is meant to be made once in a process."""
    from deepspeed.runtime.sequence_parallel import parallel_state_sp
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    parallel_state_sp._release_sequence_parallel_groups()
    ALL_ATTENTION_FUNCTIONS._local_mapping.pop("sdpa", None)
