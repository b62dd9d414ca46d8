"""What controller.json tells of the controllers that were trained for a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from fedpeat.core.errors import DataError
from fedpeat.report.fields import Fields, parse_object, read_text
from fedpeat.report.records import Habit, Learning, Trained, Worth

__all__ = ["CHOICES", "TRAITS", "load_trained"]

TRAITS: Final = ("snr_up_db", "free_memory_gb")
CHOICES: Final = ("rung", "local_steps")
_FILE: Final = "controller.json"
_LARGEST: Final = 1e100
"""What is larger has no place on an axis of floats."""


def load_trained(run_dir: Path) -> Trained | None:
    """Return what controller.json of a folder says; None where there is none.

    It is a copy that the run keeps of what it was steered by, and the run's own numbers do not need
    it: a damaged one costs its section, not the report.
    """
    path = run_dir / _FILE
    if not path.is_file():
        return None
    try:
        fields = parse_object(read_text(path), _FILE)
        if fields.number("schema") != 1:
            raise fields.fault("schema", "1")
        facts = fields.child("facts") or Fields({}, _FILE)
        return Trained(_curves(facts), _worths(facts), _habits(facts))
    except DataError as error:
        return Trained(fault=str(error))


def _number(fields: Fields, name: str) -> float | None:
    value = fields.number(name)
    return math.nan if value is not None and abs(value) > _LARGEST else value


def _numbers(fields: Fields, name: str) -> tuple[float | None, ...]:
    values = fields.numbers(name) or ()
    return tuple(None if v is not None and abs(v) > _LARGEST else v for v in values)


def _curves(facts: Fields) -> tuple[Learning, ...]:
    curves = facts.values.get("curves") or []
    if not isinstance(curves, list):
        raise facts.fault("curves", "a list of lists")
    named = Fields({f"curves[{i}]": curve for i, curve in enumerate(curves)}, facts.where)
    return tuple(_curve(named.children(name)) for name in named.values)


def _curve(points: tuple[Fields, ...]) -> Learning:
    return Learning(
        tuple(point.whole("num_steps") for point in points),
        tuple(_number(point, "mean_return") for point in points),
    )


def _worths(facts: Fields) -> tuple[Worth, ...]:
    returns, seconds = (facts.child(name) for name in ("returns", "seconds"))
    if returns is None:
        return ()
    return tuple(_worth(kind, returns, seconds) for kind in returns.values)


def _worth(kind: str, returns: Fields, seconds: Fields | None) -> Worth:
    own = returns.child(kind) or Fields({}, returns.where)
    mean, half_width = _number(own, "mean"), _number(own, "half_width")
    return Worth(
        kind,
        math.nan if mean is None else mean,
        half_width if half_width is not None and half_width >= 0 else None,
        seconds.amount(kind) if seconds else None,
    )


def _habits(facts: Fields) -> tuple[Habit, ...]:
    habits = facts.child("habits")
    if habits is None:
        return ()
    return tuple(_habit(trait, own) for trait in TRAITS if (own := habits.child(trait)) is not None)


def _habit(trait: str, fields: Fields) -> Habit:
    centers = _numbers(fields, "centers")
    return Habit(
        trait,
        centers,
        _chances(fields, "takes_part", len(centers)),
        {name: _choices(fields.child(name), len(centers)) for name in CHOICES},
    )


def _choices(fields: Fields | None, num_bins: int) -> Mapping[str, tuple[float | None, ...]]:
    if fields is None:
        return {}
    return {name: _chances(fields, name, num_bins) for name in fields.values}


def _chances(fields: Fields, name: str, num_bins: int) -> tuple[float | None, ...]:
    """Return probabilities, None for what is none; all None where they were not written."""
    values = _numbers(fields, name)
    if values and len(values) != num_bins:
        raise fields.fault(name, f"one probability per center ({num_bins})")
    return tuple(None if v is None or not 0 <= v <= 1 else v for v in values or (None,) * num_bins)
