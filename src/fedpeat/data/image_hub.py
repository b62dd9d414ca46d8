"""A dataset of the Hugging Face Hub with a column of images and one of labels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedpeat.config.schema import DataConfig
from fedpeat.core.errors import DataError
from fedpeat.data.hub import load_split
from fedpeat.data.image_files import decode
from fedpeat.data.images import ImageInputs, LabelledImage

__all__ = ["DEFAULT_LABEL_FIELD", "read_image_split"]

DEFAULT_LABEL_FIELD = "label"


def read_image_split(
    config: DataConfig, split: str, maker: ImageInputs, *, with_owner: bool
) -> tuple[list[LabelledImage], tuple[str, ...]]:
    """Read one split of a dataset.

    Returns:
        The images, and the names of the classes in the dataset's own order, if it has one.

    Raises:
        DataError: If the dataset cannot be loaded, lacks a column, or a row has no image or label.
    """
    from datasets import ClassLabel, Image  # noqa: PLC0415 - slow, and only datasets need it

    rows = load_split(config.source, config.subset, split)
    where = f"dataset {config.source!r}, split {split!r}"
    label_field = config.label_field or DEFAULT_LABEL_FIELD
    key_field = config.key_field if with_owner else None
    wanted = {"data.image_field": config.image_field, "data.label_field": label_field}
    wanted |= {"data.key_field": key_field} if key_field else {}
    for setting, name in wanted.items():
        if name not in rows.column_names:
            listing = ", ".join(rows.column_names)
            raise DataError(f"{where}: no column {name!r} ({setting}); columns: {listing}")
    feature = rows.features[config.image_field]
    if not isinstance(feature, Image):
        raise DataError(
            f"{where}: column {config.image_field!r} (data.image_field) must hold images, got "
            f"{feature}"
        )
    labels = rows.features[label_field]
    classes = tuple(labels.names) if isinstance(labels, ClassLabel) else ()
    rows = rows.select_columns(list(wanted.values()))
    rows = rows.cast_column(config.image_field, Image(decode=False))
    images = []
    for number, row in enumerate(rows, start=1):
        place = f"{where}, row {number}"
        pixels, is_fitted = maker.smaller(
            decode(place, _content(place, row[config.image_field]), maker.num_channels)
        )
        label = _label(place, row[label_field], classes)
        key = str(row[key_field]) if key_field else ""
        images.append(LabelledImage(pixels, is_fitted, label, key))
    return images, classes


def _content(where: str, value: Mapping[str, Any] | None) -> bytes:
    if value and value.get("bytes"):
        return bytes(value["bytes"])
    if value and value.get("path"):
        try:
            return Path(value["path"]).read_bytes()
        except OSError as error:
            raise DataError(f"{where}: image cannot be read ({error})") from error
    raise DataError(f"{where}: has no image")


def _label(where: str, value: object, classes: tuple[str, ...]) -> str:
    if classes and isinstance(value, int) and 0 <= value < len(classes):
        return classes[value]
    if classes or not isinstance(value, str | int) or isinstance(value, bool):
        raise DataError(f"{where}: must have a label, a name or a number, got {value!r:.60}")
    return str(value)
