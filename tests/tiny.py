"""Tiny models, texts, images and settings, built here: nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fedpeat.data.images import ImageInputs, ImageSet
from fedpeat.data.packing import PackedText
from fedpeat.emulator.package import EmulatorPackage, pack_emulator
from fedpeat.model.blocks import find_blocks
from fedpeat.model.cut import build_from_blocks, frozen

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


def tiny_package(
    kept: Sequence[int],
    kind: str = "llama",
    *,
    recipe: str = "layer_drop:0.25",
    parent_sha256: str = "0" * 64,
    dtype: torch.dtype = torch.float32,
) -> EmulatorPackage:
    """Return an emulator of a tiny model of six blocks."""
    model = tiny_model(kind)
    blocks = find_blocks(model)
    return pack_emulator(
        build_from_blocks(model, blocks, kept),
        model,
        blocks,
        kept,
        recipe=recipe,
        dtype=dtype,
        parent_sha256=parent_sha256,
    )


def save_tiny_llama(folder: Path) -> Path:
    """Save a tiny LLaMA with its tokenizer as the Hub has them; return the folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>"
    ).save_pretrained(folder)
    tiny_model("llama", num_blocks=6).save_pretrained(folder)
    return folder


def write_corpus(path: Path, num_owners: int = 4) -> Path:
    """Write a JSONL file of 240 short texts that belong to a few owners; return the file."""
    rng = np.random.default_rng(0)
    lines = [
        {
            "text": " ".join(rng.choice(WORDS, 24)),
            "owner": f"site-{i % num_owners}",
            "topic": f"topic-{i % 3}",
        }
        for i in range(240)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


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


IMAGE_SIZE = 8
CLASSES = ("bar", "dot", "edge")


def tiny_vit(num_blocks: int = 6, seed: int = 0) -> transformers.PreTrainedModel:
    """Return a random ViT for grey images of three named classes, frozen, in evaluation mode."""
    config = transformers.ViTConfig(
        image_size=IMAGE_SIZE,
        patch_size=4,
        num_channels=1,
        hidden_size=32,
        num_hidden_layers=num_blocks,
        num_attention_heads=4,
        intermediate_size=64,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: number for number, name in enumerate(CLASSES)},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.ViTForImageClassification(config)
        for matrix in [p for p in model.parameters() if p.ndim > 1]:
            torch.nn.init.normal_(matrix, std=0.2)  # so large that every block matters
    return frozen(model, torch.device("cpu"))


def tiny_processor() -> Any:
    """Return the image processor of ``tiny_vit``."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return transformers.ViTImageProcessorPil(size=size, image_mean=[0.5], image_std=[0.25])


def drawn_image(number: int, rng: np.random.Generator, side: int = IMAGE_SIZE) -> np.ndarray:
    """Return a noisy picture of a class: a bar, a dot or an edge; uint8 (side, side)."""
    pixels = rng.integers(0, 80, (side, side)).astype(np.uint8)
    middle = side // 2
    parts = (np.s_[:, middle - 1 : middle + 1], np.s_[1:3, 1:3], np.s_[middle:, :])
    pixels[parts[number]] += 150
    return pixels


def random_images(num_images: int = 8, seed: int = 0) -> ImageSet:
    """Return noisy pictures of the classes in turn, as ``tiny_vit`` takes them."""
    rng = np.random.default_rng(seed)
    classes = np.arange(num_images) % len(CLASSES)
    pixels = tuple(drawn_image(number, rng)[None] for number in classes.tolist())
    return ImageSet(
        pixels, np.ones(num_images, np.bool_), classes, ImageInputs(tiny_processor(), 1)
    )


def write_images(folder: Path, per_class: int, side: int = IMAGE_SIZE, seed: int = 0) -> Path:
    """Write a folder of PNG files for each of three classes."""
    rng = np.random.default_rng(seed)
    for number, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            picture = Image.fromarray(drawn_image(number, rng, side))
            picture.save(folder / name / f"{i:03}.png")
    return folder


def tiny_image_settings(vit_dir: Path, images: Path, output_dir: Path) -> dict[str, object]:
    """Return the settings of a federation on images that takes about a second."""
    return {
        "name": "tiny",
        "output_dir": str(output_dir),
        "model": {"name": str(vit_dir), "device": "cpu", "task": "image_classification"},
        "data": {
            "source": str(images),
            "partition": "dirichlet",
            "num_clients": 3,
            "server_ratio": 0.2,
            "max_eval_blocks": 40,
        },
        "adapter": {"num_bottom": 1, "num_top": 1, "r": 2},
        "local": {"local_steps": 2, "local_batch_size": 4, "local_learning_rate": 5e-3},
        "federated": {"num_rounds": 3},
        "evaluation": {"full_tuned": False},
    }
