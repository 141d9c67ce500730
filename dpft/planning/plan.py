"""``plan``: predicts FLOPs, time and memory of a private step without running it, and chooses the strategy."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from torch import nn

from dpft.clipping.strategy_choice import free_memory
from dpft.errors import UnsupportedModuleError
from dpft.kernels.head import auto_chunk
from dpft.models.causal_lm import find_causal_lm
from dpft.planning.hardware import HARDWARE, Hardware, measure
from dpft.planning.memory import OPTIMIZERS, OptimizerName, resting_bytes
from dpft.planning.predictor import Predictor
from dpft.planning.result import Plan
from dpft.planning.simulate import ENGINES, EngineName, Sharding
from dpft.planning.twin import make_twin

__all__ = ["plan"]

_DTYPES = {"float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16}


def plan(
    model: nn.Module,
    batch_size: int | Literal["auto"] = 1,
    seq_len: int = 1024,
    dtype: torch.dtype | str | None = None,
    checkpointing: bool | None = None,
    memory: int | None = None,
    engine: EngineName = "single",
    world_size: int = 1,
    hardware: str | Hardware | None = None,
    optimizer: OptimizerName | None = None,
    loss_chunk: int | Literal["auto"] | None = "auto",
) -> Plan:
    """Predict a private training step of a causal LM and choose its strategy, without running it.

    The code of the step itself, plain and private, runs on a meta twin of the model, which has shapes and no data: an
    8-billion-parameter model at 131,072 tokens takes seconds. The model itself is only read.

    Args:
        model: a Hugging Face causal LM, plain or under PEFT, wrapped or not, on any device, meta included.
        batch_size: B of the physical batch; ``"auto"`` finds the one with the least time per example that fits, among
            1, 2, 3, 4, 6, 8, 12, ... 256.
        seq_len: T.
        dtype: of the parameters (``"bf16"``, ``"fp32"`` or a torch dtype); None keeps theirs. Autocast is not planned.
        checkpointing: non-reentrant gradient checkpointing on or off; None keeps the model's setting.
        memory: bytes of the device, in which everything has to fit. None: the free memory of the model's device plus
            what the model occupies; for a model on meta or a named hardware, all memory of the hardware.
        engine: ``"single"``, ``"ddp"``, ``"fsdp2"``, ``"zero1"``, ``"zero2"`` or ``"zero3"``.
        world_size: number of ranks of the engine.
        hardware: ``"h100"``, ``"a100"``, ``"h200"``, or a :class:`Hardware`. None measures the model's device once, in
            less than half a second; for a model on meta it is ``"h100"``.
        optimizer: ``"adamw"`` or ``"sgd"``, under :class:`dpft.DPOptimizer`: counts its states, and float32 gradients
            of bf16 parameters. None plans the model alone.
        loss_chunk: as in :func:`dpft.wrap`.

    Raises:
        ValueError: an argument out of range.
        UnsupportedModuleError: no trainable parameter, or a model that cannot run on meta tensors.
    """
    sharding = _checked(model, batch_size, seq_len, memory, engine, world_size)
    if optimizer not in (None, *OPTIMIZERS):
        raise ValueError(f"optimizer is {optimizer!r}; expected one of {', '.join(map(repr, OPTIMIZERS))}, or None")
    device = next(p.device for p in model.parameters())
    machine = _machine(hardware, device)
    twin = make_twin(model, _dtype(dtype), checkpointing)
    if optimizer is not None:
        for p in twin.parameters():
            if p.dtype.itemsize < 4 and p.is_floating_point():
                p.grad_dtype = torch.float32
    limit = memory
    if limit is None:
        limit = machine.memory if device.type == "meta" or isinstance(hardware, str) else _whole_memory(model, device)
    if loss_chunk == "auto":  # as on the planned device, not on meta
        loss_chunk = auto_chunk(torch.device("cuda" if machine.asynchronous else "cpu"))
    predictor = Predictor(
        twin, seq_len, sharding, machine, limit, resting_bytes(twin, sharding, optimizer), loss_chunk
    )
    size = predictor.best_batch_size() if batch_size == "auto" else batch_size
    return predictor.plan(size, type(model).__name__, optimizer)


def _checked(model: nn.Module, batch_size: Any, seq_len: Any, memory: Any, engine: Any, world_size: Any) -> Sharding:
    for name, value in (("batch_size", batch_size), ("seq_len", seq_len), ("world_size", world_size)):
        if name == "batch_size" and value == "auto":
            continue
        if type(value) is not int or value < 1:
            more = " or 'auto'" if name == "batch_size" else ""
            raise ValueError(f"{name} is {value!r}; expected a whole number >= 1{more}")
    if memory is not None and (type(memory) is not int or memory < 1):
        raise ValueError(f"memory is {memory!r}; expected bytes, a whole number >= 1, or None")
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}; expected one of {', '.join(map(repr, ENGINES))}")
    if engine == "single" and world_size != 1:
        raise ValueError(f"world_size is {world_size} and engine 'single' is one process; name the engine")
    if not any(p.requires_grad for p in model.parameters()):
        raise UnsupportedModuleError("no parameter of the model requires a gradient; unfreeze what is to be trained")
    if find_causal_lm(model) is None:
        raise UnsupportedModuleError(
            f"{type(model).__name__} is not a causal LM of Hugging Face; expected a model that takes input_ids and "
            "labels and has its loss in model.loss_function (LlamaForCausalLM, GPT2LMHeadModel, ..., also under PEFT)"
        )
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(longest, int) and seq_len > longest:
        warnings.warn(
            f"seq_len {seq_len} is beyond the model's max_position_embeddings {longest}: planned all the same",
            stacklevel=3,
        )
    return Sharding(engine, world_size)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and (not isinstance(found, torch.dtype) or not found.is_floating_point):
        raise ValueError(f"dtype is {dtype!r}; expected a floating-point torch.dtype, 'bf16' or 'fp32'")
    return found


def _machine(hardware: str | Hardware | None, device: torch.device) -> Hardware:
    if isinstance(hardware, Hardware):
        return hardware
    if hardware is None:
        return HARDWARE["h100"] if device.type == "meta" else measure(device)
    if hardware not in HARDWARE:
        raise ValueError(
            f"hardware is {hardware!r}; expected one of {', '.join(map(repr, HARDWARE))}, a dpft Hardware, or None"
        )
    return HARDWARE[hardware]


def _whole_memory(model: nn.Module, device: torch.device) -> int:
    """Bytes of the device that training may use: the free ones, and those that the model occupies."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in (*model.parameters(), *model.buffers())}
    return free_memory(device) + sum(storage.nbytes() for storage in storages.values())
