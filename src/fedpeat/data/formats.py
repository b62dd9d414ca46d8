"""Readers of local files, one function per format; each yields records and where they stand."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from fedpeat.core.errors import DataError
from fedpeat.data.records import Fields, Record, require_fields

__all__ = ["READERS", "Reader", "read_whole_text", "split_text"]

Reader = Callable[[Path, Fields], Iterator[Record]]

PIECE_CHARACTERS = 2_000
_CSV_FIELD_LIMIT = 2**31 - 1


def read_whole_text(path: Path) -> str:
    # "utf-8-sig" drops the byte-order mark that some editors put first.
    return path.read_text(encoding="utf-8-sig")


def split_text(text: str, max_characters: int = PIECE_CHARACTERS) -> list[str]:
    """Cut a text at blank lines into pieces of at most ``max_characters``; joined, they are it.

    A paragraph that is longer is cut at line ends, and a line that is longer anywhere.
    """
    pieces = [""]
    for unit in _units(text, max_characters):
        if pieces[-1] and len(pieces[-1]) + len(unit) > max_characters:
            pieces.append("")
        pieces[-1] += unit
    return [piece for piece in pieces if piece]


def _units(text: str, max_characters: int) -> Iterator[str]:
    parts = re.split(r"(\n[^\S\n]*\n\s*)", text)
    gaps = [*parts[1::2], ""]
    for paragraph, gap in zip(parts[::2], gaps, strict=True):
        if len(paragraph) + len(gap) <= max_characters:
            yield paragraph + gap
            continue
        for line in (paragraph + gap).splitlines(keepends=True):
            for start in range(0, len(line), max_characters):
                yield line[start : start + max_characters]


def read_text(path: Path, fields: Fields) -> Iterator[Record]:
    """Yield the pieces of a text file as its only field, which ``text_field`` need not name."""
    for setting, name in fields.settings.items():
        if setting != "data.text_field":
            raise DataError(f"{path}: a text file has no fields, but {setting} is {name!r}")
    for number, piece in enumerate(split_text(read_whole_text(path)), start=1):
        yield f"{path}, piece {number}", {fields.text: piece}


def read_jsonl(path: Path, _fields: Fields) -> Iterator[Record]:
    """Yield the object on each line; blank lines are skipped."""
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path}, line {number}"
                yield where, _require_object(where, _parse_json(where, line))


def read_json(path: Path, _fields: Fields) -> Iterator[Record]:
    """Yield the objects of a list, or of the only list inside an object."""
    value = _parse_json(str(path), read_whole_text(path))
    if isinstance(value, dict):
        lists = {name: inner for name, inner in value.items() if isinstance(inner, list)}
        if len(lists) != 1:
            found = ", ".join(lists) or "none"
            raise DataError(f"{path}: a JSON object must hold exactly one list, got {found}")
        (value,) = lists.values()
    if not isinstance(value, list):
        raise DataError(f"{path}: must hold a list of records, got {type(value).__name__}")
    for number, record in enumerate(value, start=1):
        where = f"{path}, record {number}"
        yield where, _require_object(where, record)


def _parse_json(where: str, text: str) -> object:
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error})") from error
    return value


def _require_object(where: str, value: object) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: must be an object with fields, got {type(value).__name__}")
    return value


def read_csv(path: Path, _fields: Fields) -> Iterator[Record]:
    """Yield the rows of a CSV file whose first row names the fields."""
    old_limit = csv.field_size_limit(_CSV_FIELD_LIMIT)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from _csv_rows(path, csv.reader(file, strict=True))
    finally:
        csv.field_size_limit(old_limit)


def _csv_rows(path: Path, rows: Iterator[list[str]]) -> Iterator[Record]:
    try:
        names = next(rows, [])
        if len(set(names)) != len(names):
            raise DataError(f"{path}: two columns have the same name: {', '.join(names)}")
        for number, row in enumerate(rows, start=2):
            if not row:
                continue
            if len(row) != len(names):
                raise DataError(
                    f"{path}, row {number}: must have {len(names)} columns, got {len(row)}"
                )
            yield f"{path}, row {number}", dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}: not valid CSV ({error})") from error


def read_parquet(path: Path, fields: Fields) -> Iterator[Record]:
    """Yield the rows of a Parquet file; only the columns in use are read."""
    # Imported here because it is slow, and only Parquet files need it.
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.parquet as pq  # noqa: PLC0415

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            require_fields(str(path), file.schema_arrow.names, fields)
            columns = sorted(set(fields.settings.values()))
            for batch in file.iter_batches(columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", record
    except (pa.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path}: not a readable Parquet file ({reason})") from error


READERS: dict[str, Reader] = {
    ".csv": read_csv,
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
    ".txt": read_text,
}
