"""Requirements on Accelerate's configuration, the model and the optimiser, under which private gradients are exact.

Everything that would void the guarantee is refused before the first parameter changes. In the order of a training:
:func:`check_accelerator` and :func:`check_model` before anything is modified, :func:`check_prepared` once the engine
exists, :func:`watch` before each step.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dpft.adamw_bc import AdamWBC
from dpft.engines import deepspeed_config
from dpft.engines.engine import Kind, kind_of
from dpft.engines.sequence import sequence_size
from dpft.errors import EngineError
from dpft.models.causal_lm import find_causal_lm
from dpft.rules.experts import match_experts, runs_eagerly
from dpft.wrap import LONG_CONTEXT

_TYPES = ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP", "DEEPSPEED")  # of accelerate.utils.DistributedType
_WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")
# Optimisers whose steps DeepSpeed's own CPU optimiser computes too.
_OFFLOADED = ("Adam", "AdamW", "DeepSpeedCPUAdam", "DeepSpeedCPULion", "DeepSpeedCPUAdagrad")


def check_accelerator(accelerator: Any) -> Kind:
    """Refuse every configuration in which the private gradient would not be exact.

    DeepSpeed's ``gradient_clipping`` is 1.0 unless it is set (and Accelerate drops a 0.0); here it is set to 0.

    Args:
        accelerator: an ``accelerate.Accelerator``.

    Returns:
        The engine that it was launched with.

    Raises:
        EngineError: names the setting and the value to use.
    """
    # Here, so that `import dpft` does without Accelerate.
    from accelerate.utils import DDPCommunicationHookType, DistributedType, DynamoBackend

    _check_launch(accelerator)
    if accelerator.mixed_precision == "fp16":
        raise EngineError(
            "mixed_precision is 'fp16', whose loss scaling skips steps depending on the data. Use 'bf16' or 'no'."
        )
    if accelerator.mixed_precision not in ("no", "bf16") or getattr(accelerator, "has_fp8_handler", False):
        raise EngineError(
            f"mixed_precision is {accelerator.mixed_precision!r}"
            + (" with an fp8 recipe" if getattr(accelerator, "has_fp8_handler", False) else "")
            + ": gradients of fp8 layers are not the ones that dpft clips. Use 'bf16' or 'no', and no fp8 recipe."
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
    _check_loading(accelerator)
    _check_parallelism(accelerator)
    hook = getattr(getattr(accelerator, "ddp_handler", None), "comm_hook", DDPCommunicationHookType.NO)
    if hook != DDPCommunicationHookType.NO:
        raise EngineError(
            f"DistributedDataParallelKwargs.comm_hook is {hook}; expected DDPCommunicationHookType.NO: clipped sums "
            "are added up over ranks in float32, without compression."
        )
    if accelerator.distributed_type == DistributedType.FSDP:
        _check_fsdp(accelerator.state.fsdp_plugin)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        if getattr(accelerator, "deepspeed_engine_wrapped", None) is not None:
            raise EngineError(
                "this Accelerator has prepared a model under DeepSpeed already, and its backward is bound to that "
                "one. Call dpft.prepare once in a process."
            )
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        deepspeed_config.check_config(config)
        config["gradient_clipping"] = 0.0
    return kind_of(accelerator)


def _check_launch(accelerator: Any) -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if dist.is_available() and dist.is_initialized():
        world = max(world, dist.get_world_size())
    if accelerator.num_processes != world:
        raise EngineError(
            f"the launcher started {world} processes and Accelerate sees {accelerator.num_processes}: every process "
            "would train alone on the same data. Launch with a configuration that Accelerate supports on this device."
        )
    from accelerate.utils import DistributedType

    given = accelerator.distributed_type
    if given not in [DistributedType(name) for name in _TYPES]:
        raise EngineError(
            f"distributed_type is {given.value!r}; expected one of {list(_TYPES)}. Choose one of "
            "the configurations in recipes/accelerate."
        )
    for variable, wanted in (
        ("ACCELERATE_USE_FSDP", DistributedType.FSDP),
        ("ACCELERATE_USE_DEEPSPEED", DistributedType.DEEPSPEED),
    ):
        if world > 1 and given != wanted and os.environ.get(variable, "false").lower() == "true":
            raise EngineError(
                f"the configuration asks for {wanted.value} and Accelerate chose {given.value} on this device "
                "(use_cpu?): nothing would be sharded. Launch with a configuration that it supports here."
            )


def _check_loading(accelerator: Any) -> None:
    for name, default in (("split_batches", (False,)), ("dispatch_batches", (None, False)), ("even_batches", (True,))):
        value = getattr(accelerator.dataloader_config, name)
        if value not in default:
            raise EngineError(
                f"DataLoaderConfiguration.{name} is {value!r}; expected {default[0]!r}: the loader of dpft.prepare "
                "gives each rank its own part of a Poisson sample, and Accelerate must not change it."
            )


def _check_parallelism(accelerator: Any) -> None:
    config: Any = getattr(accelerator.state, "parallelism_config", None)
    if (getattr(config, "tp_size", 1) or 1) != 1:
        raise EngineError(
            f"ParallelismConfig.tp_size is {config.tp_size}; expected 1: under tensor parallelism no rank has a whole "
            "layer's gradient, and it has not been shown that the norms would be exact."
        )
    if (getattr(config, "cp_size", 1) or 1) != 1:
        raise EngineError(
            f"ParallelismConfig.cp_size is {config.cp_size}; expected 1: torch's ring attention runs on GPUs alone, "
            "where dpft has not been tested with it. Use sp_size (Ulysses), which splits the same tokens."
        )
    if (size := sequence_size(accelerator)) != 1:
        _check_sequence(accelerator, config, size)
    if getattr(accelerator.state, "megatron_lm_plugin", None) is not None:
        raise EngineError("Megatron-LM is not supported. Use FSDP version 2 or DeepSpeed ZeRO.")


def _check_sequence(accelerator: Any, config: Any, size: int) -> None:
    from accelerate.utils import DistributedType

    world, kind = accelerator.num_processes, accelerator.distributed_type
    if kind not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise EngineError(
            f"ParallelismConfig.sp_size is {size} with distributed_type {kind.value}; expected FSDP or DEEPSPEED. "
            "Launch with recipes/accelerate/sp2_zero3.yaml or sp2_fsdp2.yaml."
        )
    if world % size:
        raise EngineError(f"ParallelismConfig.sp_size is {size}; expected a divisor of the {world} processes.")
    if kind == DistributedType.DEEPSPEED and config.data_parallel_size != world // size:
        raise EngineError(
            f"ParallelismConfig has dp_replicate_size x dp_shard_size = {config.data_parallel_size}; expected "
            f"{world // size}: {world} processes, {size} for each sequence. Set dp_shard_size."
        )
    if not config.sp_handler.sp_seq_length_is_variable:
        raise EngineError("sp_seq_length_is_variable is false; expected true: examples have lengths of their own.")


def _check_fsdp(plugin: Any) -> None:
    if plugin.fsdp_version != 2:
        raise EngineError(f"fsdp_version is {plugin.fsdp_version}; expected 2. Set fsdp_config.fsdp_version to 2.")
    if plugin.ignored_modules:
        raise EngineError(
            f"fsdp_ignored_modules is {plugin.ignored_modules!r}; expected none: dpft has no clipped "
            "sum for a parameter that FSDP2 does not shard. Freeze what is not to be trained instead."
        )
    if plugin.activation_checkpointing:
        raise EngineError(
            "fsdp_activation_checkpointing is true; use false: Accelerate's does not restore the random state, "
            "so a recomputed forward has another dropout mask. Call model.gradient_checkpointing_enable() instead."
        )
    policy = plugin.mixed_precision_policy
    for name in ("param_dtype", "output_dtype"):  # reduce_dtype is of a reduction that dpft does not use
        if getattr(policy, name, None) not in (None, torch.float32, torch.bfloat16):
            raise EngineError(
                f"the mixed precision policy's {name} is {getattr(policy, name)}; use torch.bfloat16 or torch.float32."
            )


def check_model(accelerator: Any, kind: Kind, model: nn.Module, optimizer: Any) -> None:
    """Refuse a model or an optimiser with which private gradients would not be exact.

    Args:
        accelerator: as :func:`check_accelerator` left it.
        kind: what that returned.
        model: neither wrapped nor prepared.
        optimizer: the user's.

    Raises:
        EngineError: names what to change.
    """
    _check_bare(model)
    wrapped = "_dpft_state" in model.__dict__  # those hooks are dpft's own, and dpft.wrap will refuse the model
    for name, p in model.named_parameters():
        given: Any = p
        if p.dtype == torch.float16:
            raise EngineError(f"{name!r} is torch.float16, whose gradients overflow. Load the model in bfloat16.")
        if hasattr(given, "placements"):
            raise EngineError(
                f"{name!r} is sharded already ({given.placements}): by tensor parallelism (tp_plan), or by "
                "fully_shard. Load the model without tp_plan, and leave sharding to dpft.prepare."
            )
        hooks = getattr(p, "_backward_hooks", None) or getattr(p, "_post_accumulate_grad_hooks", None)
        if p.requires_grad and hooks and not wrapped:
            raise EngineError(
                f"{name!r} has a gradient hook (your own, or that of an optimiser that steps inside the backward, "
                "such as LOMO or a layer-wise one): it would see or change the clipped sum before noise is added. "
                "Remove it."
            )
    for name, module in model.named_modules():
        if kind == "zero3" and match_experts(module) and runs_eagerly(module):
            raise EngineError(
                f"{name!r} runs by experts_implementation='eager', one call per expert that has tokens, and ZeRO-3 "
                "needs the same calls on all ranks. Use model.set_experts_implementation('grouped_mm')."
            )
    kinds = [cls.__name__ for cls in type(optimizer).__mro__]
    if "AcceleratedOptimizer" in kinds:
        raise EngineError("the optimiser is prepared already; pass dpft.prepare the one made with model.parameters().")
    if "DummyOptim" in kinds or "LayerWiseDummyOptimizer" in kinds:
        raise EngineError(f"{kinds[0]} does not step; pass dpft.prepare a torch optimiser on model.parameters().")
    if {"Lomo", "AdaLomo", "SparseAdam"} & set(kinds):
        raise EngineError(f"{kinds[0]} does not step on dense gradients after a backward. Use torch.optim.AdamW.")
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise EngineError(
            f"{kinds[0]}.step needs a closure, which evaluates the gradient more than once; each would be a release. "
            "Use torch.optim.AdamW."
        )
    if sequence_size(accelerator) != 1:
        _check_splittable(accelerator, model)
    if kind.startswith("zero"):
        if isinstance(optimizer, AdamWBC):
            raise EngineError(
                f"AdamWBC under {kind}: DeepSpeed steps on flat partitions, where it was not tried. Use "
                "torch.optim.AdamW, or launch with ddp.yaml or fsdp2.yaml."
            )
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        if deepspeed_config.replaces_optimizer(config) and kinds[0] not in _OFFLOADED:
            raise EngineError(
                f"with offload_optimizer Accelerate replaces {kinds[0]} by DeepSpeedCPUAdam. Use "
                "torch.optim.AdamW, or set zero_force_ds_cpu_optimizer to false in the DeepSpeed configuration."
            )


def _check_splittable(accelerator: Any, model: nn.Module) -> None:
    """Refuse a model whose tokens cannot be split over ranks, as far as its configuration says so."""
    config = getattr(model, "config", None)
    config = getattr(config, "get_text_config", lambda: config)()
    if config is None or find_causal_lm(model) is None:
        raise EngineError("sp_size needs a causal LM of transformers: its losses are those of single tokens.")
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
        kinds = ["full_attention"] if window is None else ["sliding_attention"]
    others = sorted({str(kind) for kind in kinds} - {"full_attention"})
    if others:
        raise EngineError(
            f"the model has layers of {others}: Ulysses drops their masks, so they would attend to everything, and a "
            "recurrent state would start anew on each rank. Train it without sp_size."
        )
    handler = accelerator.state.parallelism_config.sp_handler
    implementation = getattr(config, "_attn_implementation", None)
    if handler.sp_attn_implementation in (None, _attention_before(model, config)):
        handler.sp_attn_implementation = implementation
    if handler.sp_attn_implementation != implementation or implementation in (None, "eager", "flex_attention"):
        raise EngineError(
            f"sp_attn_implementation is {handler.sp_attn_implementation!r} and the model's attention is "
            f"{implementation!r}; expected 'sdpa' or a flash attention for both. Load the model with "
            "attn_implementation='sdpa'."
        )


def _attention_before(model: nn.Module, config: Any) -> str | None:
    """The attention in whose place ``dpft.long_context`` has put its own, which is that one for a single document."""
    installed = [m.__dict__[LONG_CONTEXT] for m in model.modules() if LONG_CONTEXT in m.__dict__]
    return next((name for found in installed for known, name in found.attention if known is config), None)


def _check_bare(model: nn.Module) -> None:
    from accelerate.utils import is_compiled_module

    kinds = [cls.__name__ for cls in type(model).__mro__]
    if any(is_compiled_module(m) or m._compiled_call_impl is not None for m in model.modules()):
        raise EngineError("the model is compiled; torch.compile of a private model is not supported by this version.")
    if any(name in kinds for name in (*_WRAPPERS, "FSDPModule")):
        raise EngineError(
            f"the model is a {kinds[0]}, prepared already; pass dpft.prepare the bare model, and prepare nothing else."
        )
    if (getattr(model, "_tp_size", None) or 1) > 1:
        raise EngineError("the model was loaded with tp_plan: tensor parallelism is not supported. Load it without.")
    places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    if len(places) > 1:
        raise EngineError(
            f"the model was loaded with device_map over {sorted(places)}. Load it without device_map; to spread a "
            "large model use FSDP2 or ZeRO-3."
        )


def check_prepared(accelerator: Any, kind: Kind, prepared: nn.Module) -> None:
    """Refuse an engine that does not do what its configuration was checked for.

    Args:
        accelerator: Accelerate's.
        kind: from :func:`check_accelerator`.
        prepared: what Accelerate made of the model.

    Raises:
        EngineError: names what was found and what was expected.
    """
    if kind.startswith("zero"):
        deepspeed_config.check_engine(prepared, int(kind[-1]), accelerator.num_processes)
    elif kind == "fsdp2":
        from torch.distributed.fsdp import FSDPModule

        if not isinstance(prepared, FSDPModule):
            raise EngineError(
                f"Accelerate prepared the model as a {type(prepared).__name__}, which FSDP2 does not shard. Launch "
                "with recipes/accelerate/fsdp2.yaml."
            )


def watch(kind: Kind, prepared: Any, guarded: torch.optim.Optimizer) -> Callable[[], None]:
    """Make the check that runs before each step: noise is still added between the sums and the parameters.

    Args:
        kind: of the engine.
        prepared: the model that Accelerate made; a DeepSpeed engine has its optimiser.
        guarded: the innermost optimiser, with the step hook that adds noise or refuses.

    Returns:
        A function that raises EngineError if the optimiser was replaced since, or its hook is gone.
    """
    hooks = getattr(guarded, "_optimizer_step_pre_hooks", {})
    before = set(hooks)
    zero = getattr(prepared, "optimizer", None) if kind.startswith("zero") else None

    def check() -> None:
        if zero is not None and (prepared.optimizer is not zero or zero.optimizer is not guarded):
            now = prepared.optimizer if prepared.optimizer is not zero else zero.optimizer
            raise EngineError(
                f"DeepSpeed's optimiser was replaced by a {type(now).__name__} after dpft.prepare; its steps would "
                "have no noise. Make the optimiser before dpft.prepare, and call that once."
            )
        if zero is not None and float(prepared.gradient_clipping()) != 0.0:
            found = prepared.gradient_clipping()
            raise EngineError(f"DeepSpeed's gradient_clipping was set to {found} after dpft.prepare; use 0.")
        if not before <= set(guarded._optimizer_step_pre_hooks):
            raise EngineError(
                "the step hook that adds noise was removed from the optimiser after dpft.prepare. Nothing was "
                "released; do not clear the optimiser's hooks."
            )

    return check
