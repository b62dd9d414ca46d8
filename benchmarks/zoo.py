"""A small random network of every architecture that transformers can build.

Everything is made from configurations, with random weights: nothing is downloaded. A network has
about six blocks, and where an architecture mixes kinds of blocks, those six show the mix.

    python benchmarks/zoo.py [FAMILY ...] [--only TYPE ...] [--seconds 20]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import inspect
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import Tensor
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB_SIZE = 128
NUM_BLOCKS = 6
HIDDEN_SIZE = 64
BATCH_SIZE = 2
LENGTH = 16
NUM_LABELS = 3
NUM_SIDE_BLOCKS = 4  # of parts that the family does not use, such as a vision tower in a causal LM
COMMON_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
COUNTS = (
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_blocks", "depth",
    "encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers",
)  # fmt: skip


class ZooError(ValueError):
    """An architecture cannot be built or run here; the text says why, in one line."""


@dataclasses.dataclass(frozen=True)
class Family:
    """Networks with the same kind of head.

    Attributes:
        auto: The class that builds them from a configuration.
        class_names: The class, or the classes, of every architecture that has this head.
    """

    auto: Any
    class_names: Mapping[str, Any]


FAMILIES: dict[str, Family] = {
    "causal_lm": Family(
        transformers.AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    ),
    "masked_lm": Family(
        transformers.AutoModelForMaskedLM, modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    ),
    "sequence_classification": Family(
        transformers.AutoModelForSequenceClassification,
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
    "seq2seq_lm": Family(
        transformers.AutoModelForSeq2SeqLM,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    ),
    "image_classification": Family(
        transformers.AutoModelForImageClassification,
        modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    ),
}


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
            "adapter_in_dim", "output_proj_dims", "embed_dim", "mm_embed_dim", "audio_embed_dim",
            "vision_output_dim", "backbone_hidden_size", "ext_pw_out_channel",
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
            "n_group", "first_k_dense_replace",
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
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "src_vocab_size", "tgt_vocab_size"), VOCAB_SIZE),
    **dict.fromkeys(("shape_vocab_size", "pronunciation_vocab_size"), VOCAB_SIZE),
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

# These are set even where a class leaves them to None.
SMALL_FOR_NONE = {"num_key_value_heads": 2, "num_experts_per_tok": 2, "pad_token_id": 0}

LISTS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("hidden_sizes", "embed_dims", "embed_dim"), (16, 32, 48, 64)),
    **dict.fromkeys(("num_heads", "num_attention_heads"), (1, 2, 4, 4)),
    **dict.fromkeys(("depths", "depth"), (1, 2, 2, 1)),
}
# Set, cut to its length, wherever a class has one number per stage.

SWIN = {"embed_dim": 16, "patch_size": 2, "window_size": 2}

# What an architecture needs beside, e.g. to have both of its kinds of blocks among the first six.
MORE: dict[str, dict[str, Any]] = {
    "big_bird": {"block_size": 2, "num_random_blocks": 1},
    "bigbird_pegasus": {"block_size": 2, "num_random_blocks": 1},
    "bit": {"num_groups": 4},
    "bamba": {"attn_layer_indices": [2, 5]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {
        "layer_types": _cycle("sliding_attention", "full_attention"),
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10_000.0}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "convnext": {"num_stages": 4},
    "convnextv2": {"num_stages": 4},
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
    "hiera": {"embed_dim": 16, "image_size": (64, 64)},
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
    "mobilenet_v1": {"depth_multiplier": 0.25},
    "mobilenet_v2": {"depth_multiplier": 0.25},
    "mobilevit": {
        "image_size": 64,
        "patch_size": 2,
        "neck_hidden_sizes": (8, 16, 16, 24, 32, 48, 64),
    },
    "mobilevitv2": {"image_size": 64, "patch_size": 2, "base_attn_unit_dims": (16, 32, 48)},
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
    "perceiver": {
        "num_blocks": 1,
        "num_self_attends_per_block": NUM_BLOCKS,
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

# These refuse a backward pass in evaluation mode; they have no dropout here, so both modes are alike.
TRAINED_IN_TRAINING_MODE = ("reformer",)

# These cannot work here, whatever their sizes.
CANNOT: dict[str, str] = {
    "dinat": "needs the package natten",
    "gemma3n": "needs the package timm",
    "gemma4_assistant": "assistant model of another, whose keys and values it reads",
    "gemma4_unified_assistant": "assistant model of another, whose keys and values it reads",
    "layoutlmv2": "needs the package detectron2",
    "musicgen": "AutoModelForCausalLM does not build it from its configuration, of three networks",
    "musicgen_melody": "AutoModelForCausalLM does not build it from its configuration",
    "pp_lcnet": "has no loss",
    "shieldgemma2": "has no loss",
    "timm_wrapper": "needs the package timm",
}


def tiny_config(model_type: str, family: str) -> transformers.PretrainedConfig:
    """Return the configuration of a small network of some architecture.

    Raises:
        ZooError: If the family has no such architecture, or its class refuses the small values.
    """
    if family not in FAMILIES:
        raise ZooError(f"family must be one of {', '.join(FAMILIES)}, got {family}")
    names = FAMILIES[family].class_names
    if model_type not in names:
        raise ZooError(f"{family}: transformers has no architecture {model_type}")
    if model_type in CANNOT:
        raise ZooError(f"{model_type}: {CANNOT[model_type]}")
    more: dict[str, Any] = {"num_labels": NUM_LABELS}
    if not isinstance(names[model_type], str):  # from_config then asks the configuration which
        more["architectures"] = [names[model_type][0]]
    with _one_line(f"{model_type}: no configuration"):
        maker = _Maker(family)
        config: transformers.PretrainedConfig = maker.make(CONFIG_MAPPING[model_type], **more)
    return config


def build(model_type: str, family: str, seed: int = 0) -> transformers.PreTrainedModel:
    """Return a small random network in float32, in evaluation mode where it can be tuned in it.

    Raises:
        ZooError: If it cannot be built here.
    """
    config = tiny_config(model_type, family)
    with _one_line(f"{model_type}: not built"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: transformers.PreTrainedModel = FAMILIES[family].auto.from_config(
            config, dtype=torch.float32
        )
    return model.train(model_type in TRAINED_IN_TRAINING_MODE)


def tiny_batch(model: transformers.PreTrainedModel) -> dict[str, Tensor]:
    """Return two examples with labels, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    name = type(model).__name__
    if "ImageClassification" in name and model.config.model_type != "imagegpt":
        batch = {"pixel_values": _pixels(model.config, generator)}
    else:
        batch = _text(model, generator)
    if "Classification" in name:
        labels = torch.arange(BATCH_SIZE) % NUM_LABELS
    else:
        labels = batch["input_ids"].clone()
    extra = EXTRA_INPUTS.get(model.config.model_type, _nothing)(model.config, generator)
    return {**batch, "labels": labels, **extra}


