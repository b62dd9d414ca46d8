"""The version, where everything may ask for it."""

from __future__ import annotations

__all__ = ["VERSION"]

VERSION = "0.1.0"
