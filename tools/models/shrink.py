"""A family's configuration made small: by the names of its fields, and by a table of exceptions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig

VOCAB = 64
WIDTH, INNER, HEADS, HEAD_DIM = 32, 40, 4, 8
EXPERTS, CHOSEN = 4, 2
POSITIONS = 64
# A sequence is cut into more than one of these, so that what crosses them has a gradient; a window hides something.
CHUNK, WINDOW = 4, 5
FIRST_TOKEN = 24  # the special tokens lie below, and no batch contains them

_BY_SIZE: tuple[tuple[int, str], ...] = (
    (
        VOCAB,
        "vocab_size vocab_size_per_layer_input decoder_vocab_size ngram_vocab_size_base src_vocab_size "
        "tgt_vocab_size num_hash_buckets",
    ),
    (
        WIDTH,
        "hidden_size d_model n_embd dim embed_dim attention_hidden_size embedding_size word_embed_proj_dim "
        "hidden_size_global backbone_hidden_size out_hidden_size attention_dim output_dim projection_dim",
    ),
    (
        INNER,
        "intermediate_size moe_intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim n_inner d_ff dff dim_ff "
        "hidden_dim ffn_hidden_size expert_ffn_hidden_size shared_expert_intermediate_size shared_intermediate_size "
        "moe_shared_expert_intermediate_size shared_experts_intermediate_size intermediate_size_mlp mlp_dim d_inner "
        "dense_intermediate_size prefix_dense_intermediate_size feed_forward_size mlp_hidden_size",
    ),
    (
        HEADS,
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
        "attention_heads num_encoder_attention_heads num_decoder_attention_heads linear_num_value_heads "
        "linear_num_heads index_n_heads swa_num_attention_heads",
    ),
    (
        HEAD_DIM,
        "head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim "
        "linear_head_dim swa_head_dim dim_head d_kv mamba_d_head mamba_head_dim kv_channels attention_head_size",
    ),
    (
        2 * HEAD_DIM,
        "qk_head_dim index_head_dim kv_lora_rank q_lora_rank time_step_rank mamba_dt_rank o_lora_rank "
        "laurel_rank hidden_size_per_layer_input ple_embed_dim hc_lowrank",
    ),
    (2, "linear_num_key_heads"),
    (8, "mamba_d_state state_size ssm_state_size mamba_n_heads mamba_num_heads gated_norm_rank"),
    (EXPERTS, "num_experts n_routed_experts num_local_experts moe_num_experts zero_expert_num"),
    (CHOSEN, "num_experts_per_tok moe_topk moe_top_k moe_k num_experts_per_token top_k_experts num_selected_experts"),
    (
        CHUNK,
        "chunk_size mamba_chunk_size attention_chunk_size block_size index_topk window_size "
        "local_attention_window_len",
    ),
    (WINDOW, "sliding_window sliding_window_size local_attention keep_window_size attention_window"),
    (
        POSITIONS,
        "max_position_embeddings n_positions n_ctx max_seq_len model_max_length max_target_positions "
        "max_source_positions original_max_position_embeddings context_length "
        "max_encoder_position_embeddings max_decoder_position_embeddings max_2d_position_embeddings max_depth",
    ),
)
SIZES = {name: size for size, names in _BY_SIZE for name in names.split()}
# At most so large: a default that is smaller has a meaning of its own (one group is no grouping, None is another way).
AT_MOST = {
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "swa_num_key_value_heads": 2,
    "n_group": 2,
    "num_expert_group": 2,
    "topk_group": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "num_nextn_predict_layers": 0,
    "mamba_n_groups": 2,
    "n_groups": 2,
    "rotary_dim": 4,
    "image_size": 8,
    "patch_size": 4,
}
LAYERS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "depth"),
    *("num_encoder_layers", "num_decoder_layers", "num_blocks"),
)
# Lists of one value for each layer, of which one layer of each kind is kept.
PER_LAYER = (
    *("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers", "num_attention_heads_per_layer"),
    *("layer_rope_theta", "indexer_types", "attention_layers", "activation_sparsity_pattern", "block_types"),
)
RANDOM = ("dropout", "drop_", "pdrop", "layerdrop", "jitter")
AUXILIARY = ("output_router_logits", "use_cache")


def shrunk(config: PreTrainedConfig, exceptions: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments that make a small configuration of the class of ``config``.

    Args:
        config: the default one.
        exceptions: fields that are set otherwise; of a nested configuration as a mapping.

    Returns:
        Only fields that the class has; nested configurations as dictionaries.
    """
    values = _fields(config)
    fields = list(values)
    small: dict[str, Any] = {}
    for name in fields:
        if name in exceptions and not isinstance(values[name], PreTrainedConfig):
            continue
        made = _shrink(name, values[name], exceptions.get(name) or {})
        if made is not _KEEP:
            small[name] = made
    if values.get("num_key_value_heads") is not None and values["num_key_value_heads"] == values.get(
        "num_attention_heads"
    ):
        small["num_key_value_heads"] = HEADS
    kept = kept_layers({name: values[name] for name in fields if name in PER_LAYER and values[name]})
    for name in fields:
        if name in LAYERS and values[name] is not None and name not in exceptions:
            small[name] = len(kept) if kept else min(2, values[name])
        elif name in PER_LAYER and values[name] and name not in exceptions:
            small[name] = [values[name][i] for i in kept]
    for name, value in exceptions.items():
        if not isinstance(values.get(name), PreTrainedConfig):
            small[name] = value
    return small


def kept_layers(lists: Mapping[str, Sequence[Any]]) -> list[int]:
    """Positions of layers that have each kind of layer once, in order; at least two, none if there are no lists."""
    if not lists:
        return []
    length = min(len(values) for values in lists.values())
    seen: list[Any] = []
    kept = []
    for i in range(length):
        kind = [values[i] for values in lists.values()]
        if kind not in seen:
            seen.append(kind)
            kept.append(i)
    rest = [i for i in range(length) if i not in kept]
    return sorted([*kept, *rest[: max(0, 2 - len(kept))]])


_KEEP = object()


def _shrink(name: str, value: Any, exceptions: Mapping[str, Any]) -> Any:
    """The value of a field in a small configuration, or ``_KEEP``."""
    if isinstance(value, PreTrainedConfig):
        return {"model_type": value.model_type, **shrunk(value, exceptions)}
    if name in AUXILIARY:
        return False
    if isinstance(value, float) and any(part in name for part in RANDOM):
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int):
        return _KEEP
    if name in SIZES:
        return SIZES[name] if value > 0 else _KEEP
    if name in AT_MOST:
        return min(AT_MOST[name], value)
    if name.endswith(("_token_id", "_token_index")):
        return _KEEP if value < FIRST_TOKEN else 3 + sum(map(ord, name)) % (FIRST_TOKEN - 3)
    return _KEEP


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Values by the names of the class's fields; some are kept under another name."""
    names = list(type(config).__dataclass_fields__)
    stored = {name: config.attribute_map.get(name, name) for name in names}
    return {
        name: config.__dict__[where]
        for name, where in stored.items()
        if where in config.__dict__ and (where == name or where not in names)
    }
