"""Every adapter of PEFT for causal LMs, on a tiny Llama: what is trained is moved off its zeros and ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from tests import zoo
from tests.models.heads import own_losses

EXAMPLES, TOKENS, VIRTUAL = 3, 9, 3
TARGETS = ["q_proj", "v_proj", "down_proj"]


def batch(**_: Any) -> dict[str, Tensor]:
    """Three rows of different lengths."""
    return zoo.token_batch(EXAMPLES, TOKENS, seed=3)


def of_tasks(**_: Any) -> dict[str, Tensor]:
    """Each row with the number of its task."""
    return batch() | {"task_ids": torch.arange(EXAMPLES) % 2}


def with_invocation(**_: Any) -> dict[str, Tensor]:
    """Each row has the token that turns an activated LoRA on, at another place."""
    made = batch()
    for i in range(EXAMPLES):
        made["input_ids"][i, 1 + i] = 5
    return made


def unpadded(**_: Any) -> dict[str, Tensor]:
    """Three rows of one length."""
    return zoo.token_batch(EXAMPLES, TOKENS, seed=3, padding="none")


def generic(model: nn.Module, scale: float = 0.1) -> nn.Module:
    """The same model with noise on what is trained, so that no gradient vanishes by symmetry."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(scale * torch.randn_like(p))
    return model


def adapted(config: Callable[[Any], Any], base: Callable[[str], nn.Module], scale: float) -> Callable[..., nn.Module]:
    """Builds ``base`` with the adapter of ``config(peft)``."""

    def build(attention: str) -> nn.Module:
        import peft

        return generic(peft.get_peft_model(base(attention), config(peft)), scale)

    return build


def entry(
    name: str,
    config: str,
    base: Callable[[str], nn.Module] = zoo.llama,
    scale: float = 0.1,
    make_batch: Callable[..., dict[str, Tensor]] = batch,
    **options: Any,
) -> zoo.Entry:
    """A model with the adapter of ``peft.<config>(**options)``; its loss is the one that it returns itself."""
    build = adapted(lambda peft: getattr(peft, config)(task_type="CAUSAL_LM", **options), base, scale)
    return zoo.Entry(name, zoo.seeded(build), make_batch, own_losses)


def evaluated(made: zoo.Entry) -> zoo.Entry:
    """In eval mode: a forward of training draws random numbers, others for the oracle."""
    return dataclasses.replace(made, build=lambda attention="sdpa": made.build(attention).eval())


def layers(name: str, config: str, **options: Any) -> zoo.Entry:
    """An adapter of some linear layers."""
    return entry(name, config, **{"target_modules": TARGETS, **options})


def qwen3_moe(attention: str) -> nn.Module:
    config = hf.Qwen3MoeConfig(
        **zoo._sizes(num_key_value_heads=2, head_dim=8), num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
    )
    config._experts_implementation = "eager"  # the others refuse float64
    return zoo.from_config(hf.Qwen3MoeForCausalLM, config, attention)


