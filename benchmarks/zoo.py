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
from collections.abc import Iterator, Mapping, Sequence
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


class ZooError(ValueError):
    """An architecture cannot be built or run here; the text says why, in one line."""


@dataclasses.dataclass(frozen=True)
class Family:
    """Networks with the same kind of head.

    Attributes:
        auto: The class that builds them from a configuration.
        model_types: Every architecture that transformers has for this head.
    """

    auto: Any
    model_types: tuple[str, ...]


FAMILIES: dict[str, Family] = {
    "causal_lm": Family(
        transformers.AutoModelForCausalLM, tuple(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    ),
    "masked_lm": Family(
        transformers.AutoModelForMaskedLM, tuple(modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    ),
    "sequence_classification": Family(
        transformers.AutoModelForSequenceClassification,
        tuple(modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
    ),
    "seq2seq_lm": Family(
        transformers.AutoModelForSeq2SeqLM,
        tuple(modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    ),
    "image_classification": Family(
        transformers.AutoModelForImageClassification,
        tuple(modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
    ),
}

# Set wherever a configuration class has an integer of this name; what it leaves to None is derived.
SMALL: dict[str, int] = {
    **dict.fromkeys(
        (
            "num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_blocks", "depth",
            "encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers",
        ),
        NUM_BLOCKS,
    ),
    **dict.fromkeys(
        (
            "hidden_size", "d_model", "n_embd", "embed_dim", "dim", "emb_dim", "lru_width",
            "embedding_size", "projection_dim", "projection_size", "hidden_dim",
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
    **dict.fromkeys(("q_lora_rank", "mamba_head_dim", "mamba_d_head"), 32),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(
        (
            "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length",
            "max_source_positions", "max_target_positions",
        ),
        64,
    ),
    **dict.fromkeys(
        ("sliding_window", "sliding_window_size", "attention_window_size", "index_topk"), 8
    ),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCAB_SIZE),
    "hidden_size_per_layer_input": 8,
    "image_size": 32,
    "patch_size": 8,
    "max_2d_position_embeddings": 64,
}  # fmt: skip

# These are set even where a class leaves them to None.
SMALL_FOR_NONE = {"num_key_value_heads": 2, "pad_token_id": 0}

# What an architecture needs beside, e.g. to have both of its kinds of blocks among the first six.
MORE: dict[str, dict[str, Any]] = {}

CANNOT: dict[str, str] = {}


def tiny_config(model_type: str, family: str) -> transformers.PretrainedConfig:
    """Return the configuration of a small network of some architecture.

    Raises:
        ZooError: If the family has no such architecture, or its class refuses the small values.
    """
    if family not in FAMILIES:
        raise ZooError(f"family must be one of {', '.join(FAMILIES)}, got {family}")
    if model_type not in FAMILIES[family].model_types:
        raise ZooError(f"{family}: transformers has no architecture {model_type}")
    if model_type in CANNOT:
        raise ZooError(f"{model_type}: {CANNOT[model_type]}")
    config_class = CONFIG_MAPPING[model_type]
    with _one_line(f"{model_type}: no configuration"):
        config = _small(config_class, {}, num_labels=NUM_LABELS)
    return config


def build(model_type: str, family: str, seed: int = 0) -> transformers.PreTrainedModel:
    """Return a small random network in float32, in evaluation mode.

    Raises:
        ZooError: If it cannot be built here.
    """
    config = tiny_config(model_type, family)
    with _one_line(f"{model_type}: not built"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: transformers.PreTrainedModel = FAMILIES[family].auto.from_config(
            config, dtype=torch.float32
        )
    return model.eval()


def tiny_batch(model: transformers.PreTrainedModel) -> dict[str, Tensor]:
    """Return two examples with labels, the same at every call."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    name = type(model).__name__
    accepted = inspect.signature(model.forward).parameters
    num_labels = config.num_labels
    if model.main_input_name == "pixel_values" and "ImageClassification" in name:
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", 32)
        height, width = (size, size) if isinstance(size, int) else size
        channels = getattr(vision, "num_channels", 3)
        pixels = torch.randn(BATCH_SIZE, channels, height, width, generator=generator)
        return {"pixel_values": pixels, "labels": torch.arange(BATCH_SIZE) % num_labels}
    ids = torch.randint(4, 100, (BATCH_SIZE, LENGTH), generator=generator)
    eos = config.get_text_config().eos_token_id
    ids[:, -1] = eos if isinstance(eos, int) else 2
    batch = {"input_ids": ids}
    if "attention_mask" in accepted:
        batch["attention_mask"] = torch.ones_like(ids)
    if "SequenceClassification" in name:
        batch["labels"] = torch.arange(BATCH_SIZE) % num_labels
    else:
        batch["labels"] = ids.clone()
    return batch


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


def _small(config_class: Any, special_ids: dict[str, int], **more: Any) -> Any:
    """Return a configuration with small values wherever its class has their names."""
    defaults = _defaults(config_class)
    settings: dict[str, Any] = {}
    for name, value in SMALL.items():
        target = name if name in defaults else config_class.attribute_map.get(name)
        if target not in settings and _is_int(defaults.get(target)):
            settings[target] = value
    settings |= {
        name: value
        for name, value in SMALL_FOR_NONE.items()
        if name in defaults and defaults[name] is None
    }
    settings |= _special_ids(defaults, special_ids)
    settings |= {
        name: _small_part(spec, special_ids)
        for name, spec in config_class.sub_configs_defaults.items()
        if name in defaults
    }
    settings |= MORE.get(config_class.model_type, {})
    return config_class(**(settings | more))


def _small_part(spec: Any, special_ids: dict[str, int]) -> Any:
    """Return the small configuration of a part of a network."""
    config_class = (
        spec.config_class
        if dataclasses.is_dataclass(spec.config_class)
        else CONFIG_MAPPING[spec.model_type]
    )
    own = {k: v for k, v in spec.init_kwargs.items() if k not in SMALL}
    return _small(config_class, special_ids, **own)


def _defaults(config_class: Any) -> dict[str, Any]:
    """Return the default of each setting of a configuration class."""
    return {
        f.name: f.default_factory() if callable(f.default_factory) else f.default
        for f in dataclasses.fields(config_class)
    }


def _special_ids(defaults: Mapping[str, Any], special_ids: dict[str, int]) -> dict[str, Any]:
    """Move the ids of special tokens into the small vocabulary, alike in all parts."""
    settings: dict[str, Any] = {}
    for name, value in defaults.items():
        if not name.endswith(("_token_id", "_token_index", "_token_ids")):
            continue
        largest = max(value, default=0) if isinstance(value, list | tuple) else value
        if not _is_int(largest) or largest < VOCAB_SIZE:
            continue
        common = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        settings[name] = common.get(name) or special_ids.setdefault(
            name.replace("_index", "_id"), VOCAB_SIZE - 1 - len(special_ids)
        )
    return settings


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
        types = [t for t in FAMILIES[family].model_types if not args.only or t in args.only]
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
