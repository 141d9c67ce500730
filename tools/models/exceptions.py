"""What the names of a configuration's fields do not say, by model type; see :mod:`tools.models.shrink`."""

from __future__ import annotations

from typing import Any

from tools.models.shrink import CHOSEN, CHUNK, EXPERTS, HEAD_DIM, HEADS, INNER, VOCAB, WIDTH

_GEMMA_SHARED = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_GEMMA_3N = {**_GEMMA_SHARED, "intermediate_size": INNER, "activation_sparsity_pattern": [0.95, 0.0, 0.95, 0.0]}
_GEMMA_4 = {"global_head_dim": 2 * HEAD_DIM}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": HEAD_DIM,
    "indexer_budget": CHUNK,
    "indexer_compress_ratio": 2,
}
_HEAD_DIM = {"head_dim": HEAD_DIM}

_DOTS3 = {
    "layer_types": ["indexed_attention", "sliding_attention"],
    "mlp_layer_types": ["dense", "sparse"],
    "num_hidden_layers": 2,
    "num_key_value_heads": HEADS,
    "head_dim": 2 * HEAD_DIM,
    "per_layer_config": {1: {"num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 8}},
}
_DOTS3_TOWERS = {
    "vision_config": {"adapter_in_dim": WIDTH, "adapter_out_dim": WIDTH, "per_layer_config": {}},
    "audio_config": {"adapter_input_size": WIDTH, "adapter_out_dim": WIDTH},
}

# Fields by model type: of a nested configuration as a mapping.
FIELDS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "blt": {
        "vocab_size": 260,
        "encoder_hash_byte_group_vocab": 50,
        "encoder_hash_byte_group_size": [3, 4],
        "patcher_config": {"vocab_size": 260},
        "encoder_config": {"vocab_size": 260},
        "decoder_config": {"vocab_size": 260},
    },
    "cohere2": {"layer_types": ["sliding_attention", "full_attention"]},
    "cohere2_moe": _HEAD_DIM,
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}, "ffn_config": {"moe_top_k": CHOSEN}},
    "dots1": {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "num_experts_per_tok": CHOSEN, "topk_group": 1},
    "deepseek_v2": {"num_experts_per_tok": CHOSEN},
    "dots3_note": {"text_config": _DOTS3, **_DOTS3_TOWERS},
    "dots3_note_text": _DOTS3,
    "esm": {"vocab_size": VOCAB, "pad_token_id": 1, "mask_token_id": 2},
    "falcon_h1": {"mamba_d_ssm": 2 * WIDTH},
    "flaubert": {"emb_dim": WIDTH},
    "gemma3n_text": _GEMMA_3N,
    "gemma4": {"text_config": _GEMMA_4},
    "gemma4_text": _GEMMA_4,
    "gemma4_unified": {"text_config": _GEMMA_4},
    "gemma4_unified_text": _GEMMA_4,
    "gpt_neo": {
        "attention_types": [[["global", "local"], 1]],
        "num_layers": 2,
        "attention_layers": ["global", "local"],
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2},
    "hunyuan_v1_dense": _HEAD_DIM,
    "hunyuan_v1_moe": _HEAD_DIM,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 0, "expert_layer_period": 2, "expert_layer_offset": 1},
    "laguna": {
        "num_attention_heads_per_layer": [HEADS, HEADS],
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8, "visual_embed": False},
    "led": {"attention_window": [CHUNK, CHUNK]},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "num_dense_layers": 1},
    "lilt": {"hidden_size": 48, "num_attention_heads": 4, "max_2d_position_embeddings": 8},
    "longformer": {"attention_window": [CHUNK, CHUNK]},
    "luke": {"entity_vocab_size": 16, "entity_emb_size": 8},
    "mamba2": {"num_heads": 2 * HEADS},
    "mellum": {"layer_types": ["full_attention", "sliding_attention"]},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "mlp_layer_types": ["dense", "sparse"],
        "index_block_size": 2,
        "index_topk_blocks": 2,
    },
    "ministral": _HEAD_DIM,
    "musicgen": {"decoder": {"num_codebooks": 1}},
    "musicgen_melody": {"decoder": {"num_codebooks": 1}},
    "nemotron": {"num_key_value_heads": 2},
    "neomme": {"head_dim": 2 * HEAD_DIM},
    "perceiver": {"d_latents": WIDTH, "num_latents": 8, "num_self_attends_per_block": 1, "num_blocks": 1},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_embds": False,
        "local_attn_chunk_length": CHUNK,
        "lsh_attn_chunk_length": CHUNK,
        "num_buckets": 2,
        "hash_seed": 0,
    },
    "rembert": {"input_embedding_size": 24, "output_embedding_size": 24},
    "roc_bert": {
        "pronunciation_embed_dim": 8,
        "pronunciation_vocab_size": 64,
        "shape_embed_dim": 8,
        "shape_vocab_size": 64,
    },
    "xlm": {"emb_dim": WIDTH, "causal": True},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
        "attention_hidden_size": 2 * WIDTH,
        "attention_head_dim": 2 * HEAD_DIM,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
# What is no model that a batch of texts trains.
NOT_TRAINED: dict[str, str] = {
    "gemma4_assistant": "drafts tokens from another model's keys and values: no model of its own",
    "encoder-decoder": "is put together from two models",
    "gemma4_unified_assistant": "drafts tokens from another model's keys and values: no model of its own",
}
# Families whose text loss is computed only behind an image, and whose labels have a last dimension of codebooks.
IMAGES = ("git",)
CODEBOOKS = ("musicgen", "musicgen_melody")
# Tokens of the three rows, where the model takes only multiples of something while it trains.
LENGTHS = {"reformer": (12, 8, 4)}
