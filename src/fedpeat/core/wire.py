"""The wire format: named arrays and a plain JSON record in one safetensors file; never pickle.

Everything that participants exchange is a ``Payload``. Transports carry its bytes without looking
inside, so the bytes that a run reports are the length of what was sent.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedpeat.core.errors import WireError

__all__ = ["SCHEMA", "Payload", "decode", "digest", "encode"]

SCHEMA = 1
_RECORD_KEY = "fedpeat"
_MAX_HEADER_BYTES = 2**24  # a hostile header takes up to thirty times its length once it is read
_MAX_DEPTH = 64  # deeper records could be read here, and end a computation elsewhere


@dataclass(frozen=True)
class Payload:
    """What one message says.

    Attributes:
        arrays: Named tensors, of any shape; NumPy's own types (no bfloat16).
        record: Plain data that JSON can hold.
    """

    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)


def encode(payload: Payload) -> bytes:
    """Return the payload as the bytes that travel.

    Raises:
        WireError: If the record is not plain data or holds NaN or an infinity, or if an array has a
            type that safetensors does not know.
    """
    try:
        record = json.dumps({"schema": SCHEMA, "record": dict(payload.record)}, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise WireError(f"a message's record must be plain finite JSON: {error}") from error
    # np.ascontiguousarray would give an array without axes one
    arrays = {name: np.asarray(array, order="C") for name, array in payload.arrays.items()}
    try:
        return bytes(save(arrays, metadata={_RECORD_KEY: record}))
    except (SafetensorError, ValueError) as error:
        raise WireError(f"a message's arrays must be numbers with plain names: {error}") from error


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256 of named arrays, whatever their order."""
    return hashlib.sha256(encode(Payload(arrays))).hexdigest()


def decode(content: bytes, max_bytes: int | None = None) -> Payload:
    """Return the payload of a message, checked for form but not yet for meaning.

    Args:
        content: The message.
        max_bytes: Length up to which it is read at all [B]; None for any.

    Raises:
        WireError: If the bytes are cut short, damaged, of another schema, too many, or not a
            message at all.
    """
    if max_bytes is not None and len(content) > max_bytes:
        raise WireError(f"a message must have at most {max_bytes} bytes here, got {len(content)}")
    length = int.from_bytes(content[:8], "little")
    if length > _MAX_HEADER_BYTES:
        raise WireError(
            f"not a fedpeat message of {len(content)} bytes: its header must have at most "
            f"{_MAX_HEADER_BYTES} bytes, got {length}"
        )
    try:
        arrays = load(content)
        envelope = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][_RECORD_KEY])
        schema, record = envelope["schema"], envelope["record"]
        json.dumps(record, allow_nan=False)  # the reader takes NaN, which no honest sender writes
    except (
        SafetensorError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise WireError(f"not a fedpeat message of {len(content)} bytes: {error!r:.300}") from error
    if type(schema) is not int or schema != SCHEMA:
        raise WireError(f"message schema must be {SCHEMA}, got {schema!r}")
    if not isinstance(record, dict):
        raise WireError(f"a message's record must be a mapping, got {type(record).__name__}")
    if _is_deeper(record, _MAX_DEPTH):
        raise WireError(
            f"not a fedpeat message of {len(content)} bytes: its record must be at most "
            f"{_MAX_DEPTH} levels deep"
        )
    return Payload(arrays, record)


def _is_deeper(value: object, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
    return bool(level)
