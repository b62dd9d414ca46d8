"""Plug-in quality per round, per byte and per second: three charts with one quality axis."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedpeat.report.axes import AxisUnit, bytes_unit, seconds_unit
from fedpeat.report.markup import Html, element, join
from fedpeat.report.plots import (
    CurvePoint,
    Level,
    Panel,
    Plot,
    Points,
    blank,
    chart,
    is_plottable,
    key,
    quality_scale,
    spent_scale,
)
from fedpeat.report.quantities import bytes_text, quality_text, seconds_text
from fedpeat.report.records import RoundRecord, RunData

__all__ = ["add_round", "curve_points", "curves_section", "panels_section"]


def _no_unit(largest: float) -> AxisUnit:  # noqa: ARG001
    return AxisUnit("", 1.0)


_PANELS = (
    Panel(
        "rounds",
        "Per round",
        "round",
        lambda point: point.server_round,
        _no_unit,
        lambda x: f"round {x:.0f}",
    ),
    Panel(
        "bytes",
        "Per byte moved",
        "down + up",
        lambda point: point.num_bytes,
        bytes_unit,
        bytes_text,
    ),
    Panel("seconds", "Per second", "time", lambda point: point.seconds, seconds_unit, seconds_text),
)


def curve_points(run: RunData) -> tuple[CurvePoint, ...]:
    """Return the evaluated rounds with what was spent summed over all rounds up to them."""
    points, num_bytes, seconds = [], 0.0, 0.0
    simulated = (0.0, 0.0, 0.0)
    for record in run.rounds:
        num_bytes += (record.bytes_down or 0.0) + (record.bytes_up or 0.0)
        seconds = (
            record.elapsed_seconds
            if record.elapsed_seconds is not None
            else seconds + (record.seconds or 0.0)
        )
        simulated = add_round(simulated, record)
        if record.is_evaluated:
            points.append(
                CurvePoint(record.server_round, record.plug_in, num_bytes, seconds, simulated)
            )
    return tuple(points)


def add_round(spent: tuple[float, float, float], record: RoundRecord) -> tuple[float, float, float]:
    """Return seconds, joules and bytes in the simulated world by the end of one more round.

    What a round does not tell is unknown (NaN), and so are all sums from there on; round 0, before
    any tuning, costs nothing.
    """
    unknown = math.nan if record.server_round else 0.0
    seconds, joules, num_bytes = (unknown if v is None else v for v in record.simulated)
    return spent[0] + seconds, spent[1] + joules, spent[2] + num_bytes


def curves_section(run: RunData) -> Html:
    """Return the charts with a legend, or a line that says why there are none."""
    return panels_section(run, _PANELS)


def panels_section(run: RunData, panels: Sequence[Panel]) -> Html:
    """Return a chart for each panel; they have one legend and one quality axis."""
    points = curve_points(run)
    reference = (
        curve_points(run.reference) if run.reference and run.reference.metric == run.metric else ()
    )
    levels = _levels(run, reference)
    if not any(is_plottable(point.value, run.metric) for point in points):
        return element(
            "p", "No round has been evaluated with a finite quality yet.", class_="empty"
        )
    scale = quality_scale([*points, *reference], levels, run.metric)
    charts = [
        blank(panel, points)
        or chart(
            Plot(panel, run.metric, spent_scale(panel, points, reference), scale),
            points,
            reference,
            levels,
        )
        for panel in panels
    ]
    return join([_legend(run, points, reference, levels), element("div", *charts, class_="charts")])


def _levels(run: RunData, reference: Points) -> list[Level]:
    final = run.summary.quality.values if run.summary else {}
    candidates = (
        _level(
            "before tuning",
            run.before_tuning,
            "full zero-shot",
            final.get("full_zero_shot"),
            "zero",
        ),
        _level(
            "full tuned, best round",
            _best(reference, run.metric),
            "full tuned",
            final.get("full_tuned"),
            "full",
        ),
    )
    return [level for level in candidates if level and is_plottable(level.value, run.metric)]


def _level(
    own_label: str, own: float | None, final_label: str, final: float | None, style: str
) -> Level | None:
    # the summary measures on the test split, the curve on the validation split: the label tells
    if own is not None:
        return Level(own_label, own, style)
    return Level(f"{final_label}, test split", final, style) if final is not None else None


def _best(points: Points, metric: str) -> float | None:
    values = [
        point.value
        for point in points
        if point.value is not None and is_plottable(point.value, metric)
    ]
    if not values:
        return None
    return min(values) if metric == "perplexity" else max(values)


def _legend(
    run: RunData,
    points: Points,
    reference: Points,
    levels: Sequence[Level],
) -> Html:
    last = points[-1]
    entries = [
        key("plug", f"plug-in, {quality_text(last.value, run.metric)} at round {last.server_round}")
    ]
    entries += [
        key(level.style, f"{level.label}, {quality_text(level.value, run.metric)}")
        for level in levels
    ]
    if reference:
        entries.append(key("tuned", "full model tuned, round by round"))
    return element("ul", *entries, class_="legend")
