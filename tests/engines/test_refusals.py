"""What is refused before the first parameter moves: each test does one wrong thing and sees the error that names it.

Settings, given to `dpft.prepare` in one process as Accelerate's own classes; with two ranks: `test_refusals_ranks.py`.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import (
    DDPCommunicationHookType,
    DeepSpeedPlugin,
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
)
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

import dpft
from accelerate import DataLoaderConfiguration, DistributedDataParallelKwargs
from dpft.engines import requirements
from dpft.errors import EngineError
from tests import zoo
from tests.training import Training, new_accelerator, tiny_llama


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate's plugins write into the environment; nothing of it may reach another test."""
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def pretended(kind: DistributedType = DistributedType.NO, **changes: Any) -> Any:
    """What `dpft.prepare` asks of an Accelerator before it touches anything."""
    state = {"dynamo_plugin": None, "parallelism_config": None, "megatron_lm_plugin": None}
    values = {
        "device": torch.device("cpu"),
        "num_processes": 1,
        "distributed_type": kind,
        "mixed_precision": "no",
        "gradient_accumulation_steps": 1,
        "dataloader_config": DataLoaderConfiguration(),
        "ddp_handler": None,
        "has_fp8_handler": False,
    }
    for name, value in changes.items():
        (values if name in values else state)[name] = value
    return SimpleNamespace(**values, state=SimpleNamespace(**state))


def deepspeed(**changes: Any) -> Any:
    """An accelerator with a DeepSpeed configuration file; ``zero__x`` sets ``zero_optimization.x``."""
    section: dict[str, Any] = {"stage": 2}
    settings: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": section}
    for name, value in changes.items():
        (section if name.startswith("zero__") else settings)[name.removeprefix("zero__")] = value
    plugin = DeepSpeedPlugin(hf_ds_config=settings)
    plugin.set_mixed_precision("no")
    return pretended(DistributedType.DEEPSPEED, deepspeed_plugin=plugin)


def fsdp(**changes: Any) -> Any:
    plugin = FullyShardedDataParallelPlugin(**{"fsdp_version": 2, **changes})
    return pretended(DistributedType.FSDP, fsdp_plugin=plugin)


def refused(accelerator: Any, path: Path, match: str, **options: Any) -> None:
    """`dpft.prepare` raises, and has touched neither the model nor the disk."""
    model = options.pop("model", None)
    model = tiny_llama() if model is None else model
    before = [p.detach().clone() for p in model.parameters()]
    options.setdefault("make", None)
    with pytest.raises(EngineError, match=match):
        Training(path, accelerator=accelerator, model=model, **options)
    assert not path.exists()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    with pytest.raises(dpft.WrapError):
        dpft.unwrap(model)


# --- DeepSpeed ------------------------------------------------------------------------------------------------------

