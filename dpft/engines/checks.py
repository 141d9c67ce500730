"""What Accelerate's configuration may be: everything that would void the guarantee is refused before training."""

from __future__ import annotations

import os
from typing import Any

from accelerate.utils import DynamoBackend

from dpft.engines.engine import Kind, kind_of
from dpft.errors import EngineError


def check_accelerator(accelerator: Any) -> Kind:
    """Refuse every configuration in which the private gradient would not be exact.

    Args:
        accelerator: an ``accelerate.Accelerator``.

    Returns:
        The engine that it was launched with.

    Raises:
        EngineError: names the setting and the value to use.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != world:
        raise EngineError(
            f"the launcher started {world} processes and Accelerate sees {accelerator.num_processes}: every process "
            "would train alone on the same data. Launch with a configuration that Accelerate supports on this device."
        )
    if accelerator.mixed_precision == "fp16":
        raise EngineError(
            "mixed_precision is 'fp16', whose loss scaling skips steps depending on the data. Use 'bf16' or 'no'."
        )
    dynamo = getattr(accelerator.state, "dynamo_plugin", None)
    if dynamo is not None and dynamo.backend != DynamoBackend.NO:
        raise EngineError(
            f"dynamo_backend is {dynamo.backend.value!r}: torch.compile of a private model is not supported by this "
            "version. Use dynamo_backend 'no'."
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise EngineError(
            f"gradient_accumulation_steps is {accelerator.gradient_accumulation_steps}; expected 1: the loader cuts a "
            "logical batch into physical ones by itself (max_physical_batch_size)."
        )
    return kind_of(accelerator)
