"""What a network can be tuned to do: how it is loaded, what it reads, and what measures it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import transformers

from fedpeat.config import schema
from fedpeat.config.schema import Config, DataConfig
from fedpeat.core.errors import DataError
from fedpeat.data.examples import Examples, FederatedData
from fedpeat.data.federation import load_federated_text, load_own_text
from fedpeat.data.image_federation import load_federated_images, load_own_images
from fedpeat.model.loading import LoadedModel, load_image_processor, load_tokenizer

__all__ = ["TASKS", "Task", "task_of"]


@dataclass(frozen=True)
class Task:
    """A kind of network.

    The loss is the same for all: cross-entropy of what the data gives as labels, at the outputs
    that it gives them for.

    Attributes:
        auto: Class of transformers that finds the network with its head.
        load_processor: Loads its tokenizer or image processor.
        read: Reads who owns which data, as the network takes it.
        welcome: What a device must know of the network, and of the server's data, to read its own.
        read_own: Reads a device's own data: (settings, processor, welcome, name of the device).
        metric: What measures it; a key of ``METRICS`` in ``tuning/evaluation.py``.
        unit: What budgets and speeds are counted in.
    """

    auto: Any
    load_processor: Callable[..., Any]
    read: Callable[[Config, LoadedModel], FederatedData[Examples]]
    welcome: Callable[[LoadedModel, FederatedData[Examples]], dict[str, Any]]
    read_own: Callable[[DataConfig, Any, Mapping[str, Any], str], Examples]
    metric: str
    unit: str


def _read_text(config: Config, loaded: LoadedModel) -> FederatedData[Examples]:
    longest = getattr(loaded.model.config, "max_position_embeddings", None)
    extra = config.adapter.num_virtual_tokens if config.adapter.method == "prompt" else 0
    if isinstance(longest, int) and config.data.block_size + extra > longest:
        raise DataError(
            f"data.block_size{' + adapter.num_virtual_tokens' if extra else ''} must be at most "
            f"{longest}, the model's longest input, got {config.data.block_size + extra}"
        )
    return load_federated_text(config.data, loaded.processor, config.seed)


def _read_images(config: Config, loaded: LoadedModel) -> FederatedData[Examples]:
    settings = loaded.model.config
    labels = {int(number): name for number, name in (settings.id2label or {}).items()}
    num_channels = getattr(settings, "num_channels", 3)
    return load_federated_images(config.data, loaded.processor, labels, num_channels, config.seed)


def _text_welcome(_: LoadedModel, __: FederatedData[Examples]) -> dict[str, Any]:
    return {}


def _image_welcome(loaded: LoadedModel, data: FederatedData[Examples]) -> dict[str, Any]:
    """Return the classes as the server numbers them: a device need not have images of all."""
    labels = {str(number): name for number, name in data.classes.items()}
    return {"labels": labels, "num_channels": getattr(loaded.model.config, "num_channels", 3)}


def _read_own_text(config: DataConfig, processor: Any, _: Mapping[str, Any], name: str) -> Examples:
    return load_own_text(config, processor, name)


def _read_own_images(
    config: DataConfig, processor: Any, welcome: Mapping[str, Any], name: str
) -> Examples:
    labels = {int(number): label for number, label in welcome["labels"].items()}
    return load_own_images(config, processor, labels, welcome["num_channels"], name)


TASKS: dict[schema.Task, Task] = {
    "causal_lm": Task(
        transformers.AutoModelForCausalLM,
        load_tokenizer,
        _read_text,
        _text_welcome,
        _read_own_text,
        "perplexity",
        "tokens",
    ),
    "image_classification": Task(
        transformers.AutoModelForImageClassification,
        load_image_processor,
        _read_images,
        _image_welcome,
        _read_own_images,
        "accuracy",
        "images",
    ),
}


def task_of(config: Config) -> Task:
    return TASKS[config.model.task]
