"""Fixtures for all tests."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# All that fedpeat imports comes before it: within jaxtyping's hook it would be compiled each time.
import peft  # noqa: F401
import pytest
import torch

import typechecker  # noqa: F401 - before anything of fedpeat is imported
from tiny import save_tiny_llama, tiny_processor, tiny_vit, write_corpus, write_images

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny LLaMA with its tokenizer, saved as the Hub has them."""
    return save_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a JSONL file of 240 short texts that belong to four owners."""
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


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