WRONG_DEEPSPEED: dict[str, dict[str, Any]] = {
    "gradient_clipping": {"gradient_clipping": 1.0},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 2},
    "managed_gradient_accumulation": {"managed_gradient_accumulation": False},
    "fp16.enabled": {"fp16": {"enabled": True}},
    "bf16_master_weights_and_grads": {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
    "bf16_optimizer_states": {"bf16": {"enabled": True, "bf16_optimizer_states": True}},
    "torch_autocast": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    "communication_data_type": {"communication_data_type": "fp16"},
    "sparse_gradients": {"sparse_gradients": True},
    "dataloader_drop_last": {"dataloader_drop_last": True},
    "data_types.grad_accum_dtype": {"data_types": {"grad_accum_dtype": "bf16"}},
    "data_types.param_dtype": {"data_types": {"param_dtype": "fp16"}},
    "amp": {"amp": {"enabled": True}},
    "msamp": {"msamp": {"enabled": True, "opt_level": "O1"}},
    "compile.deepcompile": {"compile": {"deepcompile": True}},
    "optimizer": {"optimizer": {"type": "OneBitAdam", "params": {"lr": 1.0}}},
    "scheduler": {"scheduler": {"type": "WarmupLR"}},
    "pipeline": {"pipeline": {"stages": 2}},
    "progressive_layer_drop": {"progressive_layer_drop": {"enabled": True}},
    "curriculum_learning": {"curriculum_learning": {"enabled": True}},
    "data_efficiency": {"data_efficiency": {"enabled": True}},
    "elasticity": {"elasticity": {"enabled": True}},
    "autotuning": {"autotuning": {"enabled": True}},
    "eigenvalue": {"eigenvalue": {"enabled": True}},
    "hybrid_engine": {"hybrid_engine": {"enabled": True}},
    "expert_parallel": {"expert_parallel": {"ep_size": 2}},
    "tensor_parallel": {"tensor_parallel": {"autotp_size": 2}},
    "sequence_parallel_size": {"sequence_parallel_size": 2},
    "compression_training": {"compression_training": {"weight_quantization": {}}},
    "weight_quantization": {"weight_quantization": {"post_init_quant": {}}},
    "zero_optimization.stage": {"zero__stage": 0},
    "zero_quantized_gradients": {"zero__zero_quantized_gradients": True},
    "zero_quantized_weights": {"zero__stage": 3, "zero__zero_quantized_weights": True},
    "zero_quantized_nontrainable_weights": {"zero__stage": 3, "zero__zero_quantized_nontrainable_weights": True},
    "zero_hpz_partition_size": {"zero__stage": 3, "zero__zero_hpz_partition_size": 2},
    "mics_shard_size": {"zero__stage": 3, "zero__mics_shard_size": 2},
    "zenflow": {"zero__zenflow": {"topk_ratio": 0.1}},
    "super_offload": {"zero__stage": 3, "zero__offload_optimizer": {"device": "cpu", "super_offload": True}},
    "offload_optimizer.ratio": {"zero__stage": 3, "zero__offload_optimizer": {"device": "cpu", "ratio": 0.5}},
    "offload_optimizer.device": {"zero__offload_optimizer": {"device": "nvme", "nvme_path": "x"}},
    "offload_param.device": {"zero__stage": 3, "zero__offload_param": {"device": "cpu"}},
    "zero_optimization.cpu_offload": {"zero__cpu_offload": True},
    "ignore_unused_parameters": {"zero__ignore_unused_parameters": False},
    "round_robin_gradients": {"zero__round_robin_gradients": True},
    "leaf_module": {"zero__stage": 3, "zero__leaf_module": {"classes": ["Block"]}},
    "of_next_year": {"of_next_year": False},
    "zero_optimization.of_next_year": {"zero__of_next_year": False},
    "offload_optimizer.of_next_year": {"zero__offload_optimizer": {"device": "cpu", "of_next_year": 1}},
}


@pytest.mark.parametrize("name", WRONG_DEEPSPEED)
def test_deepspeed_settings(tmp_path: Path, name: str) -> None:
    refused(deepspeed(**WRONG_DEEPSPEED[name]), tmp_path / "ledger", name.replace(".", r"\."))


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("clipping", [{}, {"gradient_clipping": "auto"}, {"gradient_clipping": 0.0}])
def test_gradient_clipping_that_nobody_set_is_set_to_zero(stage: int, clipping: dict[str, Any]) -> None:
    """DeepSpeed's default is 1.0, Accelerate fills "auto" with 1.0."""
    accelerator = deepspeed(zero__stage=stage, **clipping)
    assert requirements.check_accelerator(accelerator) == f"zero{stage}"
    assert accelerator.state.deepspeed_plugin.deepspeed_config["gradient_clipping"] == 0.0


def test_gradient_clipping_of_the_ready_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their 0.0 comes through the environment, and Accelerate drops it: DeepSpeed would have clipped at 1.0."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_CLIPPING", "0.0")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    plugin = DeepSpeedPlugin()
    plugin.set_mixed_precision("no")
    assert "gradient_clipping" not in plugin.deepspeed_config
    requirements.check_accelerator(pretended(DistributedType.DEEPSPEED, deepspeed_plugin=plugin))
    assert plugin.deepspeed_config["gradient_clipping"] == 0.0
    monkeypatch.setenv("ACCELERATE_GRADIENT_CLIPPING", "1.0")
    with pytest.raises(EngineError, match="gradient_clipping"):
        requirements.check_accelerator(pretended(DistributedType.DEEPSPEED, deepspeed_plugin=DeepSpeedPlugin()))


def test_settings_that_are_switched_off_are_fine() -> None:
    requirements.check_accelerator(
        deepspeed(
            fp16={"enabled": False, "loss_scale": 0},
            bf16={"enabled": True},
            curriculum_learning={"enabled": False},
            tensor_parallel={"autotp_size": 1},
            compile={"deepcompile": False},
            data_types={"grad_accum_dtype": "fp32"},
            zero__offload_optimizer={"device": "cpu", "pin_memory": True, "ratio": 1},
            zero__zero_quantized_gradients=False,
        )
    )


