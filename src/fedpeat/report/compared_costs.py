"""Methods against each other in a simulated world: quality against what each run had spent."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedpeat.core.errors import DataError
from fedpeat.report.curves import curve_points
from fedpeat.report.load import load_run
from fedpeat.report.markup import Html, element, join
from fedpeat.report.plots import (
    Panel,
    Plot,
    Points,
    blank,
    is_plottable,
    key,
    line,
    picture,
    quality_scale,
    spent_scale,
)
from fedpeat.report.quantities import quality_text, seed_text
from fedpeat.report.records import RunData
from fedpeat.report.simulated import SIMULATED_PANELS, has_simulated

__all__ = ["ComparedRun", "compared_costs", "load_compared"]

_NUM_COLORS: Final = 6
"""Colours of methods in the style; what comes after has them again, dashed or dotted."""
_DASHES: Final = ("", " dashed", " dotted")
_MOST_NAME: Final = 40


@dataclass(frozen=True)
class ComparedRun:
    """A run folder beside comparison.json."""

    method: str
    seed: float
    run: RunData


def load_compared(folder: Path, method: str, seed: float | None) -> ComparedRun | None:
    """Return the run of a method and a seed; None if its folder is missing or damaged."""
    if seed is None or not math.isfinite(seed) or seed != int(seed):
        return None
    name = f"{method}-seed{int(seed)}"
    # a name may not lead out of the folder, nor into one below
    if Path(name).name != name or "\0" in name:
        return None
    try:
        return ComparedRun(method, seed, load_run(folder / name))
    except (DataError, OSError):
        return None


def compared_costs(runs: Sequence[ComparedRun], metric: str, num_runs: int) -> Html:
    """Return a chart for time, energy and bytes; nothing where no run has a simulated world.

    Args:
        runs: Those that could be read.
        metric: Of the comparison.
        num_runs: How many were compared.
    """
    drawn = [(one, points) for one in runs if (points := _points(one.run, metric))]
    if not drawn:
        return Html()
    methods = list(dict.fromkeys(one.method for one, _ in drawn))
    styles = {method: _style(place) for place, method in enumerate(methods)}
    entries = [key(styles[method], _short(method)) for method in methods]
    charts = [_chart(panel, drawn, metric, styles) for panel in SIMULATED_PANELS]
    missing = num_runs - len(drawn)
    note = (
        element(
            "p",
            f"Drawn: {len(drawn):,} of {num_runs:,} runs; the others have no simulated cost or "
            "no whole run folder here.",
            class_="note",
        )
        if missing
        else ""
    )
    return join(
        [element("ul", *entries, class_="legend"), element("div", *charts, class_="charts"), note]
    )


def _points(run: RunData, metric: str) -> Points:
    """Return the curve of a run, empty if it has none that can be drawn."""
    if run.metric != metric or not has_simulated(run):
        return ()
    points = curve_points(run)
    return points if any(is_plottable(point.value, metric) for point in points) else ()


def _style(place: int) -> str:
    return f"m-{place % _NUM_COLORS}{_DASHES[place // _NUM_COLORS % len(_DASHES)]}"


def _short(method: str) -> str:
    name = method or "(no name)"
    return name if len(name) <= _MOST_NAME else name[: _MOST_NAME - 3] + "..."


def _chart(
    panel: Panel,
    runs: Sequence[tuple[ComparedRun, Points]],
    metric: str,
    styles: dict[str, str],
) -> Html:
    every = [point for _, points in runs for point in points]
    if nothing := blank(panel, every):
        return nothing
    plot = Plot(panel, metric, spent_scale(panel, every), quality_scale(every, (), metric))
    parts = [part for one, points in runs for part in _run(plot, one, points, styles[one.method])]
    return picture(plot, parts, "; ".join(_told(plot, *run) for run in runs) + ".")


def _run(plot: Plot, one: ComparedRun, points: Points, style: str) -> Iterator[Html]:
    """Yield the line of a run, and a dot at its end that tells what it is."""
    yield from line(plot, points, f"{style} thin")
    places = [(point, place) for point in points if (place := plot.place(point))]
    if places:
        last, (x, y) = places[-1]
        title = element(
            "title", f"{_short(one.method)}, seed {seed_text(one.seed)}, {plot.text(last)}"
        )
        yield element("circle", title, cx=x, cy=y, r=3.0, class_=f"end {style}")


def _told(plot: Plot, one: ComparedRun, points: Points) -> str:
    last = points[-1]
    spent = plot.panel.wording(plot.panel.spent(last))
    quality = quality_text(last.value, plot.metric)
    return f"{_short(one.method)}, seed {seed_text(one.seed)}: {quality} after {spent}"
