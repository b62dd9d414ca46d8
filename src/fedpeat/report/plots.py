"""A chart of quality against what was spent: its scales, axes, curves and marks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from fedpeat.report.axes import AxisUnit, Scale, nice_ticks, padded_range, value_ticks
from fedpeat.report.markup import Html, element
from fedpeat.report.quantities import quality_text

__all__ = [
    "CurvePoint",
    "Level",
    "Panel",
    "Plot",
    "Points",
    "blank",
    "chart",
    "is_plottable",
    "key",
    "line",
    "markers",
    "picture",
    "quality_scale",
    "spent_scale",
    "tick_label",
]

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
    simulated: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Seconds, joules and bytes in the simulated world, cumulative; NaN where not known."""


@dataclass(frozen=True)
class Level:
    """A horizontal reference line."""

    label: str
    value: float
    style: str


@dataclass(frozen=True)
class Panel:
    """One of some charts side by side: what its horizontal axis counts."""

    key: str
    title: str
    axis: str
    spent: Callable[[CurvePoint], float]
    unit: Callable[[float], AxisUnit]
    wording: Callable[[float], str]
    can_be_blank: bool = False
    """Left without a chart if nothing was spent."""


Points = Sequence[CurvePoint]


def is_plottable(value: float | None, metric: str) -> bool:
    """Return whether a quality has a place in a chart."""
    return value is not None and math.isfinite(value) and (value > 0 or metric != "perplexity")


def quality_scale(points: Points, levels: Sequence[Level], metric: str) -> Scale:
    """Return the scale up the chart; one quality at least must be plottable."""
    values = [point.value for point in points] + [level.value for level in levels]
    plottable = [value for value in values if value is not None and is_plottable(value, metric)]
    is_log = metric == "perplexity"
    low, high = padded_range(plottable, is_log=is_log)
    return Scale(low, high, _HEIGHT - _BOTTOM, _TOP, is_log=is_log)


def spent_scale(panel: Panel, points: Points, reference: Points = ()) -> Scale:
    """Return the scale across a panel, from nothing spent on."""
    own, other = (
        max((spent for point in each if math.isfinite(spent := panel.spent(point))), default=0.0)
        for each in (points, reference)
    )
    longest = min(max(own, other), _LONGEST_REFERENCE * own) or 1.0
    return Scale(0.0, longest, _LEFT, _WIDTH - _RIGHT)


def key(style: str, label: str) -> Html:
    """Return the entry of a kind of line in a legend."""
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
        if point.value is None or not is_plottable(point.value, self.metric):
            return None
        if not math.isfinite(spent):
            return None
        return self.across.at(spent), self.quality.at(point.value)

    def text(self, point: CurvePoint) -> str:
        """Return what a point says when it is touched."""
        spent = self.panel.wording(self.panel.spent(point))
        place = spent if self.panel.key == "rounds" else f"round {point.server_round}, {spent}"
        return f"{place}: {quality_text(point.value, self.metric)}"


def blank(panel: Panel, points: Points) -> Html | None:
    """Return what stands in for a chart across which no point would be, None if one would."""
    if not panel.can_be_blank:
        return None
    spent = [panel.spent(point) for point in points]
    if any(math.isfinite(value) and value > 0 for value in spent):
        return None
    said = "Nothing was spent." if all(map(math.isfinite, spent)) else "Not recorded."
    return element("figure", element("figcaption", panel.title), element("p", said, class_="empty"))


def chart(plot: Plot, points: Points, reference: Points, levels: Sequence[Level]) -> Html:
    """Return the picture of a run's curve, beside that of its reference."""
    panel = plot.panel
    # on an axis on which the reference spends nothing it has no curve, only a level
    has_curve = any(panel.spent(point) > 0 for point in reference)
    drawn = [point for point in reference if has_curve and panel.spent(point) <= plot.across.high]
    parts = [
        *(_level_line(level, plot.quality) for level in levels),
        *line(plot, drawn, "tuned"),
        *line(plot, points, "plug"),
        *markers(plot, points),
    ]
    return picture(plot, parts, _description(plot, points))


def picture(plot: Plot, parts: Sequence[Html], description: str) -> Html:
    """Return a panel with its axes around what is drawn in it."""
    panel = plot.panel
    title = element(
        "title", f"Plug-in {plot.metric}, {panel.title.lower()}", id=f"{panel.key}-title"
    )
    svg = element(
        "svg",
        title,
        element("desc", description, id=f"{panel.key}-desc"),
        *_quality_axis(plot.quality, plot.metric),
        *_spent_axis(panel, plot.across),
        *parts,
        viewBox=f"0 0 {_WIDTH:.0f} {_HEIGHT:.0f}",
        role="img",
        aria_labelledby=f"{panel.key}-title {panel.key}-desc",
    )
    return element("figure", element("figcaption", panel.title), svg)


def _description(plot: Plot, points: Points) -> str:
    return (
        f"Plug-in {plot.metric} on the validation split over {len(points)} evaluations, "
        f"from {plot.text(points[0])} to {plot.text(points[-1])}."
    )


def _quality_axis(quality: Scale, metric: str) -> Iterator[Html]:
    for tick in value_ticks(quality.low, quality.high, is_log=quality.is_log):
        y = quality.at(tick)
        label = f"{tick_label(100 * tick)}%" if metric == "accuracy" else tick_label(tick)
        yield element("path", d=f"M{_LEFT:.0f} {y:.1f}H{_WIDTH - _RIGHT:.0f}", class_="grid")
        yield element("text", label, x=_LEFT - 8, y=y + 4, class_="y")


def tick_label(value: float) -> str:
    """Return the number of a tick, with an exponent only if it is very large or small."""
    is_plain = 1e-4 <= abs(value) < 1e5 or value == 0
    return f"{value:.6g}" if is_plain else f"{value:.0e}".replace("e+", "e").replace("e0", "e")


def _spent_axis(panel: Panel, across: Scale) -> Iterator[Html]:
    bottom, unit = _HEIGHT - _BOTTOM, panel.unit(across.high)
    smallest_step = 1.0 if panel.key == "rounds" else 0.0
    yield element("path", d=f"M{_LEFT:.0f} {bottom:.0f}H{_WIDTH - _RIGHT:.0f}", class_="axis")
    for tick in nice_ticks(0.0, across.high / unit.size, smallest_step=smallest_step):
        x = across.at(tick * unit.size)
        yield element("text", tick_label(tick), x=x, y=bottom + 17, class_="x")
    name = f"{panel.axis} [{unit.name}]" if unit.name else panel.axis
    yield element("text", name, x=(_LEFT + _WIDTH - _RIGHT) / 2, y=_HEIGHT - 8, class_="x name")


def _level_line(level: Level, quality: Scale) -> Html:
    d = f"M{_LEFT:.0f} {quality.at(level.value):.1f}H{_WIDTH - _RIGHT:.0f}"
    return element("path", element("title", level.label), d=d, class_=f"line {level.style}")


def line(plot: Plot, points: Points, style: str) -> Iterator[Html]:
    """Yield the curve, broken where a number is not finite."""
    for is_drawn, places in groupby(map(plot.place, points), lambda place: place is not None):
        if is_drawn:
            d = "M" + "L".join(f"{place[0]:.1f} {place[1]:.1f}" for place in places if place)
            yield element("path", d=d, class_=f"line {style}")


def markers(plot: Plot, points: Points) -> Iterator[Html]:
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
