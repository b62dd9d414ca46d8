"""The small values that zoo.py gives to configuration classes, by the names of their settings."""

from __future__ import annotations

from typing import Any

VOCAB_SIZE = 128
NUM_BLOCKS = 6
NUM_SIDE_BLOCKS = 4  # of parts that a family does not use, such as the vision tower of a causal LM
HIDDEN_SIZE = 64
LENGTH = 16

COUNTS = (
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_blocks", "depth",
    "encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers",
)  # fmt: skip
COMMON_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _cycle(*kinds: str) -> list[str]:
    """Return the kinds of six blocks, in turn."""
    return [kinds[i % len(kinds)] for i in range(NUM_BLOCKS)]


# Set wherever a configuration class has an integer of this name; what it leaves to None is derived.
SMALL: dict[str, int] = {
    **dict.fromkeys(COUNTS, NUM_BLOCKS),
    **dict.fromkeys(
        (
            "hidden_size", "d_model", "n_embd", "dim", "emb_dim", "lru_width",
            "embedding_size", "projection_dim", "projection_size", "hidden_dim",
            "hidden_size_global", "out_hidden_size", "output_dim", "adapter_out_dim",
            "adapter_in_dim", "audio_hidden_size", "output_proj_dims", "embed_dim",
            "mm_embed_dim", "audio_embed_dim", "vision_output_dim",
            "backbone_hidden_size", "ext_pw_out_channel",
            "depthwise_separable_out_channel", "nemo_conv_channels", "downsample_hidden_size",
        ),
        HIDDEN_SIZE,
    ),
    **dict.fromkeys(
        (
            "intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "d_ff", "d_inner",
            "n_inner", "ffn_hidden_size", "dff", "dim_ff", "mlp_dim", "intermediate_size_mlp",
            "dense_intermediate_size", "mamba_d_ssm",
        ),
        128,
    ),
    **dict.fromkeys(
        (
            "moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size",
            "expert_ffn_hidden_size", "shared_experts_intermediate_size",
            "moe_shared_expert_intermediate_size",
        ),
        32,
    ),
    **dict.fromkeys(
        (
            "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
            "decoder_attention_heads", "num_encoder_attention_heads", "attention_heads",
            "num_decoder_attention_heads", "swa_num_attention_heads", "mamba_n_heads",
            "mamba_num_heads", "linear_num_value_heads", "linear_num_heads",
            "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts",
        ),
        4,
    ),
    **dict.fromkeys(
        (
            "num_key_value_heads", "swa_num_key_value_heads", "linear_num_key_heads",
            "num_experts_per_tok", "moe_topk", "moe_k", "index_n_heads",
            "n_group", "first_k_dense_replace", "zero_expert_num",
        ),
        2,
    ),
    **dict.fromkeys(("topk_group", "n_groups", "mamba_n_groups"), 1),
    **dict.fromkeys(
        (
            "head_dim", "d_kv", "v_head_dim", "dim_head", "kv_channels", "swa_head_dim",
            "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "index_head_dim",
            "kv_lora_rank", "query_pre_attn_scalar", "attention_head_size",
        ),
        16,
    ),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "o_lora_rank", "mamba_head_dim", "mamba_d_head"), 32),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(
        (
            "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length",
            "max_source_positions", "max_target_positions", "max_encoder_position_embeddings",
            "max_decoder_position_embeddings", "position_embedding_size", "num_hash_buckets",
            "mm_posemb_size", "num_position_embeddings", "input_dim",
        ),
        64,
    ),
    **dict.fromkeys(
        ("sliding_window", "sliding_window_size", "attention_window_size", "index_topk"), 8
    ),
    **dict.fromkeys(
        (
            "vocab_size", "vocab_size_per_layer_input", "src_vocab_size", "tgt_vocab_size",
            "shape_vocab_size", "pronunciation_vocab_size",
        ),
        VOCAB_SIZE,
    ),
    **dict.fromkeys(("shape_embed_dim", "pronunciation_embed_dim", "hc_lowrank"), 16),
    "attention_window": 8,
    "hidden_size_per_layer_input": 8,
    "intra_bottleneck_size": 32,
    "local_radius": 7,
    "num_patches": 16,
    "image_size": 32,
    "patch_size": 8,
    "max_2d_position_embeddings": 64,
}  # fmt: skip

