"""Scales, ticks and units of a chart's axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "AxisUnit",
    "Scale",
    "bytes_unit",
    "joules_unit",
    "nice_ticks",
    "padded_range",
    "seconds_unit",
    "value_ticks",
]

_PADDING_RATIO = 0.07


@dataclass(frozen=True)
class Scale:
    """Maps [low, high] to pixels, linearly or by logarithm."""

    low: float
    high: float
    start_px: float
    end_px: float
    is_log: bool = False

    def at(self, value: float) -> float:
        """Return the pixel of a value."""
        low, high = (
            (math.log(self.low), math.log(self.high)) if self.is_log else (self.low, self.high)
        )
        place = math.log(value) if self.is_log else value
        return self.start_px + (place - low) / (high - low) * (self.end_px - self.start_px)


@dataclass(frozen=True)
class AxisUnit:
    """A unit in which an axis is labelled: value / size is the number shown."""

    name: str
    size: float


def bytes_unit(largest: float) -> AxisUnit:
    """Return the decimal unit in which the largest value is 1 or more."""
    return _unit(largest, (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0)))


def joules_unit(largest: float) -> AxisUnit:
    """Return the decimal unit in which the largest value is 1 or more."""
    return _unit(largest, (("GJ", 1e9), ("MJ", 1e6), ("kJ", 1e3), ("J", 1.0)))


def seconds_unit(largest: float) -> AxisUnit:
    """Return the unit of time in which the largest value is 2 or more."""
    return _unit(
        largest,
        (("days", 172_800.0), ("hours", 7200.0), ("minutes", 120.0), ("seconds", 2.0)),
        ratio=2.0,
    )


def _unit(largest: float, thresholds: Sequence[tuple[str, float]], ratio: float = 1.0) -> AxisUnit:
    name, threshold = next((pair for pair in thresholds if largest >= pair[1]), thresholds[-1])
    return AxisUnit(name, threshold / ratio)


def nice_ticks(low: float, high: float, most: int = 5, smallest_step: float = 0.0) -> list[float]:
    """Return the multiples of 1, 2 or 5 times a power of ten in [low, high], at most so many."""
    span = high - low
    if not span > 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(
        step
        for step in (power * factor for factor in (1, 2, 5, 10, 20, 50))
        if math.floor(high / step) - math.ceil(low / step) < most and step >= smallest_step
    )
    # a tick just outside by float error belongs to the range
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def value_ticks(low: float, high: float, *, is_log: bool) -> list[float]:
    """Return ticks of a quality axis; powers of ten where a log axis spans a factor of 30."""
    if not is_log or high / low < 30:
        return nice_ticks(low, high)
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    stride = max(1, math.ceil((last - first + 1) / 6))
    return [10.0**exponent for exponent in range(first, last + 1, stride)]


def padded_range(values: Sequence[float], *, is_log: bool) -> tuple[float, float]:
    """Return a range with some air around the values; one value gets a range around it."""
    low, high = min(values), max(values)
    if is_log:
        air = max((high / low) ** _PADDING_RATIO, 1.02)
        return low / air, high * air
    air = max((high - low) * _PADDING_RATIO, abs(high) * 0.02, 1e-3)
    return low - air, high + air
