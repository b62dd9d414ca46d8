"""A payload's bytes as one array of a Flower message, untouched."""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedpeat.core.errors import WireError

__all__ = ["from_records", "to_records"]

_STYPE = "fedpeat"  # never numpy's: nobody but us is to read it


def to_records(kind: str, content: bytes) -> RecordDict:
    """Return the records of a message."""
    array = Array("uint8", (len(content),), _STYPE, content)
    return RecordDict(
        {"content": ArrayRecord({"bytes": array}), "kind": ConfigRecord({"kind": kind})}
    )


def from_records(records: RecordDict) -> tuple[str, bytes]:
    """Return kind and content of a message.

    Raises:
        WireError: If the records are not those of a message.
    """
    try:
        array = records.array_records["content"]["bytes"]
        kind = records.config_records["kind"]["kind"]
    except KeyError as error:
        raise WireError(f"not a fedpeat message: it lacks {error}") from error
    if array.stype != _STYPE or not isinstance(kind, str):
        raise WireError(f"not a fedpeat message: its array is {array.stype!r}, its kind {kind!r}")
    return kind, array.data