# Set even where a class leaves them to None.
SMALL_FOR_NONE = {"num_key_value_heads": 2, "num_experts_per_tok": 2, "pad_token_id": 0}

# Set wherever a class has a smaller number: with the usual ones, blocks this small change nothing.
LARGE = {"initializer_range": 0.1, "init_std": 0.1, "layer_scale_init_value": 1.0}

# Set, cut to its length, wherever a class has one number for each stage.
LISTS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("hidden_sizes", "embed_dims", "embed_dim"), (16, 32, 48, 64)),
    **dict.fromkeys(("num_heads", "num_attention_heads"), (1, 2, 4, 4)),
    **dict.fromkeys(("depths", "depth"), (1, 2, 2, 1)),
}
# Where the first block of a stage is of a kind of its own, another is left only in stages of three.
DEEPER = (2, 3, 3, 2)
SWIN = {"embed_dim": 16, "patch_size": 2, "window_size": 2}

# What an architecture needs beside, e.g. to have both of its kinds of blocks among the first six.
MORE: dict[str, dict[str, Any]] = {
    "big_bird": {"block_size": 2, "num_random_blocks": 1},
    "bigbird_pegasus": {"block_size": 2, "num_random_blocks": 1},
    "bit": {"num_groups": 4, "depths": DEEPER},
    "bamba": {"attn_layer_indices": [2, 5]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {
        "layer_types": _cycle("sliding_attention", "full_attention"),
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10_000.0}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "convnext": {"num_stages": 4, "patch_size": 4},
    "convnextv2": {"num_stages": 4, "patch_size": 4},
    "cvt": {"depth": (1, 2, 3)},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "partial_rotary_factor": 0.5,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "dots3_note_audio_encoder": {"adapter_input_size": HIDDEN_SIZE},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 16,
    },
    "dots3_note_vision_encoder": {"pyramid_num_routed": [-1, -1, 4, 4]},
    "donut-swin": SWIN,
    "efficientnet": {
        "width_coefficient": 0.25,
        "depth_coefficient": 0.5,
        "initializer_range": 0.5,
        "hidden_dim": 320,
    },
    "encoder-decoder": {"decoder_start_token_id": 1},
    "esm": {"vocab_size": VOCAB_SIZE, "mask_token_id": 3},
    "esmc": {"num_key_value_heads": 4},
    "focalnet": {"embed_dim": 16},
    "funnel": {"block_sizes": (2, 2, 2), "d_head": 16},
    "gemma3n_text": {"num_kv_shared_layers": 1},
    "gemma4_text": {"global_head_dim": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 3]], "window_size": 8},
    "got_ocr2_vision": {"output_channels": 16},
    "granitemoehybrid": {"layer_types": _cycle("linear_attention", "full_attention")},
    "hgnet_v2": {
        "stem_channels": (3, 8, 16),
        "stage_in_channels": (16, 16, 32, 48),
        "stage_mid_channels": (8, 8, 16, 16),
        "stage_out_channels": (16, 32, 48, 64),
        "stage_numb_of_layers": (2, 2, 2, 2),
    },
    "hiera": {"embed_dim": 16, "image_size": (64, 64), "depths": DEEPER},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 1},
    "laguna": {"layer_types": _cycle("sliding_attention", "full_attention")},
    "layoutlmv3": {"coordinate_size": 8, "shape_size": 16},
    "lfm2": {"full_attn_idxs": [2, 5]},
    "lfm2_moe": {"layer_types": _cycle("conv", "conv", "full_attention")},
    "levit": {"image_size": 64, "patch_size": 16, "key_dim": (8, 8, 8)},
    "lilt": {"hidden_size": 48},
    "longt5": {"decoder_start_token_id": 0},
    "longcat_flash": {"head_dim": SMALL["qk_rope_head_dim"]},
    "luke": {"entity_vocab_size": 16, "entity_emb_size": 16},
    "mamba2": {"head_dim": 32},
    "markuplm": {"max_depth": 4, "xpath_unit_hidden_size": 8},
    "mellum": {"layer_types": _cycle("sliding_attention", "full_attention")},
    "minimax_m3_vl_text": {
        "layer_types": _cycle("full_attention", "minimax_m3_sparse"),
        "mlp_layer_types": ["dense"] * 2 + ["sparse"] * 4,
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "ministral": {
        "head_dim": 16,
        "layer_types": _cycle("sliding_attention", "sliding_attention", "full_attention"),
    },
    "mllama_text_model": {"cross_attention_layers": [1, 4]},
    "mobilebert": {"embedding_size": 32},
    "mobilenet_v1": {"depth_multiplier": 0.25},
    "mobilenet_v2": {"depth_multiplier": 0.25},
    "mobilevit": {
        "image_size": 64,
        "patch_size": 2,
        "neck_hidden_sizes": (8, 16, 16, 24, 32, 48, 64),
    },
    "mobilevitv2": {
        "width_multiplier": 0.5,
        "image_size": 64,
        "patch_size": 2,
        "base_attn_unit_dims": (16, 32, 48),
    },
    "nemotron_h": {
        "layers_block_type": [
            "linear_attention",
            "moe",
            "linear_attention",
            "full_attention",
            "mlp",
            "moe",
        ]
    },
    "nemotron3_5_transcribe_asr_audio": {"num_key_value_heads": 4},
    "nemotron3_5_transcribe_word_timestamp": {"num_key_value_heads": 4},
    "nemotron3_diarization_audio": {"num_key_value_heads": 4},
    "perceiver": {
        "num_blocks": 1,
        "num_self_attends_per_block": NUM_BLOCKS,
        "max_position_embeddings": LENGTH,
        "num_latents": 16,
        "d_latents": HIDDEN_SIZE,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "reformer": {
        "attn_layers": _cycle("local", "lsh"),
        "axial_pos_shape": (4, 4),
        "axial_pos_embds_dim": (16, 48),
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "feed_forward_size": 128,
        "hash_seed": 0,
        "hidden_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.0,
        "lsh_attention_probs_dropout_prob": 0.0,
    },
    "regnet": {"depths": DEEPER},
    "resnet": {"depths": DEEPER},
    "segformer": {"num_encoder_blocks": 4},
    "swin": SWIN,
    "swinv2": SWIN,
    "switch_transformers": {"decoder_start_token_id": 0},
    "t5": {"decoder_start_token_id": 0},
    "textnet": {"image_size": 64, "stem_out_channels": 16, "hidden_sizes": (16, 16, 32, 48, 64)},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 2, "depths": (1,) * 7},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": _cycle("linear_attention", "linear_attention", "hybrid"),
    },
    "zamba2": {
        "layers_block_type": _cycle("linear_attention", "linear_attention", "hybrid"),
        "adapter_rank": 8,
    },
    "zaya": {
        "num_experts_per_tok": 1,
        "layer_types": _cycle("hybrid_sliding", "hybrid"),
        "sliding_window": 8,
    },
}

# These go backwards in training mode only; with no dropout, as here, both modes are alike.
ALWAYS_TRAINING = ("reformer",)

# These cannot work here, whatever their sizes.
CANNOT: dict[str, str] = {
    "dinat": "needs the package natten",
    "gemma3n": "needs the packages timm and pillow",
    "gemma4_assistant": "assists another network, whose keys and values it reads",
    "gemma4_unified_assistant": "assists another network, whose keys and values it reads",
    "layoutlmv2": "needs the package detectron2",
    "musicgen": "AutoModelForCausalLM does not build it from its own configuration",
    "musicgen_melody": "AutoModelForCausalLM does not build it from its own configuration",
    "pp_lcnet": "has no loss",
    "shieldgemma2": "has no loss",
    "timm_wrapper": "needs the packages timm and pillow",
}
