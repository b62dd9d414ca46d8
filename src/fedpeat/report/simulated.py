"""What a run cost in its simulated world: plug-in quality per second, per joule and per byte."""

from __future__ import annotations

import math
from typing import Final

from fedpeat.report.axes import bytes_unit, joules_unit, seconds_unit
from fedpeat.report.curves import add_round, panels_section
from fedpeat.report.markup import Html, element, join
from fedpeat.report.plots import Panel
from fedpeat.report.quantities import bytes_text, joules_text, seconds_text
from fedpeat.report.records import RunData

__all__ = ["SIMULATED_PANELS", "has_simulated", "simulated_lead", "simulated_section"]

SIMULATED_PANELS: Final = (
    Panel(
        "simulated-seconds",
        "Per simulated second",
        "simulated time",
        lambda point: point.simulated[0],
        seconds_unit,
        seconds_text,
        can_be_blank=True,
    ),
    Panel(
        "simulated-joules",
        "Per simulated joule",
        "devices + server",
        lambda point: point.simulated[1],
        joules_unit,
        joules_text,
        can_be_blank=True,
    ),
    Panel(
        "simulated-bytes",
        "Per simulated byte",
        "down + up",
        lambda point: point.simulated[2],
        bytes_unit,
        bytes_text,
        can_be_blank=True,
    ),
)

_NOUNS: Final = ("time", "energy", "bytes")


def has_simulated(run: RunData) -> bool:
    """Return whether a round tells of a simulated world."""
    return any(value is not None for record in run.rounds for value in record.simulated)


def simulated_lead(run: RunData) -> str:
    """Return what all rounds cost together."""
    seconds, joules, num_bytes = (
        panel.wording(value) if math.isfinite(value) else f"unknown {noun}"
        for panel, value, noun in zip(SIMULATED_PANELS, _totals(run), _NOUNS, strict=True)
    )
    return (
        "Quality of the plug-in on the validation split, against time, energy and bytes in the "
        f"simulated world; in all {seconds}, {joules} and {num_bytes}."
    )


def simulated_section(run: RunData) -> Html:
    """Return the charts, and from where on a cost is unknown."""
    unknown = next(
        (
            record.server_round
            for record in run.tuning_rounds
            if not all(value is not None and math.isfinite(value) for value in record.simulated)
        ),
        None,
    )
    note = (
        ""
        if unknown is None
        else element(
            "p",
            f"Round {unknown:,} does not tell all that it cost: curves end where their sum is "
            "no longer known.",
            class_="note",
        )
    )
    return join([panels_section(run, SIMULATED_PANELS), note])


def _totals(run: RunData) -> tuple[float, float, float]:
    total = (0.0, 0.0, 0.0)
    for record in run.rounds:
        total = add_round(total, record)
    return total
