"""Plug-in quality per round, per byte and per second: three charts with one quality axis."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from fedpeat.report.axes import (
    AxisUnit,
    Scale,
    bytes_unit,
    nice_ticks,
    padded_range,
    seconds_unit,
    value_ticks,
)
from fedpeat.report.markup import Html, element, join
from fedpeat.report.quantities import bytes_text, quality_text, seconds_text
from fedpeat.report.records import RunData

__all__ = ["CurvePoint", "curve_points", "curves_section"]

_WIDTH, _HEIGHT = 340.0, 236.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 12.0, 10.0, 44.0
_MOST_MARKERS = 60
_LONGEST_REFERENCE = 3.0
"""The reference is drawn up to so many times the run's length, lest it squeeze the run's curve."""


@dataclass(frozen=True)
class CurvePoint:
    """An evaluated round: quality, and what had been spent by its end."""

    server_round: int
    value: float | None
    num_bytes: float
    """Down and up, cumulative [B]."""
    seconds: float
    """Cumulative [s]."""


@dataclass(frozen=True)
class Level:
    """A horizontal reference line."""

    label: str
    value: float
    style: str


@dataclass(frozen=True)
class Panel:
    """One of the three charts: what its horizontal axis counts."""

    key: str
    title: str
    axis: str
    spent: Callable[[CurvePoint], float]
    unit: Callable[[float], AxisUnit]
    wording: Callable[[float], str]


Points = Sequence[CurvePoint]


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
    """Return the evaluated rounds with bytes and seconds summed over all rounds up to them."""
    points, num_bytes, seconds = [], 0.0, 0.0
    for record in run.rounds:
        num_bytes += (record.bytes_down or 0.0) + (record.bytes_up or 0.0)
        seconds = (
            record.elapsed_seconds
            if record.elapsed_seconds is not None
            else seconds + (record.seconds or 0.0)
        )
        if record.is_evaluated:
            points.append(CurvePoint(record.server_round, record.plug_in, num_bytes, seconds))
    return tuple(points)


def curves_section(run: RunData) -> Html:
    """Return the charts with a legend, or a line that says why there are none."""
    points = curve_points(run)
    reference = (
        curve_points(run.reference) if run.reference and run.reference.metric == run.metric else ()
    )
    levels = _levels(run, reference)
    if not any(_is_plottable(point.value, run.metric) for point in points):
        return element(
            "p", "No round has been evaluated with a finite quality yet.", class_="empty"
        )
    scale = _quality_scale([*points, *reference], levels, run.metric)
    charts = [
        _chart(
            Plot(panel, run.metric, _spent_scale(panel, points, reference), scale),
            points,
            reference,
            levels,
        )
        for panel in _PANELS
    ]
    return join([_legend(run, points, reference, levels), element("div", *charts, class_="charts")])


def _is_plottable(value: float | None, metric: str) -> bool:
    return value is not None and math.isfinite(value) and (value > 0 or metric != "perplexity")


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
    return [level for level in candidates if level and _is_plottable(level.value, run.metric)]


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
        if point.value is not None and _is_plottable(point.value, metric)
    ]
    if not values:
        return None
    return min(values) if metric == "perplexity" else max(values)


def _quality_scale(points: Points, levels: Sequence[Level], metric: str) -> Scale:
    values = [point.value for point in points] + [level.value for level in levels]
    plottable = [value for value in values if value is not None and _is_plottable(value, metric)]
    is_log = metric == "perplexity"
    low, high = padded_range(plottable, is_log=is_log)
    return Scale(low, high, _HEIGHT - _BOTTOM, _TOP, is_log=is_log)


def _legend(
    run: RunData,
    points: Points,
    reference: Points,
    levels: Sequence[Level],
) -> Html:
    last = points[-1]
    entries = [
        _key(
            "plug", f"plug-in, {quality_text(last.value, run.metric)} at round {last.server_round}"
        )
    ]
    entries += [
        _key(level.style, f"{level.label}, {quality_text(level.value, run.metric)}")
        for level in levels
    ]
    if reference:
        entries.append(_key("tuned", "full model tuned, round by round"))
    return element("ul", *entries, class_="legend")


def _key(style: str, label: str) -> Html:
    sample = element("path", d="M1 6H27", class_=f"line {style}")
    return element("li", element("svg", sample, width=28, height=12, aria_hidden="true"), label)


@dataclass(frozen=True)
class Plot:
    """A panel with the scales it is drawn in."""

    panel: Panel
    metric: str
    across: Scale
    quality: Scale

    def place(self, point: CurvePoint) -> tuple[float, float] | None:
        """Return the pixels of a point, None if it cannot be drawn."""
        spent = self.panel.spent(point)
        if point.value is None or not _is_plottable(point.value, self.metric):
            return None
        if not math.isfinite(spent):
            return None
        return self.across.at(spent), self.quality.at(point.value)

    def text(self, point: CurvePoint) -> str:
        """Return what a point says when it is touched."""
        spent = self.panel.wording(self.panel.spent(point))
        place = spent if self.panel.key == "rounds" else f"round {point.server_round}, {spent}"
        return f"{place}: {quality_text(point.value, self.metric)}"


def _chart(plot: Plot, points: Points, reference: Points, levels: Sequence[Level]) -> Html:
    panel = plot.panel
    # on an axis on which the reference spends nothing it has no curve, only a level
    has_curve = any(panel.spent(point) > 0 for point in reference)
    drawn = [point for point in reference if has_curve and panel.spent(point) <= plot.across.high]
    parts = [
        *_quality_axis(plot.quality, plot.metric),
        *_spent_axis(panel, plot.across),
        *(_level_line(level, plot.quality) for level in levels),
        *_line(plot, drawn, "tuned"),
        *_line(plot, points, "plug"),
        *_markers(plot, points),
    ]
    title = element(
        "title", f"Plug-in {plot.metric}, {panel.title.lower()}", id=f"{panel.key}-title"
    )
    description = element("desc", _description(plot, points), id=f"{panel.key}-desc")
    svg = element(
        "svg",
        title,
        description,
        *parts,
        viewBox=f"0 0 {_WIDTH:.0f} {_HEIGHT:.0f}",
        role="img",
        aria_labelledby=f"{panel.key}-title {panel.key}-desc",
    )
    return element("figure", element("figcaption", panel.title), svg)


def _spent_scale(panel: Panel, points: Points, reference: Points) -> Scale:
    own, other = (
        max((spent for point in each if math.isfinite(spent := panel.spent(point))), default=0.0)
        for each in (points, reference)
    )
    longest = min(max(own, other), _LONGEST_REFERENCE * own) or 1.0
    return Scale(0.0, longest, _LEFT, _WIDTH - _RIGHT)


def _description(plot: Plot, points: Points) -> str:
    return (
        f"Plug-in {plot.metric} on the validation split over {len(points)} evaluations, "
        f"from {plot.text(points[0])} to {plot.text(points[-1])}."
    )


def _quality_axis(quality: Scale, metric: str) -> Iterator[Html]:
    for tick in value_ticks(quality.low, quality.high, is_log=quality.is_log):
        y = quality.at(tick)
        label = f"{_tick_label(100 * tick)}%" if metric == "accuracy" else _tick_label(tick)
        yield element("path", d=f"M{_LEFT:.0f} {y:.1f}H{_WIDTH - _RIGHT:.0f}", class_="grid")
        yield element("text", label, x=_LEFT - 8, y=y + 4, class_="y")


def _tick_label(value: float) -> str:
    is_plain = 1e-4 <= abs(value) < 1e5 or value == 0
    return f"{value:.6g}" if is_plain else f"{value:.0e}".replace("e+", "e").replace("e0", "e")


def _spent_axis(panel: Panel, across: Scale) -> Iterator[Html]:
    bottom, unit = _HEIGHT - _BOTTOM, panel.unit(across.high)
    smallest_step = 1.0 if panel.key == "rounds" else 0.0
    yield element("path", d=f"M{_LEFT:.0f} {bottom:.0f}H{_WIDTH - _RIGHT:.0f}", class_="axis")
    for tick in nice_ticks(0.0, across.high / unit.size, smallest_step=smallest_step):
        x = across.at(tick * unit.size)
        yield element("text", _tick_label(tick), x=x, y=bottom + 17, class_="x")
    name = f"{panel.axis} [{unit.name}]" if unit.name else panel.axis
    yield element("text", name, x=(_LEFT + _WIDTH - _RIGHT) / 2, y=_HEIGHT - 8, class_="x name")


def _level_line(level: Level, quality: Scale) -> Html:
    d = f"M{_LEFT:.0f} {quality.at(level.value):.1f}H{_WIDTH - _RIGHT:.0f}"
    return element("path", element("title", level.label), d=d, class_=f"line {level.style}")


def _line(plot: Plot, points: Points, style: str) -> Iterator[Html]:
    """Yield the curve, broken where a quality is not finite."""
    for is_drawn, places in groupby(map(plot.place, points), lambda place: place is not None):
        if is_drawn:
            d = "M" + "L".join(f"{place[0]:.1f} {place[1]:.1f}" for place in places if place)
            yield element("path", d=d, class_=f"line {style}")


def _markers(plot: Plot, points: Points) -> Iterator[Html]:
    """Yield a dot per point, and a cross at the top where a quality is not finite."""
    radius = 2.6 if len(points) > 30 else 3.2
    for point in points:
        place, title = plot.place(point), element("title", plot.text(point))
        if place is None and math.isfinite(plot.panel.spent(point)):
            x = plot.across.at(plot.panel.spent(point))
            cross = f"M{x - 4:.1f} {_TOP + 1:.0f}l8 8m0 -8l-8 8"
            yield element("path", title, d=cross, class_="line bad")
        elif place and (len(points) <= _MOST_MARKERS or point is points[-1]):
            yield element("circle", title, cx=place[0], cy=place[1], r=radius, class_="mark")