def engine_of_deepspeed(**changes: Any) -> Any:
    """What `check_engine` asks of an engine that does as its configuration says."""
    zero = type("DeepSpeedZeroOptimizer", (), {"loss_scale": 1.0, "clip_grad": 0.0})()
    values = {
        "zero_optimization_stage": 2,
        "gradient_clipping": 0.0,
        "gradient_accumulation_steps": 1,
        "fp16_enabled": False,
    }
    fields = {"optimizer": zero, "seq_dp_world_size": 2, "training_dataloader": None, "lr_scheduler": None}
    fields["module"] = nn.Sequential(nn.Linear(1, 1))
    calls = {name: changes.pop(name, value) for name, value in values.items()}
    return SimpleNamespace(
        **{name: (lambda value=value: value) for name, value in calls.items()}, **{**fields, **changes}
    )


def leaf_module() -> nn.Module:
    """As Accelerate marks one (deepspeed_moe_layer_cls_names)."""
    model = nn.Sequential(nn.Linear(1, 1))
    model[0]._z3_leaf = True  # type: ignore[assignment]  # torch takes every attribute for a module
    return model


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"gradient_clipping": 1.0}, "gradient_clipping"),
        ({"zero_optimization_stage": 1}, "stage"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps"),
        ({"fp16_enabled": True}, "fp16"),
        ({"seq_dp_world_size": 1}, "ranks that share the parameters"),
        ({"lr_scheduler": "WarmupLR"}, "lr_scheduler"),
        ({"training_dataloader": "loader"}, "training_dataloader"),
        ({"optimizer": type("ZenFlowZeroOptimizer", (), {})()}, "ZenFlowZeroOptimizer"),
        ({"optimizer": type("DeepSpeedZeroOptimizer", (), {"loss_scale": 65536.0})()}, "loss scale"),
        ({"optimizer": type("DeepSpeedZeroOptimizer", (), {"clip_grad": 1.0})()}, "clip_grad"),
        ({"module": leaf_module()}, "leaf modules"),
    ],
)
def test_a_deepspeed_engine_that_is_not_what_was_asked_for(change: dict[str, Any], match: str) -> None:
    accelerator = pretended(DistributedType.DEEPSPEED, num_processes=2)
    requirements.check_prepared(accelerator, "zero2", engine_of_deepspeed())
    with pytest.raises(EngineError, match=match):
        requirements.check_prepared(accelerator, "zero2", engine_of_deepspeed(**change))


@pytest.mark.parametrize("name", ["SGD", "RMSprop"])
def test_an_optimiser_that_offloading_would_swap(tmp_path: Path, name: str) -> None:
    make = getattr(torch.optim, name)
    offload: dict[str, Any] = {"zero__offload_optimizer": {"device": "cpu"}}
    refused(deepspeed(**offload), tmp_path / "ledger", f"replaces {name} by", make=lambda ps: make(ps, lr=1.0))
    model = tiny_llama()
    for accelerator, optimizer in (
        (deepspeed(**offload), torch.optim.AdamW(model.parameters())),
        (deepspeed(zero_force_ds_cpu_optimizer=False, **offload), make(model.parameters(), lr=1.0)),
    ):
        requirements.check_model(accelerator, "zero2", model, optimizer)


def test_experts_that_zero3_cannot_follow() -> None:
    model: Any = zoo.seeded(zoo.qwen3_moe)()
    accelerator, optimizer = deepspeed(), torch.optim.AdamW(model.parameters())
    requirements.check_model(accelerator, "zero2", model, optimizer)
    with pytest.raises(EngineError, match="experts_implementation='eager'"):
        requirements.check_model(accelerator, "zero3", model, optimizer)
    model.set_experts_implementation("grouped_mm")
    requirements.check_model(accelerator, "zero3", model, optimizer)


