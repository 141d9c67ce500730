"""The DeepSpeed configuration that dpft accepts. A setting that is not known here is refused, whatever its value.

Gradients do not go through DeepSpeed's hooks, so many settings that would void the guarantee elsewhere only act on
zeros here. They are refused all the same: a configuration must not state what the run does not do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dpft.errors import EngineError

# Settings that change no example, no gradient and no parameter that an optimiser steps on.
_FREE = {
    "activation_checkpointing",  # only of deepspeed.checkpointing, which no model here calls
    "aio",
    "checkpoint",
    "comet",
    "comms_logger",
    "csv_monitor",
    "disable_python_gc",
    "dump_state",
    "flops_profiler",
    "gradient_allreduce_op",  # this and the next two: of a reduction that only sees zeros
    "gradient_predivide_factor",
    "prescale_gradients",
    "log_level",
    "memory_breakdown",
    "seq_parallel_communication_data_type",  # nothing is sequence parallel
    "steps_per_print",
    "tensorboard",
    "timers",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "vocabulary_size",
    "wall_clock_breakdown",
    "wandb",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
}
_FREE_ZERO = {
    "allgather_bucket_size",
    "allgather_partitions",
    "compute_grad_norm",
    "contiguous_gradients",
    "enable_sanity_checks",
    "load_from_fp32_weights",
    "log_trace_cache_warnings",
    "memory_efficient_linear",
    "overlap_comm",
    "override_module_apply",
    "pipeline_loading_checkpoint",
    "reduce_bucket_size",
    "reduce_scatter",
    "stage",
    "sub_group_size",
    "use_multi_rank_bucket_allreduce",
    *(
        prefix + name
        for prefix in ("", "stage3_")
        for name in (
            "allgather_sequential",
            "gather_16bit_weights_on_model_save",
            "gather_fp16_weights_on_model_save",
            "max_live_parameters",
            "max_reuse_distance",
            "model_persistence_threshold",
            "module_granularity_threshold",
            "param_persistence_threshold",
            "prefetch_bucket_size",
            "use_all_reduce_for_fetch_params",
        )
    ),
}
_FREE_OFFLOAD = {
    "buffer_count",
    "buffer_size",
    "cpuadam_cores_perc",
    "fast_init",
    "max_in_cpu",
    "nvme_path",  # of a device that is not nvme
    "pin_memory",
    "pipeline_read",
    "pipeline_write",
}

# Without it ZeRO-3 gathers the mixtures of experts of three families as a whole, and reduces what is not there.
NO_LEAF_MODULES: dict[str, list[str]] = {"classes": [], "names": [], "name_suffixes": []}

# Settings with their allowed values, of which the first is the one to use, and what another value would do.
_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "gradient_accumulation_steps": (
        (1, "auto"),
        "the loader cuts a logical batch into physical ones by itself (max_physical_batch_size)",
    ),
    "managed_gradient_accumulation": ((True,), "DeepSpeed must step where Accelerate says that a logical batch ends"),
    "gradient_clipping": (
        (0.0, "auto", None),
        "each example is clipped already; clipping their sum before noise is added only weakens the signal",
    ),
    "communication_data_type": (
        ("fp32", "float32", "torch.float32", "bf16", "bfloat16", "torch.bfloat16", "auto", None),
        "clipped sums are added up over ranks in float32",
    ),
    "sparse_gradients": ((False,), "clipped sums are dense"),
    "dataloader_drop_last": ((False,), "dropping examples changes the sampling that the accountant assumes"),
    "disable_allgather": ((False,), "ranks would go on with different parameters"),
}
_ONLY_ZERO: dict[str, tuple[tuple[Any, ...], str]] = {
    "zero_quantized_gradients": ((False,), "clipped sums are added up over ranks in float32, not quantised"),
    "zero_quantized_weights": ((False,), "the gradient would be one of quantised weights"),
    "zero_quantized_nontrainable_weights": ((False,), "frozen weights would be stored quantised"),
    "zero_hpz_partition_size": ((1,), "parameters must be sharded over all ranks"),
    "zenflow": ((None,), "ZenFlow steps on a part of the gradient now and on the rest later"),
    "legacy_stage1": ((False,), "dpft knows the present ZeRO-1"),
    "elastic_checkpoint": ((False,), "dpft knows the present layout of ZeRO's checkpoints"),
    "ignore_unused_parameters": ((True,), "no parameter gets a gradient through DeepSpeed's hooks"),
    "parameter_alignment": ((False,), "it is not tested with dpft"),
    "round_robin_gradients": ((False,), "it is not tested with dpft"),
    "save_muon_momentum_buffer_in_memory": ((False,), "Muon is not supported"),
    "cpu_offload": ((False, None), "it is deprecated: set zero_optimization.offload_optimizer.device to 'cpu'"),
    "cpu_offload_param": ((False, None), "parameters outside of the device's memory are not tested with dpft"),
    "cpu_offload_use_pin_memory": ((False, None), "it is deprecated: set pin_memory of offload_optimizer"),
    "leaf_module": (({}, None, NO_LEAF_MODULES), "a module gathered as a whole reduces in every traversal of a graph"),
}
_ONLY_OFFLOAD: dict[str, tuple[tuple[Any, ...], str]] = {
    "device": (("cpu", "none", "auto", None), "offloading to NVMe is not tested with dpft"),
    "ratio": ((1.0,), "a second optimiser (backup_optimizer) would step on the rest, without noise"),
    "super_offload": ((False,), "SuperOffload steps in other processes, where no noise is added"),
}

_ONLY_OFFLOAD_PARAM: dict[str, tuple[tuple[Any, ...], str]] = {
    "device": (("none", "auto", None), "parameters outside of the device's memory are not tested with dpft"),
}

# Sections that must be switched off, and why.
_OFF = {
    "amp": "Apex is not supported; use bf16",
    "autotuning": "it trains on the data to choose a configuration, and nothing counts those steps",
    "compression_training": "the gradient would be one of compressed weights",
    "curriculum_learning": "it changes which tokens are seen; lengths come from the dataset and collate_fn",
    "data_efficiency": "it changes which data are seen; the loader's Poisson samples are what is accounted for",
    "eigenvalue": "it computes a statistic of the private data that is not accounted for",
    "elasticity": "it changes the number of processes and the batch size while training",
    "expert_parallel": "a layer that routes tokens to experts mixes examples",
    "hybrid_engine": "it is not tested with dpft",
    "msamp": "fp8 gradients are not exact",
    "optimizer": "pass the optimiser to dpft.prepare; DeepSpeed would make another one",
    "pipeline": "a rank would not see whole examples",
    "progressive_layer_drop": "dropping layers at random makes another gradient in a second forward",
    "quantize_training": "the gradient would be one of quantised weights",
    "scheduler": "make the learning rate schedule in the script, on the optimiser that dpft.prepare returned",
    "torch_autocast": "use bf16, or Accelerate's mixed_precision",
    "weight_quantization": "the gradient would be one of quantised weights",
}


def check_config(config: dict[str, Any]) -> None:
    """Refuse a DeepSpeed configuration in which the private gradient would not be exact.

    Args:
        config: of the selected plugin, with the values that Accelerate filled in.

    Raises:
        EngineError: names the setting and the value to use.
    """
    zero = _section(config.get("zero_optimization"))
    stage = zero.get("stage", 0)
    if stage not in (1, 2, 3):
        _refuse("zero_optimization.stage", stage, "1, 2 or 3", "without ZeRO use Accelerate's MULTI_GPU instead")
    handled: dict[str, Callable[[Any], None]] = {
        "zero_optimization": lambda _: None,
        "fp16": _check_fp16,
        "bf16": lambda section: _check_bf16("bf16", section),
        "bfloat16": lambda section: _check_bf16("bfloat16", section),
        "compile": lambda section: _only("compile.", section, {"deepcompile": ((False,), "it replaces hooks")}, None),
        "data_types": lambda section: _check_data_types(section, stage),
        "tensor_parallel": _check_tensor_parallel,
        "sequence_parallel_size": _check_sequence_parallel,
    }
    rest = {}
    for name, value in config.items():
        if name in handled:
            handled[name](value)
        elif name in _OFF:
            if not _is_off(value):
                _refuse(name, value, "nothing: remove it", _OFF[name])
        else:
            rest[name] = value
    _only("", rest, _ONLY, _FREE)
    offloads = ("offload_optimizer", "offload_param")
    _only("zero_optimization.", {k: v for k, v in zero.items() if k not in offloads}, _ONLY_ZERO, _FREE_ZERO)
    for name, only in zip(offloads, (_ONLY_OFFLOAD, _ONLY_OFFLOAD | _ONLY_OFFLOAD_PARAM), strict=True):
        _only(f"zero_optimization.{name}.", _section(zero.get(name)), only, _FREE_OFFLOAD)


def check_engine(engine: Any, stage: int, world: int) -> None:
    """Refuse a DeepSpeed engine that does not match the configuration that was checked.

    Args:
        engine: ``deepspeed.DeepSpeedEngine``, before its first forward.
        stage: of ZeRO.
        world: number of processes.

    Raises:
        EngineError: names what was found and what was expected.
    """
    zero = engine.optimizer
    expected = "DeepSpeedZeroOptimizer_Stage3" if stage == 3 else "DeepSpeedZeroOptimizer"
    facts = {
        "zero_optimization.stage": (int(engine.zero_optimization_stage()), stage),
        "gradient_clipping": (float(engine.gradient_clipping()), 0.0),
        "gradient_accumulation_steps": (engine.gradient_accumulation_steps(), 1),
        "fp16.enabled": (bool(engine.fp16_enabled()), False),
        "the optimiser": (type(zero).__name__, expected),
        "the loss scale": (float(getattr(zero, "loss_scale", 1.0)), 1.0),
        "the optimiser's clip_grad": (float(getattr(zero, "clip_grad", 0.0) or 0.0), 0.0),
        "the number of ranks that share the parameters": (int(engine.seq_dp_world_size), world),
        "training_dataloader": (engine.training_dataloader, None),
        "lr_scheduler": (engine.lr_scheduler, None),
        "the leaf modules": ([n for n, m in engine.module.named_modules() if getattr(m, "_z3_leaf", False)], []),
    }
    for name, (found, wanted) in facts.items():
        if found != wanted:
            raise EngineError(
                f"in the DeepSpeed engine {name} is {found!r}; expected {wanted!r}. Set it in the DeepSpeed "
                "configuration; dpft knows deepspeed 0.19."
            )


def replaces_optimizer(config: dict[str, Any]) -> bool:
    """Whether Accelerate replaces the user's optimiser by DeepSpeed's own Adam."""
    return offloads_optimizer(config) and bool(config.get("zero_force_ds_cpu_optimizer", True))


def offloads_optimizer(config: dict[str, Any]) -> bool:
    """Whether the optimiser, and with it the sums, are in host memory."""
    device = _section(_section(config.get("zero_optimization")).get("offload_optimizer")).get("device", "none")
    return device not in ("none", None)


def _section(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_off(value: Any) -> bool:
    if isinstance(value, dict):
        return not value or value.get("enabled") is False
    return value in (None, False)


def _same(value: Any, allowed: Any) -> bool:
    # True == 1 and 0 == False, and a file may well say 1 where it means true.
    return bool(value == allowed)


def _only(prefix: str, section: Any, only: dict[str, tuple[tuple[Any, ...], str]], free: set[str] | None) -> None:
    for name, value in _section(section).items():
        if name in only:
            allowed, why = only[name]
            if not any(_same(value, each) for each in allowed):
                _refuse(prefix + name, value, repr(allowed[0]), why)
        elif free is not None and name not in free:
            _refuse(prefix + name, value, "nothing: remove it", "dpft does not know this setting of DeepSpeed 0.19")


def _check_fp16(section: Any) -> None:
    if not _is_off(section) and _section(section).get("enabled", False) is not False:
        _refuse("fp16.enabled", section, "false", "its loss scaling skips steps depending on the data; use bf16")


def _check_bf16(name: str, section: Any) -> None:
    only: dict[str, tuple[tuple[Any, ...], str]] = {
        "bf16_master_weights_and_grads": ((False,), "noise must be added in float32"),
        "bf16_optimizer_states": ((False,), "noise must be added in float32"),
    }
    _only(f"{name}.", section, only, {"enabled", "immediate_grad_update", "check_grad_overflow"})


def _check_data_types(section: Any, stage: int) -> None:
    allowed: tuple[Any, ...] = (None, "fp32", "float32") if stage > 1 else (None,)
    why = "clipped sums are float32 without it" + (", and with it ZeRO-1 uses another optimiser" if stage == 1 else "")
    _only("data_types.", section, {"grad_accum_dtype": (allowed, why)}, set())


def _check_tensor_parallel(section: Any) -> None:
    if _section(section) != {} and section not in ({"autotp_size": 0}, {"autotp_size": 1}):
        _refuse("tensor_parallel", section, "nothing: remove it", "norms do not add up over parts of one example")


def _check_sequence_parallel(value: Any) -> None:
    if value not in (None, 1):
        _refuse("sequence_parallel_size", value, "1", "norms do not add up over parts of one example")


def _refuse(name: str, value: Any, use: str, why: str) -> None:
    raise EngineError(f"DeepSpeed's {name} is {value!r}; use {use}: {why}.")
