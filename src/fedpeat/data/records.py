"""From the records of a file or dataset to documents."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from fedpeat.config.schema import DataConfig
from fedpeat.core.errors import DataError
from fedpeat.data.documents import Document

__all__ = ["Fields", "Record", "documents_from_records", "require_fields"]

Record = tuple[str, Mapping[str, object]]
"""Where a record stands, for error messages, and its fields."""


@dataclass(frozen=True)
class Fields:
    """Names of the fields that make up a document; None for what the records do not have."""

    text: str
    prompt: str | None = None
    context: str | None = None
    key: str | None = None
    label: str | None = None

    @classmethod
    def of(cls, config: DataConfig) -> Fields:
        return cls(
            text=config.text_field,
            prompt=config.prompt_field,
            context=config.context_field,
            key=config.key_field,
            label=config.label_field,
        )

    def without_owner(self) -> Fields:
        """Return the fields that a held-out split needs, where nobody owns a document."""
        return Fields(self.text, self.prompt, self.context)

    @property
    def settings(self) -> dict[str, str]:
        """The fields in use, by the setting that names them."""
        names = {
            "data.text_field": self.text,
            "data.prompt_field": self.prompt,
            "data.context_field": self.context,
            "data.key_field": self.key,
            "data.label_field": self.label,
        }
        return {setting: name for setting, name in names.items() if name is not None}


def require_fields(where: str, available: Collection[str], fields: Fields) -> None:
    """Raise a DataError that lists the available fields if one of ``fields`` is missing."""
    for setting, name in fields.settings.items():
        if name not in available:
            close = difflib.get_close_matches(name, available, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            listing = ", ".join(map(str, available)) or "none"
            raise DataError(f"{where}: no field {name!r} ({setting}); {hint}fields: {listing}")


def documents_from_records(
    records: Iterable[Record], fields: Fields, default_key: str = ""
) -> Iterator[Document]:
    """Yield the document of each record; records whose text is blank or null are left out."""
    for where, record in records:
        require_fields(where, record.keys(), fields)
        text = _text(where, record, fields.text)
        if text.strip():
            yield Document(
                text=text,
                key=_name(where, record, fields.key) if fields.key is not None else default_key,
                label=_name(where, record, fields.label) if fields.label is not None else "",
                prompt=_prompt(where, record, fields),
            )


def _prompt(where: str, record: Mapping[str, object], fields: Fields) -> str:
    names = [name for name in (fields.prompt, fields.context) if name is not None]
    parts = [_text(where, record, name) for name in names]
    return "".join(part + "\n" for part in parts if part)


def _text(where: str, record: Mapping[str, object], name: str) -> str:
    value = record[name]
    if value is None or _is_nan(value):
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: field {name!r} must be text, got {type(value).__name__}")
    # JSON can spell half of a surrogate pair, which no tokenizer accepts.
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: field {name!r} is not valid Unicode "
            f"(lone surrogate at character {error.start})"
        ) from error
    return value


def _name(where: str, record: Mapping[str, object], name: str) -> str:
    value = record[name]
    if isinstance(value, str | int | float) and str(value).strip() and not _is_nan(value):
        return _text(where, {name: str(value)}, name)
    raise DataError(f"{where}: field {name!r} must be a name or number, got {value!r:.60}")


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)
