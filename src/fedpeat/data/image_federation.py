"""The images of a federation: read, held out, shared out, their classes numbered."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedpeat.config.schema import DataConfig
from fedpeat.core.errors import ConfigError, DataError
from fedpeat.data.documents import Corpus
from fedpeat.data.examples import FederatedData
from fedpeat.data.federation import share_out
from fedpeat.data.files import expand_home, is_local
from fedpeat.data.hub import is_dataset_folder
from fedpeat.data.image_files import is_archive, read_image_files
from fedpeat.data.image_hub import read_image_split
from fedpeat.data.images import ImageInputs, ImageSet, LabelledImage
from fedpeat.data.partition import require_partition_settings

__all__ = ["class_numbers", "load_federated_images", "load_own_images", "read_image_corpus"]

_MAX_NAMED = 5


def load_federated_images(
    config: DataConfig, processor: Any, labels: Mapping[int, str], num_channels: int, seed: int
) -> FederatedData[ImageSet]:
    """Read the source, hold images out and share the others out to clients.

    Args:
        config: Where the images are, and how they are shared out.
        processor: The network's image processor.
        labels: The classes that the network knows, by number.
        num_channels: Channels that the network takes.
        seed: Seed of what is held out and of the partition.

    Raises:
        ConfigError: If a setting is missing, or of no use for images.
        DataError: If a source is missing or damaged, has a class that the network does not know,
            or leaves a client or split without images.
    """
    require_partition_settings(config, labelled=True)
    if config.max_tokens_per_client is not None:
        raise ConfigError(
            "data.max_tokens_per_client must be None for images, got "
            f"{config.max_tokens_per_client}; set data.max_examples_per_client"
        )
    maker = ImageInputs(processor, num_channels)
    corpus, classes = read_image_corpus(config, maker)
    numbers = class_numbers(_names(corpus), classes, labels)
    shared = share_out(corpus, config, seed)

    def held_out(name: str, images: Sequence[LabelledImage]) -> ImageSet:
        if not images:
            raise DataError(
                f"the {name} split has no images; raise data.{name}_ratio, or bring more images"
            )
        return ImageSet.of(images, numbers, maker)

    most = config.max_examples_per_client
    clients = {name: ImageSet.of(own, numbers, maker) for name, own in shared.clients.items()}
    return FederatedData(
        clients={name: own.spread(most) if most else own for name, own in clients.items()},
        server=held_out("server", shared.server) if config.server_ratio else None,
        validation=held_out("validation", shared.validation).spread(config.max_eval_blocks),
        test=held_out("test", shared.test).spread(config.max_eval_blocks),
        classes={number: name for name, number in numbers.items()},
    )


def load_own_images(
    config: DataConfig, processor: Any, labels: Mapping[int, str], num_channels: int, name: str
) -> ImageSet:
    """Read the images of one owner, who has all of the source.

    Args:
        config: Where the images are.
        processor: The network's image processor.
        labels: Name of each class by its number, as the owner of the network has them.
        num_channels: Channels that the network takes.
        name: Of the owner.

    Raises:
        DataError: If the source is missing or damaged, empty, or has a class that the network does
            not know.
    """
    maker = ImageInputs(processor, num_channels)
    corpus, _ = read_image_corpus(config, maker)
    if not corpus.documents:
        raise DataError(f"{name} must have at least one image, got none in {config.source}")
    numbers = {label: number for number, label in labels.items()}
    _require_known(_names(corpus), numbers, labels)
    own = ImageSet.of(corpus.documents, numbers, maker)
    return own.spread(config.max_examples_per_client) if config.max_examples_per_client else own


def read_image_corpus(
    config: DataConfig, maker: ImageInputs
) -> tuple[Corpus[LabelledImage], tuple[str, ...]]:
    """Read a source of images, and the validation and test sources where they are given.

    Returns:
        The images, and the classes in the source's own order, if it has one.
    """
    if config.source == "stdlib":
        raise DataError(
            "data.source 'stdlib' has no images; give a folder, an archive or a dataset with "
            "images, or set model.task to causal_lm"
        )
    images, classes = _read(config, config.source, config.split, maker)
    corpus = Corpus[LabelledImage](images)
    for name in ("validation", "test"):
        source = getattr(config, f"{name}_source")
        if source:
            corpus = replace(corpus, **{name: _read_held_out(config, name, source, maker)})
    return corpus, classes


def _is_of_files(source: str) -> bool:
    return is_archive(source) or (is_local(source) and not is_dataset_folder(source))


def _read(
    config: DataConfig, source: str, split: str, maker: ImageInputs
) -> tuple[list[LabelledImage], tuple[str, ...]]:
    if _is_of_files(source):
        return read_image_files(source, split, maker), ()
    return read_image_split(config, split, maker, with_owner=config.partition == "natural")


def _read_held_out(
    config: DataConfig, name: str, source: str, maker: ImageInputs
) -> list[LabelledImage]:
    """Read a held-out source: a path of its own, or another split of the source tuned on."""
    setting = f"data.{name}_source"
    if _is_of_files(source):
        if expand_home(source).resolve() == expand_home(config.source).resolve():
            raise DataError(
                f"{setting} and data.source are both {source!r}: images that are tuned on cannot "
                "be held out; name a folder inside it, such as 'test'"
            )
        return read_image_files(source, name, maker)
    if source == config.split:
        raise DataError(f"{setting} must be another split than data.split, got {source!r}")
    if _is_of_files(config.source):
        return read_image_files(config.source, source, maker, must_be_named=True)
    return read_image_split(config, source, maker, with_owner=False)[0]


def _names(corpus: Corpus[LabelledImage]) -> set[str]:
    parts = (corpus.documents, corpus.validation or (), corpus.test or ())
    return {image.label for part in parts for image in part}


def class_numbers(
    names: set[str], classes: Sequence[str], labels: Mapping[int, str]
) -> dict[str, int]:
    """Return the number that a network gives each class.

    Classes go by the names in the network's configuration. Where it has none (LABEL_0, LABEL_1,
    ...), classes that are numbers stand for themselves, and others are counted in the order of the
    dataset, or else of their names.

    Raises:
        DataError: If the network does not know a class.
    """
    if all(re.fullmatch(r"LABEL_\d+", name) for name in labels.values()):
        if all(name.isdecimal() for name in names):
            numbers = {str(number): number for number in labels}
            numbers |= {name: int(name) for name in names}
        else:
            numbers = {name: i for i, name in enumerate(classes or sorted(names))}
    else:
        numbers = {name: number for number, name in labels.items()}
    _require_known(names, numbers, labels)
    return numbers


def _require_known(names: set[str], numbers: Mapping[str, int], labels: Mapping[int, str]) -> None:
    unknown = sorted(name for name in names if numbers.get(name) not in labels)
    if unknown:
        named = ", ".join(map(repr, unknown[:_MAX_NAMED]))
        more = f" and {len(unknown) - _MAX_NAMED} more" if len(unknown) > _MAX_NAMED else ""
        known = ", ".join(list(labels.values())[:_MAX_NAMED])
        raise DataError(
            f"the model has no class for {named}{more}; its {len(labels)} are {known}"
            f"{', ...' if len(labels) > _MAX_NAMED else ''}"
        )
