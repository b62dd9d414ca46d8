"""Tiny models, texts and settings, built here: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers

from fedpeat.data.packing import PackedText
from fedpeat.model.cut import frozen

VOCAB_SIZE = 300
BLOCK_SIZE = 16

WORDS = (
    "the model never leaves its owner and the data never leaves theirs so both stay private".split()
)

TINY = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
CONFIGS: dict[str, dict[str, object]] = {
    "gpt2": {"vocab_size": VOCAB_SIZE, "n_embd": 32, "n_head": 4, "n_positions": 64},
    "opt": {**TINY, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "n_head": 4},
    "gpt_neox": {**TINY, "intermediate_size": 64},
    "llama": {**TINY, "intermediate_size": 64, "num_key_value_heads": 2},
    "mistral": {**TINY, "intermediate_size": 64, "num_key_value_heads": 2},
    "qwen2": {**TINY, "intermediate_size": 64, "num_key_value_heads": 2},
    "gemma": {**TINY, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8},
    "phi": {**TINY, "intermediate_size": 64},
}


def tiny_model(
    kind: str, num_blocks: int = 6, seed: int = 0, **changes: object
) -> transformers.PreTrainedModel:
    """Return a random causal LM of some architecture, frozen, in evaluation mode."""
    settings = {**CONFIGS[kind], "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    settings |= changes
    config = transformers.AutoConfig.for_model(kind, num_hidden_layers=num_blocks, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: transformers.PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config)
        for matrix in [p for p in model.parameters() if p.ndim > 1]:
            torch.nn.init.normal_(matrix, std=0.2)  # so large that every block matters
    return frozen(model, torch.device("cpu"))


def random_ids(batch: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Return random token ids, int64 (batch, length)."""
    return torch.randint(
        0, VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(seed)
    )


def random_text(num_blocks: int = 8, seed: int = 0) -> PackedText:
    """Return random packed blocks in which every token counts and stands for two bytes."""
    ids = (
        np.random.default_rng(seed)
        .integers(0, VOCAB_SIZE, (num_blocks, BLOCK_SIZE))
        .astype(np.int32)
    )
    return PackedText(ids, np.ones_like(ids, dtype=bool), np.full_like(ids, 2))


def tiny_settings(model_dir: Path, corpus_file: Path, output_dir: Path) -> dict[str, object]:
    """Return the settings of a federation that takes about a second, as in a config file."""
    return {
        "name": "tiny",
        "output_dir": str(output_dir),
        "model": {"name": str(model_dir), "device": "cpu"},
        "data": {
            "source": str(corpus_file),
            "key_field": "owner",
            "block_size": BLOCK_SIZE,
            "max_eval_blocks": 16,
        },
        "adapter": {"num_bottom": 1, "num_top": 1, "r": 2},
        "local": {"local_steps": 2, "local_batch_size": 4, "local_learning_rate": 5e-3},
        "federated": {"num_rounds": 3},
        "evaluation": {"full_tuned": False},
    }