def mixtral(attention: str) -> nn.Module:
    config = hf.MixtralConfig(**zoo._sizes(num_key_value_heads=2), num_local_experts=4, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    return zoo.from_config(hf.MixtralForCausalLM, config, attention)


VIRTUAL_TOKENS = {"num_virtual_tokens": VIRTUAL, "num_layers": 2, "token_dim": zoo.WIDTH, "num_attention_heads": 4}

EXACT = [
    layers("LoRA", "LoraConfig", r=4),
    layers("LoRA, all linear", "LoraConfig", r=4, target_modules="all-linear"),
    layers("rsLoRA", "LoraConfig", r=4, use_rslora=True),
    layers("DoRA", "LoraConfig", r=4, use_dora=True),
    layers(
        "LoRA, trained biases",
        "LoraConfig",
        base=lambda a: zoo.llama(a, attention_bias=True, mlp_bias=True),
        r=4,
        bias="all",
    ),
    layers("LoRA, bias of the factors", "LoraConfig", r=4, lora_bias=True),
    layers("LoRA, embedding", "LoraConfig", r=4, target_modules=["embed_tokens", "q_proj"]),
    layers("DoRA, embedding", "LoraConfig", r=4, use_dora=True, target_modules=["embed_tokens", "q_proj"]),
    layers("LoRA, head", "LoraConfig", r=4, target_modules=["lm_head", "q_proj"]),
    layers("LoRA, modules_to_save", "LoraConfig", r=4, modules_to_save=["lm_head", "embed_tokens"]),
    layers("LoRA, trainable tokens", "LoraConfig", r=4, trainable_token_indices=[5, 7, 11]),
    layers(
        "LoRA, trainable tokens, tied",
        "LoraConfig",
        base=lambda a: zoo.llama(a, tie_word_embeddings=True),
        r=4,
        trainable_token_indices=[5, 7, 11],
    ),
    layers("LoRA, layer replication", "LoraConfig", r=4, layer_replication=[[0, 2], [1, 2]]),
    layers("LoRA, attention of Qwen3-MoE", "LoraConfig", base=qwen3_moe, r=2, target_modules=["q_proj"]),
    layers("PiSSA", "LoraConfig", r=4, init_lora_weights="pissa"),
    layers("OLoRA", "LoraConfig", r=4, init_lora_weights="olora"),
    entry("Llama-Adapter", "AdaptionPromptConfig", adapter_len=VIRTUAL, adapter_layers=2),
    layers("BEFT", "BeftConfig"),
    layers("BOFT", "BOFTConfig", target_modules=["q_proj", "v_proj"]),
    entry("Cartridge", "CartridgeConfig", **VIRTUAL_TOKENS),
    layers("DEFT", "DeftConfig", r=4),
    layers("DEFT, PaRa", "DeftConfig", r=4, para=True),
    layers("DeLoRA", "DeloraConfig", r=4),
    layers("FourierFT", "FourierFTConfig", n_frequency=20),
    layers("GLoRA", "GloraConfig", r=4),
    layers("GraLoRA", "GraloraConfig", r=4),
    layers("HiRA", "HiraConfig", r=4),
    layers("HRA", "HRAConfig", r=4),
    layers("HRA, Gram-Schmidt", "HRAConfig", r=4, apply_GS=True),
    layers("IA3", "IA3Config", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    entry("LN tuning", "LNTuningConfig"),
    layers("LoKr", "LoKrConfig", r=4),
    layers("LoKr, both factors decomposed", "LoKrConfig", r=2, decompose_both=True, decompose_factor=4),
    layers("MiSS", "MissConfig", r=4),
    layers("MiSS, Bat", "MissConfig", r=4, init_weights="bat", target_modules=["q_proj", "v_proj"]),
    layers("MiSS, mini", "MissConfig", r=4, mini_r=2, init_weights="mini"),
    layers("OFT", "OFTConfig", oft_block_size=8),
    entry("prompt tuning", "PromptTuningConfig", **VIRTUAL_TOKENS),
    entry("P-tuning, MLP", "PromptEncoderConfig", **VIRTUAL_TOKENS, encoder_hidden_size=16),
    entry("prefix tuning", "PrefixTuningConfig", **VIRTUAL_TOKENS),
    entry(
        "prefix tuning, projected",
        "PrefixTuningConfig",
        **VIRTUAL_TOKENS,
        prefix_projection=True,
        encoder_hidden_size=16,
    ),
    layers("PSOFT", "PsoftConfig", r=4),
    evaluated(layers("PVeRA", "PveraConfig", r=8)),
    layers("RoAd 1", "RoadConfig", group_size=8),
    layers("RoAd 4", "RoadConfig", group_size=8, variant="road_4"),
    layers("SuperTuning", "SupertuningConfig", sparsity=0.9),
    entry("trainable tokens", "TrainableTokensConfig", token_indices=[5, 7, 11]),
    layers("Uni-LoRA", "UniLoraConfig", r=4),
    layers("VB-LoRA", "VBLoRAConfig", r=4, num_vectors=16, vector_length=8),
    layers("VeRA", "VeraConfig", r=8),
    layers("WaveFT", "WaveFTConfig", n_frequency=20),
]
"""Exact by every strategy."""

ALONE = [
    (
        evaluated(layers("Poly", "PolyConfig", make_batch=of_tasks, r=4, n_tasks=2, n_skills=2)),
        r"the losses are computed of .*poly_|poly_.* is given to",
    ),
    (
        layers(
            "LoRA, experts of Qwen3-MoE",
            "LoraConfig",
            base=qwen3_moe,
            r=2,
            target_modules=["q_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        ),
        r"mlp\.experts.*lora_A.*data-dependent selection of tokens",
    ),
    (
        layers(
            "LoRA, experts of Mixtral",
            "LoraConfig",
            base=mixtral,
            r=2,
            target_modules=["q_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        ),
        r"mlp\.experts.*lora_A.*data-dependent selection of tokens",
    ),
    (
        layers(
            "LoRA, target_parameters",
            "LoraConfig",
            r=2,
            target_modules=["v_proj"],
            target_parameters=["q_proj.weight"],
        ),
        r"lora_B.* is used by MmBackward0 directly",
    ),
    (
        layers("aLoRA", "LoraConfig", make_batch=with_invocation, r=4, alora_invocation_tokens=[5]),
        r"lora_A.* writes it into a view",
    ),
    (layers("AdaLoRA", "AdaLoraConfig", r=4, init_r=4, total_step=10), r"lora_B.* is used by MmBackward0 directly"),
    (layers("C3A", "C3AConfig", block_size=8), r"c3a_kernel.* does not report to torch functions"),
    (layers("FroD", "FrodConfig", progressbar=False), r"frod_lambda_s.* does not report to torch functions"),
    (
        layers("Lily", "LilyConfig", make_batch=unpadded, r=4, target_modules=["q_proj", "v_proj"]),
        r"lily_B.* is used by|one row of a batch",
    ),
    (layers("LoHa", "LoHaConfig", r=4), r"hada_w.* does not report to torch functions"),
    (
        layers(
            "OFT, constrained, shared blocks",
            "OFTConfig",
            oft_block_size=8,
            coft=True,
            block_share=True,
            use_cayley_neumann=False,
        ),
        r"oft_R.* is given to .*copy_ which changes it in place",
    ),
    (layers("SHiRA", "ShiraConfig", r=4, random_seed=0), r"shira_weight.* does not report to torch functions"),
    (
        entry(
            "multitask prompt tuning",
            "MultitaskPromptTuningConfig",
            **VIRTUAL_TOKENS,
            num_tasks=2,
            make_batch=of_tasks,
        ),
        r"prefix_task_.* is given to .*mul_ together with activations",
    ),
    (
        entry(
            "P-tuning, LSTM",
            "PromptEncoderConfig",
            **VIRTUAL_TOKENS,
            encoder_hidden_size=16,
            encoder_reparameterization_type="LSTM",
        ),
        r"lstm_head.* input has shape",
    ),
    (layers("PEANuT", "PeanutConfig", r=4, depth=1), r"peanut_encoders.* saw a tensor of leading dimensions"),
    (layers("RandLoRA", "RandLoraConfig", r=4), r"randlora_.* does not report to torch functions"),
    (layers("TinyLoRA", "TinyLoraConfig", r=2, u=8), r"tinylora_v.* is used by UnsqueezeBackward0 directly"),
]
"""Refused by one-pass and two-pass, and why; ``"auto"`` runs one example at a time."""

REFUSED = [
    (
        entry(
            "CPT",
            "CPTConfig",
            **VIRTUAL_TOKENS,
            cpt_token_ids=[5, 6, 7],
            cpt_mask=[1, 1, 1],
            cpt_tokens_type_mask=[1, 2, 4],
        ),
        r"has a gradient hook besides",
    ),
    (layers("OSF", "OSFConfig", effective_rank=4), r"has a gradient hook besides"),
    (
        entry("Shadow", "ShadowConfig", make_batch=unpadded, r=4, shadow_dropout=0.0, shadow_num_hidden_layers=1),
        r"one row of a batch",
    ),
]
"""Refused by ``"auto"`` too."""
