"""``plan``: predicts FLOPs, time and memory of a private step without running it, and chooses the strategy.

``longest``: the longest text of which a step fits.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from dpft.clipping.clip_groups import ClipGroupsSpec
from dpft.clipping.strategy_choice import free_memory
from dpft.errors import UnsupportedModuleError
from dpft.kernels.head import auto_chunk
from dpft.long_context.install import LongContext
from dpft.models.causal_lm import find_causal_lm
from dpft.planning.hardware import HARDWARE, Hardware, measure
from dpft.planning.long_text import find_long_context, install_on_meta
from dpft.planning.longest import STEP, Longest, find_longest
from dpft.planning.memory import OPTIMIZERS, OptimizerName, host_bytes, resting_bytes
from dpft.planning.noise import EARLIER, noise_cost
from dpft.planning.predictor import Predictor
from dpft.planning.result import Plan
from dpft.planning.simulate import ENGINES, EngineName, Sharding
from dpft.planning.twin import make_twin
from dpft.privacy.config import PrivacyConfig

__all__ = ["longest", "plan"]

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
    long_context: bool = False,
    sequence_parallel: int = 1,
    host_memory: int | None = None,
    sums_device: Literal["cpu"] | None = None,
    clip_groups: ClipGroupsSpec | None = None,
    privacy: PrivacyConfig | None = None,
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
        long_context: whether :func:`dpft.long_context` is on; a model on which it is on is planned with it in any
            case. Of a model on meta, the blocks that run in tiles are found by their shapes alone. On a GPU the
            inputs of checkpoints are in host memory. Under ZeRO-3 there are no tiles.
        sequence_parallel: S, the ranks over which the tokens of a text are spread (Ulysses), each ``T / S``.
        host_memory: bytes of host memory that the offloaded tensors of all ranks have to fit into. None: whatever
            they take.
        sums_device: ``"cpu"``: clipped sums, float32 masters and the optimiser are in host memory, of one process.
        clip_groups: as in :func:`dpft.wrap`.
        privacy: whose noise is counted: the vectors that ``bandmf`` and ``blt`` keep, and the time of drawing. None
            counts neither.

    Raises:
        ValueError: an argument out of range, or :func:`dpft.long_context` refuses the model.
        UnsupportedModuleError: no trainable parameter, or a model that cannot run on meta tensors.
    """
    predictor = _predictor(
        model, batch_size, seq_len, dtype, checkpointing, memory, engine, world_size, hardware, optimizer, loss_chunk,
        long_context, sequence_parallel, host_memory, sums_device, clip_groups, privacy,
    )  # fmt: skip
    size = predictor.best_batch_size() if batch_size == "auto" else batch_size
    return predictor.plan(size, type(model).__name__, optimizer)


def longest(
    model: nn.Module,
    *,
    memory: int | None = None,
    host_memory: int | None = None,
    engine: EngineName = "single",
    world_size: int = 1,
    sequence_parallel: int = 1,
    long_context: bool = True,
    batch_size: int = 1,
    dtype: torch.dtype | str | None = None,
    checkpointing: bool | None = None,
    hardware: str | Hardware | None = None,
    optimizer: OptimizerName | None = "adamw",
    loss_chunk: int | Literal["auto"] | None = "auto",
    sums_device: Literal["cpu"] | None = None,
    clip_groups: ClipGroupsSpec | None = None,
    privacy: PrivacyConfig | None = None,
    most: int = 1 << 24,
) -> Longest:
    """Find the longest text of which a private training step fits, by plans of several lengths.

    The arguments are those of :func:`plan`. The strategy of each length is the one that its plan chooses.

    Args:
        most: no longer text is tried.

    Returns:
        T, a multiple of 1,024, its plan, and what does not fit of the next one.

    Raises:
        ValueError: as :func:`plan`; or 1,024 tokens do not fit.
        UnsupportedModuleError: as :func:`plan`.
    """
    if type(most) is not int or most < STEP:
        raise ValueError(f"most is {most!r}; expected a whole number of tokens >= {STEP}")
    predictor = _predictor(
        model, batch_size, STEP, dtype, checkpointing, memory, engine, world_size, hardware, optimizer, loss_chunk,
        long_context, sequence_parallel, host_memory, sums_device, clip_groups, privacy,
    )  # fmt: skip
    return find_longest(predictor, batch_size, most, type(model).__name__, optimizer)


