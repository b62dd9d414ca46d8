"""Where a corpus comes from: one table of sources, one file each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fedpeat.config.schema import DataConfig
from fedpeat.core.errors import DataError
from fedpeat.data.documents import Corpus, Document
from fedpeat.data.files import (
    is_local,
    looks_like_path,
    read_files,
    read_local_documents,
    require_disjoint,
)
from fedpeat.data.hub import is_dataset_folder, read_hub, read_split
from fedpeat.data.records import Fields
from fedpeat.data.stdlib import read_stdlib

__all__ = ["SOURCES", "read_corpus", "source_kind"]

SOURCES: dict[str, Callable[[DataConfig, int], Corpus[Document]]] = {
    "stdlib": read_stdlib,
    "files": read_files,
    "hub": read_hub,
}


def source_kind(source: str) -> str:
    """Return the key of a source in ``SOURCES``; a folder with a dataset card is a Hub dataset."""
    if source == "stdlib":
        return "stdlib"
    if is_local(source) and not is_dataset_folder(source):
        return "files"
    return "hub"


def read_corpus(config: DataConfig, seed: int) -> Corpus[Document]:
    """Read a source, and the validation and test sources where they are given.

    Raises:
        DataError: If a source is missing, empty or malformed, or is also a held-out source.
    """
    corpus = SOURCES[source_kind(config.source)](config, seed)
    if config.validation_source:
        documents = _read_held_out(config, "data.validation_source", config.validation_source)
        corpus = replace(corpus, validation=documents)
    if config.test_source:
        documents = _read_held_out(config, "data.test_source", config.test_source)
        corpus = replace(corpus, test=documents)
    return corpus


def _read_held_out(config: DataConfig, setting: str, source: str) -> tuple[Document, ...]:
    fields = Fields.of(config).without_owner()
    kind = source_kind(config.source)
    if kind == "hub" and not looks_like_path(source):
        if source == config.split:
            raise DataError(f"{setting} must be another split than data.split, got {source!r}")
        return read_split(config.source, config.subset, source, fields)
    if kind == "files":
        require_disjoint(setting, source, config.source)
    return read_local_documents(source, fields)
