"""Writes what each simulated device of a run owns, so that real devices can have the same."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from fedpeat.config.schema import Config
from fedpeat.core.errors import ConfigError, DataError
from fedpeat.core.run_folder import replace_folder, storage_errors, write_atomically
from fedpeat.data.federation import load_federated_documents
from fedpeat.data.images import ImageSet
from fedpeat.experiments.plugged import load_full_model
from fedpeat.experiments.tasks import task_of

__all__ = ["write_shards"]


def write_shards(config: Config, folder: Path) -> list[Path]:
    """Write what each device has; return a file or a folder for each.

    Text goes into ``NAME.jsonl``, a line of which has the fields "text", "prompt", "label" and
    "key"; images, in the network's size where they are not smaller, into a folder ``NAME`` with a
    folder for each class.

    Raises:
        ConfigError: If there is a folder of a device's name already.
        DataError: If the source is missing or malformed, or a name is none that a file can have.
        StorageError: If the folder cannot be written.
    """
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    writes = _write_text if config.model.task == "causal_lm" else _write_images
    return writes(config, folder)


def _write_text(config: Config, folder: Path) -> list[Path]:
    clients = load_federated_documents(config.data, config.seed).clients
    _require_plain("device", clients)
    paths = []
    for name, documents in clients.items():
        lines = [
            json.dumps({"text": d.text, "prompt": d.prompt, "label": d.label, "key": d.key})
            for d in documents
        ]
        paths.append(folder / f"{name}.jsonl")
        write_atomically(paths[-1], "".join(f"{line}\n" for line in lines))
    return paths


def _write_images(config: Config, folder: Path) -> list[Path]:
    data = task_of(config).read(config, load_full_model(config))
    _require_plain("device", data.clients)
    _require_plain("class", data.classes.values())
    paths = [folder / name for name in data.clients]
    for path in paths:
        if path.exists():
            raise ConfigError(f"{path} is there already; name another folder for the shards")
    for path, images in zip(paths, data.clients.values(), strict=True):
        assert isinstance(images, ImageSet), "the task is one of images"
        with replace_folder(path) as temporary:
            _fill(temporary, images, data.classes)
    return paths


def _fill(folder: Path, images: ImageSet, classes: Mapping[int, str]) -> None:
    """Write each image into the folder of its class, without loss."""
    # Imported here because only runs on images need it.
    from PIL import Image  # noqa: PLC0415

    width = len(str(images.num_examples - 1))
    for place, (pixels, number) in enumerate(zip(images.pixels, images.classes, strict=True)):
        home = folder / classes[int(number)]
        home.mkdir(exist_ok=True)
        picture = pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)
        Image.fromarray(picture).save(home / f"{place:0{width}}.png")


def _require_plain(what: str, names: Iterable[str]) -> None:
    for name in names:
        if name.startswith(".") or Path(name).name != name or "\0" in name:
            raise DataError(f"a {what} must have a name that a file can have, got {name!r}")
