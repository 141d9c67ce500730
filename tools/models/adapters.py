"""Every adapter of PEFT for causal LMs: declared once for the table and the tests, and built small for the table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tools.models.building import ROWS, Family, NotBuiltError, build_batch, build_config, randomise
from tools.models.precision import DOUBLE
from tools.models.shrink import HEADS, WIDTH

BASES = {
    "llama": Family("llama", "causal_lm", "LlamaForCausalLM"),
    "qwen3_moe": Family("qwen3_moe", "causal_lm", "Qwen3MoeForCausalLM"),
    "mixtral": Family("mixtral", "causal_lm", "MixtralForCausalLM"),
}
SCALE = 0.1
VIRTUAL = 3
TRAINED_TOKENS, INVOCATION = (5, 7, 11), 5
# Tokens that a batch must have, one in each row: those that an adapter trains, and the one that turns it on.
_WRITTEN = {"trained tokens": TRAINED_TOKENS, "invocation": (INVOCATION,)}


@dataclass(frozen=True)
class Adapter:
    """An adapter on a small model.

    Attributes:
        name: of the row.
        config: PEFT's class.
        options: its arguments, without ``task_type``.
        base: of :data:`BASES`.
        base_options: fields of the base's configuration.
        batch: ``padded``, ``unpadded`` (rows of one length, where padding changes what is computed), ``tasks`` (with
            the number of a task for each row), or what tokens it must have.
        evaluated: in eval mode: a forward of training draws random numbers.
    """

    name: str
    config: str
    options: Mapping[str, Any]
    base: str = "llama"
    base_options: Mapping[str, Any] = field(default_factory=dict)
    batch: str = "padded"
    evaluated: bool = False

    head = "adapter"
    class_name = property(lambda self: self.config)
    precision = DOUBLE

    def __str__(self) -> str:
        return self.name

    def build(self) -> nn.Module:
        """As :func:`~tools.models.building.build_model`: float64; only the adapter is trained.

        Raises:
            NotBuiltError: PEFT is not installed, or cannot make it.
        """
        with torch.random.fork_rng():
            torch.manual_seed(0)
            base = BASES[self.base]
            config = build_config(base)
            for name, value in self.base_options.items():
                setattr(config, name, value)
            model = getattr(transformers, base.class_name)(config)  # float32: PiSSA decomposes no doubles
            randomise(model)
            model = move_trained(with_adapter(model, self)).double()
        return model.train(not self.evaluated)

    def lengths(self) -> list[int]:
        """Tokens of the rows."""
        return [max(ROWS)] * len(ROWS) if self.batch == "unpadded" else list(ROWS)

    def make_batch(self, config: Any, lengths: list[int], seed: int = 1) -> dict[str, Tensor]:
        """As :func:`~tools.models.building.build_batch`, with what the adapter needs."""
        return with_needs(build_batch(BASES[self.base], config, lengths, seed), self.batch)


def with_adapter(model: nn.Module, adapter: Adapter) -> nn.Module:
    """PEFT's model around another.

    Raises:
        NotBuiltError: PEFT is not installed, or is one without this adapter.
    """
    try:
        import peft
    except ImportError:
        raise NotBuiltError("peft is not installed") from None
    if not hasattr(peft, adapter.config):
        raise NotBuiltError(f"peft {peft.__version__} has no {adapter.config}")
    config = getattr(peft, adapter.config)(task_type="CAUSAL_LM", **adapter.options)
    found: nn.Module = peft.get_peft_model(model, config)
    return found


@torch.no_grad()
def move_trained(model: nn.Module) -> nn.Module:
    """The same model with noise on what is trained: adapters start at zeros and ones, where gradients vanish."""
    for p in model.parameters():
        if p.requires_grad:
            p.add_(SCALE * torch.randn_like(p))
    return model


def with_needs(batch: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """A batch with the tokens and fields of its kind; row i has its token at place 1 + i."""
    rows = len(batch["input_ids"])
    if kind == "tasks":
        return {**batch, "task_ids": torch.arange(rows) % 2}
    if kind in _WRITTEN:
        for i in range(rows):
            batch["input_ids"][i, 1 + i] = _WRITTEN[kind][i % len(_WRITTEN[kind])]
    return batch


def _of_layers(name: str, config: str, **options: Any) -> Adapter:
    """An adapter of some linear layers."""
    return Adapter(name, config, {"target_modules": ["q_proj", "v_proj", "down_proj"], **options})


def _lora(name: str, **options: Any) -> Adapter:
    return _of_layers(name, "LoraConfig", **{"r": 4, **options})


def _of_tokens(name: str, config: str, **options: Any) -> Adapter:
    """An adapter of virtual tokens."""
    sizes = {"num_virtual_tokens": VIRTUAL, "num_layers": 2, "token_dim": WIDTH, "num_attention_heads": HEADS}
    return Adapter(name, config, {**sizes, **options})


def _of_experts(name: str, base: str) -> Adapter:
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return replace(_lora(name, r=2, target_modules=["q_proj"], target_parameters=parameters), base=base)


_TRAINED = {"trainable_token_indices": list(TRAINED_TOKENS)}

ADAPTERS = (
    _lora("LoRA"),
    _lora("LoRA, all linear", target_modules="all-linear"),
    _lora("rsLoRA", use_rslora=True),
    _lora("DoRA", use_dora=True),
    replace(_lora("LoRA, trained biases", bias="all"), base_options={"attention_bias": True, "mlp_bias": True}),
    _lora("LoRA, bias of the factors", lora_bias=True),
    _lora("LoRA, embedding", target_modules=["embed_tokens", "q_proj"]),
    _lora("DoRA, embedding", use_dora=True, target_modules=["embed_tokens", "q_proj"]),
    _lora("LoRA, head", target_modules=["lm_head", "q_proj"]),
    _lora("LoRA, modules_to_save", modules_to_save=["lm_head", "embed_tokens"]),
    replace(_lora("LoRA, trainable tokens", **_TRAINED), batch="trained tokens"),
    replace(
        _lora("LoRA, trainable tokens, tied", **_TRAINED),
        base_options={"tie_word_embeddings": True},
        batch="trained tokens",
    ),
    _lora("LoRA, layer replication", layer_replication=[[0, 2], [1, 2]]),
    replace(_lora("LoRA, attention of Qwen3-MoE", r=2, target_modules=["q_proj"]), base="qwen3_moe"),
    _of_experts("LoRA, experts of Qwen3-MoE", "qwen3_moe"),
    _of_experts("LoRA, experts of Mixtral", "mixtral"),
    _lora("LoRA, target_parameters", r=2, target_modules=["v_proj"], target_parameters=["q_proj.weight"]),
    _lora("PiSSA", init_lora_weights="pissa"),
    _lora("OLoRA", init_lora_weights="olora"),
    replace(_lora("aLoRA", alora_invocation_tokens=[INVOCATION]), batch="invocation"),
    _of_layers("AdaLoRA", "AdaLoraConfig", r=4, init_r=4, total_step=10),
    Adapter("Llama-Adapter", "AdaptionPromptConfig", {"adapter_len": VIRTUAL, "adapter_layers": 2}),
    _of_layers("BEFT", "BeftConfig"),
    _of_layers("BOFT", "BOFTConfig", target_modules=["q_proj", "v_proj"]),
    _of_layers("C3A", "C3AConfig", block_size=8),
    _of_tokens("Cartridge", "CartridgeConfig"),
    _of_tokens("CPT", "CPTConfig", cpt_token_ids=[5, 6, 7], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 4]),
    _of_layers("DEFT", "DeftConfig", r=4),
    _of_layers("DEFT, PaRa", "DeftConfig", r=4, para=True),
    _of_layers("DeLoRA", "DeloraConfig", r=4),
    _of_layers("FourierFT", "FourierFTConfig", n_frequency=20),
    _of_layers("FroD", "FrodConfig", progressbar=False),
    _of_layers("GLoRA", "GloraConfig", r=4),
    _of_layers("GraLoRA", "GraloraConfig", r=4),
    _of_layers("HiRA", "HiraConfig", r=4),
    _of_layers("HRA", "HRAConfig", r=4),
    _of_layers("HRA, Gram-Schmidt", "HRAConfig", r=4, apply_GS=True),
    _of_layers(
        "IA3", "IA3Config", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    replace(_of_layers("Lily", "LilyConfig", r=4, target_modules=["q_proj", "v_proj"]), batch="unpadded"),
    Adapter("LN tuning", "LNTuningConfig", {}),
    _of_layers("LoHa", "LoHaConfig", r=4),
    _of_layers("LoKr", "LoKrConfig", r=4),
    _of_layers("LoKr, both factors decomposed", "LoKrConfig", r=2, decompose_both=True, decompose_factor=4),
    _of_layers("MiSS", "MissConfig", r=4),
    _of_layers("MiSS, Bat", "MissConfig", r=4, init_weights="bat", target_modules=["q_proj", "v_proj"]),
    _of_layers("MiSS, mini", "MissConfig", r=4, mini_r=2, init_weights="mini"),
    replace(_of_tokens("multitask prompt tuning", "MultitaskPromptTuningConfig", num_tasks=2), batch="tasks"),
    _of_layers("OFT", "OFTConfig", oft_block_size=8),
    _of_layers(
        "OFT, constrained, shared blocks",
        "OFTConfig",
        oft_block_size=8,
        coft=True,
        block_share=True,
        use_cayley_neumann=False,
    ),
    _of_layers("OSF", "OSFConfig", effective_rank=4),
    _of_layers("PEANuT", "PeanutConfig", r=4, depth=1),
    replace(_of_layers("Poly", "PolyConfig", r=4, n_tasks=2, n_skills=2), batch="tasks", evaluated=True),
    _of_tokens("prompt tuning", "PromptTuningConfig"),
    _of_tokens("P-tuning, MLP", "PromptEncoderConfig", encoder_hidden_size=16),
    _of_tokens(
        "P-tuning, LSTM", "PromptEncoderConfig", encoder_hidden_size=16, encoder_reparameterization_type="LSTM"
    ),
    _of_tokens("prefix tuning", "PrefixTuningConfig"),
    _of_tokens("prefix tuning, projected", "PrefixTuningConfig", prefix_projection=True, encoder_hidden_size=16),
    _of_layers("PSOFT", "PsoftConfig", r=4),
    replace(_of_layers("PVeRA", "PveraConfig", r=8), evaluated=True),
    _of_layers("RandLoRA", "RandLoraConfig", r=4),
    _of_layers("RoAd 1", "RoadConfig", group_size=8),
    _of_layers("RoAd 4", "RoadConfig", group_size=8, variant="road_4"),
    Adapter(
        "Shadow", "ShadowConfig", {"r": 4, "shadow_dropout": 0.0, "shadow_num_hidden_layers": 1}, batch="unpadded"
    ),
    _of_layers("SHiRA", "ShiraConfig", r=4, random_seed=0),
    _of_layers("SuperTuning", "SupertuningConfig", sparsity=0.9),
    _of_layers("TinyLoRA", "TinyLoraConfig", r=2, u=8),
    Adapter(
        "trainable tokens", "TrainableTokensConfig", {"token_indices": list(TRAINED_TOKENS)}, batch="trained tokens"
    ),
    _of_layers("Uni-LoRA", "UniLoraConfig", r=4),
    _of_layers("VB-LoRA", "VBLoRAConfig", r=4, num_vectors=16, vector_length=8),
    _of_layers("VeRA", "VeraConfig", r=8),
    _of_layers("WaveFT", "WaveFTConfig", n_frequency=20),
)
