"""A dataset of the Hugging Face Hub as a source, or a local folder in the Hub's form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fedpeat.config.schema import DataConfig
from fedpeat.core.errors import DataError
from fedpeat.data.documents import Corpus, Document
from fedpeat.data.files import expand_home
from fedpeat.data.records import Fields, Record, documents_from_records, require_fields

__all__ = ["is_dataset_folder", "load_split", "read_hub", "read_split"]

DATASET_CARD = "README.md"


def is_dataset_folder(source: str) -> bool:
    """Return whether a folder has a dataset card, a README that opens with YAML between dashes."""
    card = expand_home(source) / DATASET_CARD
    try:
        with card.open("rb") as file:
            return file.readline().rstrip() == b"---"
    except OSError:
        return False


def read_hub(config: DataConfig, _seed: int) -> Corpus[Document]:
    """Read ``data.split`` of a Hub dataset."""
    fields = Fields.of(config)
    return Corpus(documents=read_split(config.source, config.subset, config.split, fields))


def read_split(name: str, subset: str | None, split: str, fields: Fields) -> tuple[Document, ...]:
    """Read the documents of one split.

    Raises:
        DataError: If the dataset cannot be loaded, lacks a field or has no text.
    """
    rows = load_split(name, subset, split)
    where = f"dataset {name!r}, split {split!r}"
    require_fields(where, rows.column_names, fields)
    documents = tuple(documents_from_records(_records(where, rows, fields), fields))
    if not documents:
        raise DataError(f"{where}: field {fields.text!r} has no text")
    return documents


def load_split(name: str, subset: str | None, split: str) -> Any:
    # Imported here because it takes seconds, and only Hub datasets need it.
    import datasets  # noqa: PLC0415

    try:
        return datasets.load_dataset(str(expand_home(name)), subset, split=split)
    # The library has no common error: network, card, script and format faults are all unrelated.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise DataError(f"cannot load split {split!r} of dataset {name!r}: {reason}") from error


def _records(where: str, rows: Any, fields: Fields) -> Iterator[Record]:
    columns = sorted(set(fields.settings.values()))
    for number, row in enumerate(rows.select_columns(columns), start=1):
        yield f"{where}, row {number}", row
