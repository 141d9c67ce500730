"""Plain training with the tokens of a batch spread over ranks, as Accelerate and DeepSpeed know it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


def forget_ulysses() -> None:
    """Ends the last case's registration of DeepSpeed's attention, which is made once in a process."""
    from deepspeed.runtime.sequence_parallel import parallel_state_sp
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    parallel_state_sp._release_sequence_parallel_groups()
    ALL_ATTENTION_FUNCTIONS._local_mapping.pop("sdpa", None)


def my_tokens(batch: Tensor, ranks: int) -> dict[str, Tensor]:
    """The arguments of a forward for this rank's tokens, as DeepSpeed's loader for Ulysses makes them."""
    if ranks == 1:
        return {"input_ids": batch, "labels": batch}
    part = batch.shape[1] // ranks
    mine = slice(dist.get_rank() % ranks * part, (dist.get_rank() % ranks + 1) * part)
    targets = nn.functional.pad(batch[:, 1:], (0, 1), value=-100)[:, mine].contiguous()
    positions = torch.arange(batch.shape[1])[None, mine]
    return {"input_ids": batch[:, mine], "position_ids": positions, "labels": targets, "shift_labels": targets}
