"""Fixtures for all tests."""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# All that fedpeat imports comes before it: within jaxtyping's hook it would be compiled each time.
import numpy as np
import peft  # noqa: F401
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import typechecker  # noqa: F401 - before anything of fedpeat is imported
from tiny import VOCAB_SIZE, WORDS, tiny_model, tiny_processor, tiny_vit, write_images

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny LLaMA with its tokenizer, saved as the Hub has them."""
    folder = tmp_path_factory.mktemp("tiny-llama")
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


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a JSONL file of 240 short texts that belong to four owners."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    lines = [
        {
            "text": " ".join(rng.choice(WORDS, 24)),
            "owner": f"site-{i % 4}",
            "topic": f"topic-{i % 3}",
        }
        for i in range(240)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="session")
def vit_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny ViT with its image processor, saved as the Hub has them."""
    folder = tmp_path_factory.mktemp("tiny-vit")
    tiny_vit().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def images_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 120 images in three folders of classes."""
    return write_images(tmp_path_factory.mktemp("images"), per_class=40)
