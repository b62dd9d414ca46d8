"""What an update must be to enter the average; a rule names what, allowed and got. NumPy only."""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedpeat.core.errors import WireError
from fedpeat.core.wire import Payload
from fedpeat.federated.aggregation import update_norm

__all__ = [
    "MAX_ANSWER_BYTES",
    "Limits",
    "check_entries",
    "check_held",
    "check_num_examples",
    "longest_update",
    "one_line",
    "screen",
    "shown",
]

MAX_ANSWER_BYTES = 2**20
"""Longest message without tensors that is read: what a device says of itself is half of it."""

_MAX_NAMES = 3
_MAX_TEXT = 300
_NAMING_BYTES = 256  # type, shape and place of a tensor
_MAX_HELD = 4096  # blocks of all rungs that a device may hold at a time
_MAX_TOKENS = 2**53  # past it, JSON readers lose whole numbers
_MAX_NUMBER = 1e12  # no loss or duration comes near it; means and sums of such numbers stay finite


@dataclass(frozen=True)
class Limits:
    """Bounds on one update.

    Attributes:
        max_examples: Most examples that a participant may claim.
        max_update_norm: Largest Euclidean distance from the round's adapter; None for no bound.
    """

    max_examples: int
    max_update_norm: float | None = None


def screen(
    payload: Payload, current: Mapping[str, np.ndarray], expected: Mapping[str, Any], limits: Limits
) -> None:
    """Check one reply to a "train" task.

    Args:
        payload: The reply.
        current: The round's adapter, which says what names, shapes and types are right.
        expected: Record entries that must come back as they were sent (round, emulator), or must
            not be there (losses, where examples are hidden).
        limits: Bounds.

    Raises:
        WireError: If anything is wrong; the text says what.
    """
    check_entries(payload.record, expected)
    check_num_examples(payload.record.get("num_examples"), limits.max_examples)
    _check_num_tokens(payload.record.get("num_tokens"))
    for key in ("first_loss", "last_loss", "mean_loss", "seconds"):
        if key not in expected:
            _check_number(key, payload.record.get(key))
    _check_tensors(payload.arrays, current)
    norm = update_norm(payload.arrays, current)
    maximum = sys.float_info.max if limits.max_update_norm is None else limits.max_update_norm
    if not norm <= maximum:
        raise WireError(f"update norm must be at most {maximum:g}, got {norm:.4g}")


def check_num_examples(value: object, maximum: int) -> None:
    """Check how many examples a participant claims.

    Raises:
        WireError: If it is not a whole number in [1, maximum].
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= maximum:
        raise WireError(
            f"num_examples must be a whole number in [1, {maximum}], got {shown(value)}"
        )


def check_held(key: str, value: object) -> list[str]:
    """Return the hashes of what a device says that it holds.

    Raises:
        WireError: If it is no list of texts, or one that is too long.
    """
    if not isinstance(value, list) or not all(isinstance(sha256, str) for sha256 in value):
        raise WireError(f"{key} must be a list of hashes, got {shown(value)}")
    if len(value) > _MAX_HELD:
        raise WireError(f"{key} must have at most {_MAX_HELD} hashes, got {len(value)}")
    return value


def check_entries(record: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Check that entries of a stranger's record came back as they were sent.

    Raises:
        WireError: If one did not; the text says which.
    """
    for key, value in expected.items():
        got = record.get(key)
        if type(got) is not type(value) or got != value:  # True is 1, and 1.0 too
            raise WireError(f"{key} must be {value!r}, got {shown(got)}")


def longest_update(current: Mapping[str, np.ndarray]) -> int:
    """Return a length that no honest reply to a "train" task reaches [B].

    Args:
        current: What the device was given of what it tuned.
    """
    tensors = sum(a.nbytes + 2 * len(name) + _NAMING_BYTES for name, a in current.items())
    return 2 * tensors + MAX_ANSWER_BYTES


def one_line(text: str) -> str:
    """Return a stranger's text as one short line that cannot move a terminal's cursor."""
    words = " ".join(text[: 2 * _MAX_TEXT].split())[:_MAX_TEXT]
    return "".join(c if c.isprintable() else "?" for c in words)


def shown(value: object) -> str:
    """Return a value that a stranger sent as short text, however long or deeply nested it is."""
    return reprlib.repr(value)


def _check_num_tokens(value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_TOKENS:
        raise WireError(
            f"num_tokens must be a whole number in [0, {_MAX_TOKENS}], got {shown(value)}"
        )


def _check_number(key: str, value: object) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) <= _MAX_NUMBER:  # type: ignore[arg-type] # NaN compares as false
        raise WireError(
            f"{key} must be a number in [-{_MAX_NUMBER:g}, {_MAX_NUMBER:g}], got {shown(value)}"
        )


def _check_tensors(arrays: Mapping[str, np.ndarray], current: Mapping[str, np.ndarray]) -> None:
    if arrays.keys() != current.keys():
        wrong = sorted(arrays.keys() ^ current.keys())
        raise WireError(
            f"tensors missing or unexpected: {', '.join(wrong[:_MAX_NAMES])} ({len(wrong)} in all)"
        )
    for name, like in current.items():
        got = arrays[name]
        if got.shape != like.shape or got.dtype != like.dtype:
            raise WireError(
                f"{name} must be {like.dtype} {like.shape}, got {got.dtype} {got.shape}"
            )
        if not np.isfinite(got).all():
            raise WireError(f"{name} has values that are not finite")