# --- FSDP, and what Accelerate does in all engines ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"fsdp_version": 1}, "fsdp_version"),
        ({"ignored_modules": "lm_head"}, "ignored_modules"),
        ({"activation_checkpointing": True}, "activation_checkpointing"),
        ({"mixed_precision_policy": MixedPrecisionPolicy(param_dtype=torch.float16)}, "param_dtype"),
        ({"mixed_precision_policy": MixedPrecisionPolicy(output_dtype=torch.float16)}, "output_dtype"),
    ],
)
def test_fsdp_settings(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    refused(fsdp(**changes), tmp_path / "ledger", match)


def test_fsdp_without_them_is_fine() -> None:
    """reduce_dtype is of a reduction that clipped sums do not take: they are added up in float32 whatever it says."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    assert requirements.check_accelerator(fsdp(mixed_precision_policy=policy)) == "fsdp2"


LOADING = DataLoaderConfiguration
COMPRESSED = DistributedDataParallelKwargs(comm_hook=DDPCommunicationHookType.POWER_SGD)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"mixed_precision": "fp16"}, "fp16"),
        ({"mixed_precision": "fp8"}, "fp8"),
        ({"has_fp8_handler": True}, "fp8"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps"),
        ({"dataloader_config": LOADING(split_batches=True)}, "split_batches"),
        ({"dataloader_config": LOADING(dispatch_batches=True)}, "dispatch_batches"),
        ({"dataloader_config": LOADING(even_batches=False)}, "even_batches"),
        ({"ddp_handler": COMPRESSED}, "comm_hook"),
        ({"parallelism_config": ParallelismConfig(tp_size=2)}, "tp_size"),
        ({"parallelism_config": ParallelismConfig(cp_size=2)}, "cp_size"),
        ({"parallelism_config": ParallelismConfig(sp_size=2)}, "sp_size"),
        ({"distributed_type": DistributedType.MEGATRON_LM}, "MEGATRON_LM"),
        ({"distributed_type": DistributedType.XLA}, "XLA"),
        ({"megatron_lm_plugin": object()}, "Megatron"),
        ({"num_processes": 2}, "2"),
    ],
)
def test_settings_of_accelerate(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    refused(pretended(**changes), tmp_path / "ledger", match)


def test_an_engine_that_accelerate_did_not_make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`use_cpu` with FSDP: two processes that shard nothing."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for variable in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.setenv(variable, "true")
        refused(pretended(DistributedType.MULTI_CPU, num_processes=2), tmp_path / "ledger", "nothing would be sharded")
        monkeypatch.delenv(variable)
    refused(pretended(), tmp_path / "ledger", "2 processes")


def test_accumulation_that_a_plugin_sets(tmp_path: Path) -> None:
    accelerator = new_accelerator(gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=2))
    refused(accelerator, tmp_path / "ledger", "gradient_accumulation_steps")


def test_a_compiling_backend(tmp_path: Path) -> None:
    accelerator = new_accelerator(dynamo_backend="eager")
    refused(accelerator, tmp_path / "ledger", "dynamo_backend")
    new_accelerator()


# --- tokens of an example spread over ranks -------------------------------------------------------------------------


def spread(world: int = 4, sp: int = 2, shard: int = 2, **handler: Any) -> Any:
    """ZeRO-2 on ``world`` processes with ``sp_size``; Accelerate's own check of the numbers needs a launch."""
    config = ParallelismConfig(sp_size=sp, dp_shard_size=shard)
    for name, value in handler.items():
        setattr(config.sp_handler, name, value)
    accelerator = deepspeed()
    accelerator.num_processes, accelerator.state.parallelism_config = world, config
    return accelerator


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"sp": 3}, "divisor of the 4 processes"),
        ({"shard": 1}, r"dp_replicate_size x dp_shard_size = 1; expected 2"),
        ({"sp_seq_length_is_variable": False}, "sp_seq_length_is_variable is false"),
    ],
)
def test_a_spread_that_does_not_fit_the_processes(
    changes: dict[str, Any], match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert requirements.check_accelerator(spread()) == "zero2"
    with pytest.raises(EngineError, match=match):
        requirements.check_accelerator(spread(**changes))


def test_models_whose_tokens_cannot_be_split() -> None:
    def check(model: Any, **handler: Any) -> None:
        requirements.check_model(spread(**handler), "zero2", model, torch.optim.SGD(model.parameters(), lr=1.0))

    check(zoo.seeded(zoo.llama)("sdpa"))
    check(zoo.seeded(zoo.llama)("sdpa"), sp_attn_implementation="sdpa")
    check(dpft.long_context(zoo.seeded(zoo.llama)("sdpa")), sp_attn_implementation="sdpa")
    for model, handler, match in (
        (zoo.seeded(zoo.llama)("eager"), {}, "attention is 'eager'"),
        (zoo.seeded(zoo.llama)("sdpa"), {"sp_attn_implementation": "flash_attention_2"}, "'flash_attention_2' and"),
        (dpft.long_context(zoo.seeded(zoo.llama)("sdpa")), {"sp_attn_implementation": "flash_attention_2"}, "2' and"),
        (zoo.seeded(zoo.gemma3)("sdpa"), {}, "sliding_attention"),
        (zoo.seeded(zoo.hybrid)("sdpa"), {}, "linear_attention"),
        (zoo.seeded(zoo.bert)("sdpa"), {}, "needs a causal LM"),
    ):
        with pytest.raises(EngineError, match=match):
            check(model, **handler)


def test_a_spread_is_of_one_example_in_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    for options in ({"max_physical_batch_size": 2}, {"strategy": "two_pass"}, {"clipping": "ghost"}):
        refused(spread(), tmp_path / "ledger", "a backward is one-pass, of one example", **options)
