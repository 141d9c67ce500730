"""The adapters of ``tools/models/adapters.py`` on the zoo's models, and what is expected of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers as hf
from torch import Tensor, nn

from tests import zoo
from tests.models.heads import own_losses
from tools.models.adapters import ADAPTERS, Adapter, move_trained, with_adapter, with_needs

EXAMPLES, TOKENS = 3, 9


def batch(kind: str = "padded") -> dict[str, Tensor]:
    """Three rows, of different lengths but where the kind is ``unpadded``."""
    padding = "none" if kind == "unpadded" else "right"
    return with_needs(zoo.token_batch(EXAMPLES, TOKENS, seed=3, padding=padding), kind)


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


BASES: Mapping[str, Any] = {"llama": zoo.llama, "qwen3_moe": qwen3_moe, "mixtral": mixtral}


def entry(adapter: Adapter) -> zoo.Entry:
    """A model with the adapter; its loss is the one that it returns itself."""

    def build(attention: str) -> nn.Module:
        return move_trained(with_adapter(BASES[adapter.base](attention, **adapter.base_options), adapter))

    def built(attention: str = "sdpa") -> nn.Module:
        return seeded(attention).train(not adapter.evaluated)

    seeded = zoo.seeded(build)
    return zoo.Entry(adapter.name, built, lambda **_: batch(adapter.batch), own_losses)


_BY_NAME = {adapter.name: entry(adapter) for adapter in ADAPTERS}

ALONE = [
    (_BY_NAME[name], why)
    for name, why in {
        "Poly": r"the losses are computed of .*poly_|poly_.* is given to",
        "LoRA, experts of Qwen3-MoE": r"mlp\.experts.*lora_A.*data-dependent selection of tokens",
        "LoRA, experts of Mixtral": r"mlp\.experts.*lora_A.*data-dependent selection of tokens",
        "LoRA, target_parameters": r"lora_B.* is used by MmBackward0 directly",
        "aLoRA": r"lora_A.* writes it into a view",
        "AdaLoRA": r"lora_B.* is used by MmBackward0 directly",
        "C3A": r"c3a_kernel.* does not report to torch functions",
        "FroD": r"frod_lambda_s.* does not report to torch functions",
        "Lily": r"lily_B.* is used by|one row of a batch",
        "LoHa": r"hada_w.* does not report to torch functions",
        "OFT, constrained, shared blocks": r"oft_R.* is given to .*copy_ which changes it in place",
        "SHiRA": r"shira_weight.* does not report to torch functions",
        "multitask prompt tuning": r"prefix_task_.* is given to .*mul_ together with activations",
        "P-tuning, LSTM": r"lstm_head.* input has shape",
        "PEANuT": r"peanut_encoders.* saw a tensor of leading dimensions",
        "RandLoRA": r"randlora_.* does not report to torch functions",
        "TinyLoRA": r"tinylora_v.* is used by UnsqueezeBackward0 directly",
    }.items()
]
"""Refused by one-pass and two-pass, and why; ``"auto"`` runs one example at a time."""

REFUSED = [
    (_BY_NAME[name], why)
    for name, why in {
        "CPT": r"has a gradient hook besides",
        "OSF": r"has a gradient hook besides",
        "Shadow": r"one row of a batch",
    }.items()
]
"""Refused by ``"auto"`` too."""

_OTHERS = {str(entry) for entry, _ in [*ALONE, *REFUSED]}
EXACT = [entry for name, entry in _BY_NAME.items() if name not in _OTHERS]
"""Exact by every strategy: all others."""
