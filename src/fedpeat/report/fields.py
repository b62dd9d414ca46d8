"""Strict reading of a run's JSON: a fault is one line with file, place, field, allowed and got."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpeat.core.errors import DataError

__all__ = ["Fields", "finite", "parse_object", "read_record", "read_text"]

_MAX_SHOWN = 60


def read_text(path: Path) -> str:
    """Return a file's text; DataError if it cannot be read or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: must be UTF-8 text, got byte {error.start} of another encoding"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def finite(value: object) -> Any:
    """Return JSON data with None in place of every number that is not finite: JSON has no NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list) else value


def read_record(path: Path) -> Fields | None:
    """Return what a file of schema 1 says; None where there is none.

    Raises:
        DataError: If it cannot be read, is no JSON object, or of another schema.
    """
    if not path.is_file():
        return None
    fields = parse_object(read_text(path), str(path))
    if fields.number("schema") != 1:
        raise fields.fault("schema", "1")
    return fields


def parse_object(text: str, where: str) -> Fields:
    """Return the JSON object in text; NaN, Infinity and what no float can hold stay as not finite.

    Args:
        text: One JSON object.
        where: File and line for errors.

    Raises:
        DataError: If text is not JSON or not an object.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: broken JSON at character {error.pos + 1}: {error.msg}"
        ) from error
    except (
        ValueError,
        RecursionError,
    ) as error:  # an integer of thousands of digits; nesting without end
        raise DataError(f"{where}: broken JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: must be a JSON object, got {_shown(value)}")
    return Fields(value, where)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."


@dataclass(frozen=True)
class Fields:
    """A JSON object and where it stands; absent and null are both None."""

    values: Mapping[str, object]
    where: str

    def fault(self, name: str, allowed: str) -> DataError:
        """Return the error for a field that is not as allowed."""
        got = _shown(self.values[name]) if name in self.values else "nothing"
        return DataError(f"{self.where}: {name} must be {allowed}, got {got}")

    def number(self, name: str) -> float | None:
        """Return a number, which may be not finite."""
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fault(name, "a number or null")
        return _as_float(value)

    def measured(self, name: str) -> float | None:
        """Return a number that is there whenever it was measured, so that null means not finite.

        JSON has no NaN, and a run writes null in its place.
        """
        if name in self.values and self.values[name] is None:
            return math.nan
        return self.number(name)

    def amount(self, name: str) -> float | None:
        """Return a number that cannot be below 0: a count, bytes, seconds."""
        value = self.number(name)
        if value is not None and value < 0:
            raise self.fault(name, "0 or more")
        return value

    def whole(self, name: str) -> int:
        """Return a required whole number, 0 or more."""
        value = self.amount(name)
        if value is None or not math.isfinite(value) or value != int(value):
            raise self.fault(name, "a whole number, 0 or more")
        return int(value)

    def text(self, name: str) -> str:
        """Return a text, empty if absent."""
        value = self.values.get(name)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise self.fault(name, "a text")
        return value

    def choice(self, name: str, allowed: tuple[str, ...]) -> str:
        """Return a required text that is one of those allowed."""
        value = self.values.get(name)
        if not isinstance(value, str) or value not in allowed:
            raise self.fault(name, "one of " + ", ".join(allowed))
        return value

    def child(self, name: str) -> Fields | None:
        """Return an object."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.fault(name, "an object or null")
        return Fields(value, f"{self.where}: {name}")

    def children(self, name: str) -> tuple[Fields, ...]:
        """Return a list of objects, empty if absent."""
        value = self.values.get(name)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self.fault(name, "a list of objects")
        return tuple(Fields(item, f"{self.where}: {name}[{i}]") for i, item in enumerate(value))

    def texts(self, name: str) -> tuple[str, ...]:
        """Return a list of texts, empty if absent."""
        value = self.values.get(name)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.fault(name, "a list of texts")
        return tuple(value)

    def numbers(self, name: str) -> tuple[float | None, ...] | None:
        """Return a list of numbers, each of which may be null."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, list):
            raise self.fault(name, "a list of numbers or null")
        items = Fields({str(i): item for i, item in enumerate(value)}, f"{self.where}: {name}")
        return tuple(items.number(key) for key in items.values)


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # JSON integers have no largest value, floats do
        return math.inf if value > 0 else -math.inf
