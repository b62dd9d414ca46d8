"""Local files as a source: one file, a folder, or a glob."""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path

from fedpeat.config.schema import DataConfig
from fedpeat.core.errors import DataError
from fedpeat.data.documents import Corpus, Document
from fedpeat.data.formats import READERS, read_whole_text
from fedpeat.data.records import Fields, Record, documents_from_records

__all__ = [
    "expand_home",
    "find_files",
    "is_local",
    "looks_like_path",
    "read_files",
    "read_local_documents",
    "require_disjoint",
]


_IF_IMAGES = "for images set model.task image_classification"


def looks_like_path(source: str) -> bool:
    """Return whether a source is written as only paths are: a known suffix, a glob, ./ in front."""
    return (
        source.startswith((".", "/", "~", "\\"))
        or re.match(r"[A-Za-z]:[\\/]", source) is not None
        or any(sign in source for sign in "*?")
        or Path(source).suffix.lower() in READERS
    )


def is_local(source: str) -> bool:
    """Return whether a source exists on disk, or can only be meant as a path."""
    return looks_like_path(source) or _exists(expand_home(source))


def expand_home(source: str) -> Path:
    """Return a source as a path, with a leading ~ replaced where the home folder is known."""
    try:
        return Path(source).expanduser()
    except RuntimeError:
        return Path(source)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # such as a name that is longer than the file system allows
        return False


def find_files(source: str) -> list[Path]:
    """Return the files that a path, folder or glob stands for, in the order of their names.

    Raises:
        DataError: If there are none, or one has a format that cannot be read.
    """
    path = expand_home(source)
    if _exists(path):
        return _files_in(path, source) if path.is_dir() else [_require_format(path)]
    if not glob.has_magic(source):
        raise DataError(f"no such file: {source!r}{_hint(path)}")
    # Unlike Path.glob, this takes absolute patterns and leaves out hidden files.
    names = glob.glob(str(path), recursive=True)  # noqa: PTH207
    matches = [Path(name) for name in sorted(names)]
    files = [_require_format(path) for path in matches if path.is_file()]
    if not files:
        raise DataError(f"no file matches {source!r}")
    return files


def _files_in(folder: Path, source: str) -> list[Path]:
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in READERS and path.is_file() and not _is_hidden(path, folder)
    ]
    if not files:
        raise DataError(
            f"folder {source!r} has no file of a known format: {', '.join(READERS)}; {_IF_IMAGES}"
        )
    return files


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _require_format(path: Path) -> Path:
    if path.suffix.lower() not in READERS:
        raise DataError(
            f"{path}: format must be one of {', '.join(READERS)}, got {path.suffix!r}; {_IF_IMAGES}"
        )
    return path


def _hint(path: Path) -> str:
    try:
        names = [neighbour.name for neighbour in path.parent.iterdir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def read_files(config: DataConfig, _seed: int) -> Corpus[Document]:
    """Read local files; without ``key_field``, a file's name is the key of its documents."""
    # Where a file is an owner it has to be divisible, so that every owner can hold some out.
    divisible = config.partition == "natural"
    documents = read_local_documents(config.source, Fields.of(config), divisible=divisible)
    return Corpus(documents=documents)


def read_local_documents(
    source: str, fields: Fields, *, divisible: bool = True
) -> tuple[Document, ...]:
    """Read the documents of a path, folder or glob.

    Args:
        source: A path, folder or glob.
        fields: Names of the fields of a document.
        divisible: Whether text files are cut into pieces of some paragraphs even where there are
            several; a text file that stands alone always is. Otherwise each is one document.

    Raises:
        DataError: If a file is missing, unreadable or malformed, or no document has text.
    """
    files = find_files(source)
    folder = os.path.commonpath([path.parent for path in files])
    whole_texts = len(files) > 1 and not divisible
    documents: list[Document] = []
    for path in files:
        name = path.relative_to(folder).as_posix()
        documents.extend(
            documents_from_records(_records(path, fields, whole_texts=whole_texts), fields, name)
        )
    if not documents:
        raise DataError(f"{source!r} has no text: each of its {len(files)} files is empty or blank")
    return tuple(documents)


def _records(path: Path, fields: Fields, *, whole_texts: bool) -> Iterator[Record]:
    try:
        if whole_texts and path.suffix.lower() == ".txt" and fields == Fields(fields.text):
            yield str(path), {fields.text: read_whole_text(path)}
        else:
            yield from READERS[path.suffix.lower()](path, fields)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 text (byte 0x{error.object[error.start]:02x}); save it as UTF-8"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def require_disjoint(setting: str, held_out: str, source: str) -> None:
    """Raise a DataError if a held-out source shares a file with the source to tune on."""
    tuned = {path.resolve() for path in find_files(source)}
    shared = [path for path in find_files(held_out) if path.resolve() in tuned]
    if shared:
        raise DataError(
            f"{setting} {held_out!r} and data.source {source!r} share {shared[0]}: "
            "text that is tuned on cannot be held out"
        )