def _text(model: transformers.PreTrainedModel, generator: torch.Generator) -> dict[str, Tensor]:
    """Return token ids that end as the architecture wants it, and a mask where it takes one."""
    ids = torch.randint(4, 100, (BATCH_SIZE, LENGTH), generator=generator)
    eos = getattr(model.config.get_text_config(), "eos_token_id", None)
    ids[:, -1] = eos if isinstance(eos, int) else 2
    takes_mask = "attention_mask" in inspect.signature(model.forward).parameters
    return {"input_ids": ids, **({"attention_mask": torch.ones_like(ids)} if takes_mask else {})}


def _pixels(config: transformers.PretrainedConfig, generator: torch.Generator) -> Tensor:
    """Return images of the size in the configuration, (batch, channels, height, width)."""
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", SMALL["image_size"])
    height, width = (size, size) if isinstance(size, int) else size
    channels = getattr(vision, "num_channels", 3)
    return torch.randn(BATCH_SIZE, channels, height, width, generator=generator)


def _patches(
    config: transformers.PretrainedConfig, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return images cut into four by four patches."""
    width = config.vision_config.num_channels * config.vision_config.patch_size**2
    return {
        "pixel_values": torch.randn(BATCH_SIZE, 16, width, generator=generator),
        "pixel_attention_mask": torch.ones(BATCH_SIZE, 16, dtype=torch.long),
        "spatial_shapes": torch.full((BATCH_SIZE, 2), 4),
    }


def _audio(config: transformers.PretrainedConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """Return a spectrogram that is as long as the text."""
    frames = LENGTH * config.audio_length_per_tok
    bins = config.audio_config.num_mel_bins
    return {"input_features": torch.randn(BATCH_SIZE, bins, frames, generator=generator)}


def _nothing(*_: object) -> dict[str, Tensor]:
    return {}


EXTRA_INPUTS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "git": lambda config, generator: {"pixel_values": _pixels(config, generator)},
    "siglip2": _patches,
    "voxtral_realtime": _audio,
}


def loss_of(model: transformers.PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the loss of a batch, with no cache.

    Raises:
        ZooError: If the network returns none.
    """
    accepted = inspect.signature(model.forward).parameters
    extra = {"use_cache": False} if "use_cache" in accepted else {}
    loss = getattr(model(**batch, **extra), "loss", None)
    if not isinstance(loss, Tensor):
        raise ZooError(f"{model.config.model_type}: has no loss")
    return loss


class _Maker:
    """Makes the configuration of one network, and of its parts.

    Attributes:
        family: The family that the network is of.
        special_ids: Where the ids of special tokens went, alike in all parts.
    """

    def __init__(self, family: str) -> None:
        self.family = family
        self.special_ids: dict[str, int] = {}

    def make(self, config_class: Any, **more: Any) -> Any:
        """Return a configuration with small values wherever its class has their names."""
        defaults = _defaults(config_class)
        settings = _small(config_class, defaults)
        settings |= self._moved_ids(defaults)
        settings |= {
            name: self._part(name, spec)
            for name, spec in config_class.sub_configs_defaults.items()
            if name in defaults
        }
        if "is_decoder" in defaults and self.family == "causal_lm":
            settings["is_decoder"] = True
        settings |= MORE.get(config_class.model_type, {})
        return config_class(**(settings | more))

    def _part(self, name: str, spec: Any) -> Any:
        """Return the configuration of a part; one that the family does not use has few blocks."""
        config_class = spec.config_class
        if not dataclasses.is_dataclass(config_class):
            config_class = CONFIG_MAPPING[spec.model_type]
        more = {k: v for k, v in spec.init_kwargs.items() if k not in SMALL}
        used = "vision" in name if self.family == "image_classification" else _is_text(name)
        if not used:
            defaults = _defaults(config_class)
            more |= {name: NUM_SIDE_BLOCKS for name in COUNTS if _is_int(defaults.get(name))}
        return self.make(config_class, **more)

    def _moved_ids(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Move the ids of special tokens into the small vocabulary."""
        moved: dict[str, Any] = {}
        for name, value in defaults.items():
            if not name.endswith(("_token_id", "_token_index", "_token_ids")):
                continue
            largest = max(value, default=0) if isinstance(value, list | tuple) else value
            if not _is_int(largest) or largest < VOCAB_SIZE:
                continue
            if name in COMMON_IDS:
                moved[name] = COMMON_IDS[name]
            else:
                new = VOCAB_SIZE - 1 - len(self.special_ids)
                moved[name] = self.special_ids.setdefault(name.replace("_index", "_id"), new)
        return moved


def _small(config_class: Any, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the small values of the settings that a class has, under its own names."""
    own = {name: name for name in SMALL if name in defaults}
    other = {config_class.attribute_map.get(name): name for name in SMALL if name not in own}
    small: dict[str, Any] = {
        target: SMALL[name]
        for target, name in (other | own).items()
        if _is_int(defaults.get(target))
    }
    small |= {
        name: value
        for name, value in SMALL_FOR_NONE.items()
        if name in defaults and defaults[name] is None
    }
    small |= {
        name: value[: len(defaults[name])]
        for name, value in LISTS.items()
        if isinstance(defaults.get(name), list | tuple) and len(defaults[name]) <= len(value)
    }
    if "kv_lora_rank" in defaults and "num_key_value_heads" in small:
        small["num_key_value_heads"] = SMALL[
            "num_attention_heads"
        ]  # latent attention has no groups
    return small


def _defaults(config_class: Any) -> dict[str, Any]:
    """Return the default of each setting of a configuration class."""
    return {
        f.name: f.default_factory() if callable(f.default_factory) else f.default
        for f in dataclasses.fields(config_class)
    }


def _is_text(name: str) -> bool:
    return name.startswith(("text", "decoder", "encoder", "global"))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Turn any error into a ZooError of one line."""
    try:
        yield
    except ZooError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever an architecture raises
        reason = " ".join(str(error).split())[:300]
        raise ZooError(f"{what}: {type(error).__name__}: {reason}") from error


@contextlib.contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Build every architecture, run it forwards and backwards, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("families", nargs="*", metavar="FAMILY", default=list(FAMILIES))
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="only these architectures")
    parser.add_argument("--seconds", type=int, default=20, help="time limit of each (%(default)s)")
    args = parser.parse_args(arguments)
    transformers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for family in args.families:
        counts = [0, 0]
        types = [t for t in FAMILIES[family].class_names if not args.only or t in args.only]
        for model_type in types:
            line = survey(model_type, family, args.seconds, counts)
            print(f"| {family} | {model_type} | {line} |", flush=True)
        print(f"{family}: {counts[0]} built, {counts[1]} ran, of {len(types)}", flush=True)
    return 0


def survey(model_type: str, family: str, seconds: int, counts: list[int]) -> str:
    """Return a line about one architecture."""
    started = time.perf_counter()
    try:
        with _time_limit(seconds), _one_line(model_type):
            model = build(model_type, family)
            counts[0] += 1
            size = sum(p.numel() for p in model.parameters()) * 4 / 2**20
            loss = loss_of(model, tiny_batch(model))
            loss.backward()  # type: ignore[no-untyped-call]
            if not torch.isfinite(loss).all() or loss.ndim:
                raise ZooError(f"{model_type}: loss is {loss}")
            grads = sum(p.grad is not None for p in model.parameters())
            total = sum(1 for p in model.parameters())
        counts[1] += 1
    except ZooError as error:
        return f"FAIL {error}"
    took = time.perf_counter() - started
    return f"ok {size:.2f} MiB {took:.2f} s loss {loss.item():.3f} grads {grads}/{total}"


if __name__ == "__main__":
    sys.exit(main())
