"""Numbers as people read them: 1.2 MB, 3 min 12 s, 21.34, "not measured", "not finite"."""

from __future__ import annotations

import math
from typing import Final

__all__ = [
    "NOT_FINITE",
    "NOT_MEASURED",
    "bytes_text",
    "contrast_texts",
    "count_text",
    "joules_text",
    "number_text",
    "quality_text",
    "ratio_text",
    "seconds_text",
    "seed_text",
]

NOT_MEASURED: Final = "not measured"
NOT_FINITE: Final = "not finite"


def _absence(value: float | None) -> str | None:
    if value is None:
        return NOT_MEASURED
    return None if math.isfinite(value) else NOT_FINITE


def number_text(value: float | None, digits: int = 4) -> str:
    """Return a number with so many significant digits, if possible without an exponent."""
    absence = _absence(value)
    if absence or value is None:
        return absence or NOT_MEASURED
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits - 1}e}")
    exponent = math.floor(math.log10(abs(rounded)))
    if exponent < -4 or exponent > 8:
        return f"{value:.{digits - 1}e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    return f"{value:,.{max(digits - 1 - exponent, 0)}f}"


def quality_text(value: float | None, metric: str, digits: int = 4) -> str:
    """Return a perplexity as a number, an accuracy as a percentage."""
    if metric == "accuracy" and value is not None and math.isfinite(value):
        return f"{number_text(100 * value, digits)} %"
    return number_text(value, digits)


def contrast_texts(first: float, second: float, metric: str) -> tuple[str, str]:
    """Return two qualities in as few digits, from three up, as show them apart."""
    for digits in range(3, 8):
        texts = quality_text(first, metric, digits), quality_text(second, metric, digits)
        if texts[0] != texts[1]:
            return texts
    return quality_text(first, metric, 3), quality_text(second, metric, 3)


def ratio_text(value: float | None) -> str:
    """Return a ratio as a percentage, coarser the larger it is: 0.42 %, 8.1 %, 81 %."""
    absence = _absence(value)
    if absence or value is None:
        return absence or NOT_MEASURED
    percent = 100 * value
    return (
        f"{percent:,.0f} %"
        if abs(percent) >= 9.95 or percent == 0
        else f"{number_text(percent, 2)} %"
    )


def seed_text(value: float | None) -> str:
    """Return a seed, every digit of it."""
    absence = _absence(value)
    return absence or f"{value:.0f}"


def count_text(value: float | None) -> str:
    """Return a count, exact up to 99,999 and in k, M, B (billion), T from there."""
    absence = _absence(value)
    if absence or value is None:
        return absence or NOT_MEASURED
    return f"{value:,.0f}" if value < 99_999.5 else _scaled(value, ("", "k", "M", "B", "T"))


def bytes_text(value: float | None) -> str:
    """Return a number of bytes in decimal units (1 MB = 1,000,000 B)."""
    absence = _absence(value)
    return absence or _scaled(value or 0.0, ("B", "kB", "MB", "GB", "TB", "PB"))


def joules_text(value: float | None) -> str:
    """Return an energy in decimal units, in three digits."""
    absence = _absence(value)
    if absence or value is None:
        return absence or NOT_MEASURED
    for unit, size in (("GJ", 1e9), ("MJ", 1e6), ("kJ", 1e3)):
        if float(f"{value:.2e}") >= size:
            return f"{number_text(value / size, 3)} {unit}"
    return f"{number_text(value, 3)} J"


def _scaled(value: float, units: tuple[str, ...]) -> str:
    index = 0
    while index + 1 < len(units) and float(f"{value:.2e}") >= 1000:
        value, index = value / 1000, index + 1
    text = f"{value:,.0f}" if index == 0 or value >= 99.95 else f"{value:.1f}"
    return f"{text} {units[index]}".strip()


def seconds_text(value: float | None) -> str:
    """Return a duration in its two largest units."""
    absence = _absence(value)
    if absence or value is None:
        return absence or NOT_MEASURED
    if 0 < value < 0.0995:
        return f"{1000 * value:.3g} ms"
    if value < 59.95:
        return f"{value:.1f} s" if value else "0 s"
    whole = round(value)
    for unit, seconds, part, part_seconds in (
        ("d", 86400, "h", 3600),
        ("h", 3600, "min", 60),
        ("min", 60, "s", 1),
    ):
        if whole >= seconds:
            rest = whole % seconds // part_seconds
            return f"{whole // seconds:,} {unit}" + (f" {rest} {part}" if rest else "")
    return f"{whole} s"