def _predictor(
    model: nn.Module,
    batch_size: int | Literal["auto"],
    seq_len: int,
    dtype: torch.dtype | str | None,
    checkpointing: bool | None,
    memory: int | None,
    engine: EngineName,
    world_size: int,
    hardware: str | Hardware | None,
    optimizer: OptimizerName | None,
    loss_chunk: int | Literal["auto"] | None,
    long_context: bool,
    sequence_parallel: int,
    host_memory: int | None,
    sums_device: Literal["cpu"] | None,
    clip_groups: ClipGroupsSpec | None,
    privacy: PrivacyConfig | None,
) -> Predictor:
    """Of arguments that are checked here."""
    sharding = _checked(model, batch_size, seq_len, memory, engine, world_size)
    sharding = _spread(model, sharding, batch_size, sequence_parallel, host_memory, sums_device)
    if clip_groups is not None and sequence_parallel > 1:
        raise ValueError("clip_groups with sequence_parallel above 1: it clips whole gradients; leave one of them out")
    if optimizer not in (None, *OPTIMIZERS):
        raise ValueError(f"optimizer is {optimizer!r}; expected one of {', '.join(map(repr, OPTIMIZERS))}, or None")
    device = next(p.device for p in model.parameters())
    machine = _machine(hardware, device)
    known = find_long_context(model) is not None
    twin = make_twin(model, _dtype(dtype), checkpointing)
    if known or long_context:
        if checkpointing is False:
            raise ValueError("checkpointing is False; long context is with gradient checkpointing. Leave it None")
        if not known:
            install_on_meta(twin, None if engine == "zero3" else "auto")
        elif engine == "zero3" and (find_long_context(twin) or LongContext()).blocks:
            raise ValueError(
                "blocks run in tiles, which zero3 refuses, as it gathers weights for each call of a layer. Use "
                "dpft.long_context(model, tile_mlp=None), or another engine (fsdp2)"
            )
    if optimizer is not None:
        for p in twin.parameters():
            if p.dtype.itemsize < 4 and p.is_floating_point():
                p.grad_dtype = torch.float32
    limit = memory
    if limit is None:
        limit = machine.memory if device.type == "meta" or isinstance(hardware, str) else _whole_memory(model, device)
    if loss_chunk == "auto":  # as on the planned device, not on meta
        loss_chunk = auto_chunk(torch.device("cuda" if machine.asynchronous else "cpu"))
    resting = resting_bytes(twin, sharding, optimizer)
    host = host_bytes(twin, sharding, optimizer, machine.asynchronous)
    noise = None if privacy is None else noise_cost(twin, sharding, machine, privacy)
    if noise is not None and noise.kept_bytes:
        (host if noise.on_host else resting)[EARLIER] = noise.kept_bytes
    return Predictor(
        twin,
        seq_len,
        sharding,
        machine,
        limit,
        resting,
        loss_chunk,
        host=host,
        host_memory=host_memory,
        by_shapes=long_context and not known and device.type == "meta",
        clip_groups=clip_groups,
        noise=noise,
    )


def _spread(
    model: nn.Module, sharding: Sharding, batch_size: Any, ranks: Any, host_memory: Any, sums_device: Any
) -> Sharding:
    """With what is spread and offloaded, after checks."""
    if type(ranks) is not int or ranks < 1:
        raise ValueError(f"sequence_parallel is {ranks!r}; expected a whole number >= 1")
    if host_memory is not None and (type(host_memory) is not int or host_memory < 1):
        raise ValueError(f"host_memory is {host_memory!r}; expected bytes, a whole number >= 1, or None")
    if sums_device not in (None, "cpu"):
        raise ValueError(f"sums_device is {sums_device!r}; expected None or 'cpu'")
    if sums_device is not None and sharding.engine != "single":
        raise ValueError(f"sums_device='cpu' is of one process, and the engine is {sharding.engine!r}; leave it None")
    if ranks > 1:
        if sharding.engine not in ("fsdp2", "zero1", "zero2", "zero3"):
            raise ValueError(
                f"sequence_parallel is {ranks} and engine {sharding.engine!r}; expected fsdp2, zero1, zero2 or zero3"
            )
        if sharding.world_size % ranks:
            raise ValueError(f"sequence_parallel is {ranks}; expected a divisor of world_size {sharding.world_size}")
        if batch_size != 1:
            raise ValueError(f"batch_size is {batch_size!r}; expected 1 under sequence parallelism")
        config: Any = getattr(model, "config", None)
        text = getattr(config, "get_text_config", lambda: config)()
        heads: Any = getattr(text, "num_attention_heads", None)
        kv_heads: Any = getattr(text, "num_key_value_heads", None) or heads
        if isinstance(heads, int) and (heads % ranks or (kv_heads % ranks and ranks % kv_heads)):
            raise ValueError(
                f"sequence_parallel is {ranks}, and the model has {heads} heads and {kv_heads} of keys: Ulysses "
                "gives each rank as many. Expected a divisor of the heads, and of those of keys or a multiple of them"
            )
    return replace(sharding, sequence=ranks, sums_on_host=sums_device == "cpu")


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
            stacklevel=4,
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
