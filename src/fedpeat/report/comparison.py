"""Methods against each other over several seeds: comparison.html and a Markdown table."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from fedpeat.report.axes import Scale, nice_ticks, padded_range
from fedpeat.report.compared_costs import ComparedRun, compared_costs, load_compared
from fedpeat.report.fields import Fields, parse_object, read_text
from fedpeat.report.headline import is_better
from fedpeat.report.intervals import Estimate, estimate
from fedpeat.report.markup import Html, clean, element, join
from fedpeat.report.page import document, section, write_page
from fedpeat.report.quantities import (
    NOT_FINITE,
    NOT_MEASURED,
    bytes_text,
    count_text,
    joules_text,
    number_text,
    quality_text,
    ratio_text,
    seconds_text,
    seed_text,
)
from fedpeat.report.records import METRICS, QUALITIES, UNITS, Cost

__all__ = ["comparison_markdown", "render_comparison", "write_comparison"]

_COLUMNS: Final = (
    ("plug_in", "Plug-in"),
    ("bits_per_byte", "Bits per byte"),
    ("cross_entropy", "Cross-entropy"),
    ("gap_closed", "Gap closed"),
    ("emulator_tuned", "Emulator tuned"),
    ("emulator_zero_shot", "Emulator zero-shot"),
    ("full_zero_shot", "Full zero-shot"),
    ("emulator_bytes", "Emulator"),
    ("bytes_down", "Down"),
    ("bytes_up", "Up"),
    ("wall_seconds", "Wall time"),
    ("peak_rss_bytes", "Peak memory"),
    ("num_tokens", "Tokens"),
    ("simulated_seconds", "Simulated time"),
    ("simulated_joules", "Simulated energy"),
    ("simulated_bytes", "Simulated bytes"),
)
_SIMULATED: Final = ("simulated_seconds", "simulated_joules", "simulated_bytes")
_ROW_HEIGHT, _AXIS_HEIGHT = 58, 46
_INSET_PERCENT = 2.0
_ALWAYS: Final = ("plug_in", "full_zero_shot")
"""Measured in every run, so that null, which JSON has for NaN, means not finite."""
_COSTS_LEAD: Final = (
    "Plug-in quality on the validation split, against what a run had spent by then; a line per "
    "seed, as runs of one method spend differently."
)
_DIMENSIONLESS: Final = (*QUALITIES, "bits_per_byte", "cross_entropy", "gap_closed")


@dataclass(frozen=True)
class Row:
    """A method with one value per seed under each name of _COLUMNS."""

    method: str
    seeds: tuple[float | None, ...]
    values: Mapping[str, tuple[float | None, ...]]

    def estimate(self, name: str) -> Estimate | None:
        """Return mean and interval of a column."""
        return estimate(self.values[name])


@dataclass(frozen=True)
class Comparison:
    """comparison.json."""

    metric: str
    rows: tuple[Row, ...]

    @property
    def num_seeds(self) -> str:
        """The number of seeds per method, a range if methods differ."""
        counts = sorted({len(row.seeds) for row in self.rows}) or [0]
        unit = "seed" if counts == [1] else "seeds"
        return f"{counts[0]} {unit}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"


def write_comparison(folder: Path) -> Path:
    """Write ``comparison.html`` next to ``comparison.json``, whole or not at all.

    Raises:
        DataError: If comparison.json is missing or not as expected.
        StorageError: If the page cannot be written.
    """
    path = Path(folder) / "comparison.json"
    comparison = _comparison(parse_object(read_text(path), str(path)))
    loaded = [
        load_compared(path.parent, row.method, seed)
        for row in comparison.rows
        for seed in row.seeds
    ]
    runs = [run for run in loaded if run]
    page = _page(_with_costs(comparison, runs), path.parent.resolve().name, runs)
    return write_page(path.with_suffix(".html"), page)


def render_comparison(data: Mapping[str, object], name: str) -> str:
    """Return the page for the content of a comparison.json."""
    return _page(_comparison(Fields(data, "comparison")), name)


def comparison_markdown(data: Mapping[str, object]) -> str:
    """Return the content of a comparison.json as a Markdown table with means and 95 % intervals.

    Raises:
        DataError: If data is not as expected.
    """
    comparison = _comparison(Fields(data, "comparison"))
    columns = _measured_columns(comparison)
    lines = [
        "| "
        + " | ".join(
            [
                "Method",
                "Seeds",
                *(_column_title(label, name, comparison) for name, label in columns),
            ]
        )
        + " |",
        "|" + "|".join([":--", *["--:"] * (1 + len(columns))]) + "|",
    ]
    for row in comparison.rows:
        texts = [_cell_text(row.estimate(name), name, comparison.metric) for name, _ in columns]
        lines.append(
            "| " + " | ".join([_markdown_text(row.method), str(len(row.seeds)), *texts]) + " |"
        )
    return "\n".join([*lines, "", _caption(comparison), ""])


def _comparison(fields: Fields) -> Comparison:
    if fields.number("schema") != 1:
        raise fields.fault("schema", "1")
    return Comparison(
        fields.choice("metric", METRICS), tuple(_row(item) for item in fields.children("rows"))
    )


def _row(fields: Fields) -> Row:
    seeds = fields.numbers("seeds") or ()
    values = {}
    for name, _ in _COLUMNS:
        numbers = fields.numbers(name)
        if numbers is not None and len(numbers) != len(seeds):
            raise fields.fault(name, f"one value per seed ({len(seeds)})")
        absent = math.nan if name in _ALWAYS and numbers else None
        filled = numbers or (None,) * len(seeds)
        values[name] = tuple(absent if value is None else value for value in filled)
    return Row(fields.text("method"), seeds, values)


def _with_costs(comparison: Comparison, runs: Sequence[ComparedRun]) -> Comparison:
    """Take what rows do not tell of simulated costs from the summaries of the runs themselves."""
    costs: dict[tuple[str, float | None], Cost] = {
        (one.method, one.seed): one.run.summary.cost for one in runs if one.run.summary is not None
    }

    def known(row: Row, name: str) -> tuple[float | None, ...]:
        return tuple(
            getattr(costs.get((row.method, seed)), name, None) if value is None else value
            for seed, value in zip(row.seeds, row.values[name], strict=True)
        )

    rows = tuple(
        replace(row, values={**row.values, **{name: known(row, name) for name in _SIMULATED}})
        for row in comparison.rows
    )
    return replace(comparison, rows=rows)


def _measured_columns(comparison: Comparison) -> list[tuple[str, str]]:
    """The plug-in always; another column if a method has it."""
    return [
        (name, label)
        for name, label in _COLUMNS
        if name == "plug_in" or any(row.estimate(name) for row in comparison.rows)
    ]


def _column_title(label: str, name: str, comparison: Comparison) -> str:
    if name == "num_tokens":
        return UNITS[comparison.metric].capitalize()
    return f"{label} ({comparison.metric})" if name == "plug_in" else label


def _wording(name: str, metric: str) -> Callable[[float | None], str]:
    """Return how a column's numbers are written."""
    wordings: dict[str, Callable[[float | None], str]] = {
        "gap_closed": ratio_text,
        "wall_seconds": seconds_text,
        "simulated_seconds": seconds_text,
        "simulated_joules": joules_text,
        "num_tokens": count_text,
        "bits_per_byte": number_text,
        "cross_entropy": number_text,
    }
    if name in QUALITIES:
        return lambda value: quality_text(value, metric)
    return wordings.get(name, bytes_text)


def _cell_text(found: Estimate | None, name: str, metric: str) -> str:
    mean, interval = _cell_parts(found, name, metric)
    return f"{mean} {interval}".strip()


def _cell_parts(found: Estimate | None, name: str, metric: str) -> tuple[str, str]:
    """Return mean and interval; the interval is left out where the values do not differ."""
    if found is None:
        return NOT_MEASURED, ""
    wording = _wording(name, metric)
    if not found.half_width:
        return wording(found.mean), ""
    mean = wording(found.mean)
    is_percent = name == "gap_closed" or (metric == "accuracy" and name in QUALITIES)
    if name in _DIMENSIONLESS:
        return mean, f"\u00b1 {_half_width(found, mean, is_percent=is_percent)}"
    return mean, f"\u00b1 {wording(found.half_width)}"


def _half_width(found: Estimate, mean: str, *, is_percent: bool) -> str:
    """Return the half width with the decimals of its mean; of a percentage, in points."""
    if is_percent:
        return f"{100 * (found.half_width or 0.0):.1f} pp"
    decimals = len(mean.partition(".")[2])
    return f"{found.half_width:,.{decimals}f}"


def _caption(comparison: Comparison) -> str:
    better = "lower" if comparison.metric == "perplexity" else "higher"
    return (
        f"Mean and 95 % t-interval over {comparison.num_seeds}; {comparison.metric}, "
        f"{better} is better. "
        "The interval covers the seeds only, not other data or models."
    )


def _markdown_text(text: str) -> str:
    one_line = " ".join(clean(text).split())
    escaped = html.escape(one_line, quote=False)
    for mark in "\\`*_[]|~":
        escaped = escaped.replace(mark, "\\" + mark)
    return escaped


def _page(comparison: Comparison, name: str, runs: Sequence[ComparedRun] = ()) -> str:
    header = element(
        "header",
        element("p", "fedpeat comparison ", element("b", name), class_="over"),
        element("h1", _headline(comparison)),
        element("p", _caption(comparison), class_="meta"),
    )
    num_runs = sum(len(row.seeds) for row in comparison.rows)
    costs = compared_costs(runs, comparison.metric, num_runs)
    chart_lead = "Dots are seeds, the filled dot is their mean, the bar its 95 % interval."
    sections = (
        section(f"Plug-in {comparison.metric}", chart_lead, _chart(comparison)),
        *([section("In the simulated world", _COSTS_LEAD, costs)] if costs else []),
        section("Numbers", "", _table(comparison)),
    )
    return document(f"{name} - fedpeat", join([header, *sections]))


def _headline(comparison: Comparison) -> str:
    finite = [
        (row, found.mean)
        for row in comparison.rows
        if (found := row.estimate("plug_in")) and math.isfinite(found.mean)
    ]
    if not finite:
        return "No method has a finite plug-in quality yet."
    best, value = finite[0]
    for row, mean in finite[1:]:
        if is_better(mean, value, comparison.metric):
            best, value = row, mean
    best_word = "lowest" if comparison.metric == "perplexity" else "highest"
    of = f" of {len(comparison.rows)} methods" if len(comparison.rows) > 1 else ""
    text = quality_text(value, comparison.metric, 3)
    return f"{best.method} has the {best_word} mean {comparison.metric}{of}: {text}."


def _table(comparison: Comparison) -> Html:
    columns = _measured_columns(comparison)
    titles = ["Seeds", *(_column_title(label, name, comparison) for name, label in columns)]
    head = [
        element("th", "Method", scope="col"),
        *(element("th", title, scope="col", class_="n") for title in titles),
    ]
    rows = [
        element(
            "tr",
            element("th", element("span", row.method or "(no name)", class_="name"), scope="row"),
            element("td", len(row.seeds), class_="n"),
            *(_cell(row.estimate(name), name, comparison.metric) for name, _ in columns),
        )
        for row in comparison.rows
    ]
    table = element("table", element("thead", element("tr", *head)), element("tbody", *rows))
    return element(
        "div", table, class_="scroll dense", tabindex=0, role="region", aria_label="Numbers"
    )


def _cell(found: Estimate | None, name: str, metric: str) -> Html:
    mean, interval = _cell_parts(found, name, metric)
    style = "n absent" if mean in {NOT_MEASURED, NOT_FINITE} else "n"
    return element("td", mean, element("small", interval) if interval else "", class_=style)


def _chart(comparison: Comparison) -> Html:
    scale = _scale(comparison)
    if scale is None:
        return element("p", "No finite plug-in quality to draw.", class_="empty")
    bottom = _ROW_HEIGHT * len(comparison.rows)
    parts = [
        *_ticks(scale, comparison.metric, bottom),
        *_zero_shot_line(comparison, scale, bottom),
        *(
            part
            for index, row in enumerate(comparison.rows)
            for part in _strip(row, index, scale, comparison.metric)
        ),
    ]
    title = element("title", f"Plug-in {comparison.metric} of each method", id="strips-title")
    return element(
        "svg",
        title,
        element("desc", _description(comparison), id="strips-desc"),
        *parts,
        role="img",
        height=bottom + _AXIS_HEIGHT,
        class_="strips",
        aria_labelledby="strips-title strips-desc",
    )


def _scale(comparison: Comparison) -> Scale | None:
    """Return the scale from values to percent of the width: text keeps its size on any screen."""
    values = [value for row in comparison.rows for value in row.values["plug_in"]]
    for row in comparison.rows:
        found = row.estimate("plug_in")
        if found and found.half_width is not None:
            values += [found.mean - found.half_width, found.mean + found.half_width]
        zero_shot = row.estimate("full_zero_shot")
        values.append(zero_shot.mean if zero_shot else None)
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if not any(_finite(row.values["plug_in"]) for row in comparison.rows):
        return None
    return Scale(*padded_range(finite, is_log=False), _INSET_PERCENT, 100 - _INSET_PERCENT)


def _finite(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


def _ticks(scale: Scale, metric: str, bottom: int) -> Iterator[Html]:
    for tick in nice_ticks(scale.low, scale.high, most=6):
        x = f"{scale.at(tick):.2f}%"
        label = f"{100 * tick:.4g}%" if metric == "accuracy" else f"{tick:.6g}"
        yield element("line", x1=x, x2=x, y1=0, y2=bottom, class_="grid")
        yield element("text", label, x=x, y=bottom + 18, class_="x")


def _zero_shot_line(comparison: Comparison, scale: Scale, bottom: int) -> Iterator[Html]:
    """Yield the level that all methods start from, if they share one."""
    found = [row.estimate("full_zero_shot") for row in comparison.rows]
    means = {one.mean for one in found if one and math.isfinite(one.mean)}
    if len(means) == 1:
        mean = means.pop()
        x = f"{scale.at(mean):.2f}%"
        title = element("title", f"full zero-shot {quality_text(mean, comparison.metric)}")
        yield element("line", title, x1=x, x2=x, y1=0, y2=bottom, class_="zero")
        anchor = "end" if scale.at(mean) > 50 else "start"
        yield element("text", "full zero-shot", x=x, y=bottom + 38, text_anchor=anchor)


def _strip(row: Row, index: int, scale: Scale, metric: str) -> Iterator[Html]:
    top = index * _ROW_HEIGHT
    y = top + 38
    found = row.estimate("plug_in")
    mean, interval = _cell_parts(found, "plug_in", metric)
    label = element(
        "tspan", row.method if len(row.method) <= 32 else row.method[:29] + "...", class_="label"
    )
    yield element(
        "text",
        label,
        element("tspan", f"  {mean} {interval}".rstrip(), dx=8),
        x=f"{_INSET_PERCENT}%",
        y=top + 20,
    )
    if found and found.half_width is not None:
        ends = {
            "x1": f"{scale.at(found.mean - found.half_width):.2f}%",
            "x2": f"{scale.at(found.mean + found.half_width):.2f}%",
        }
        yield element("line", y1=y, y2=y, class_="range", **ends)
    for seed, value in zip(row.seeds, row.values["plug_in"], strict=True):
        if value is not None and math.isfinite(value):
            title = element("title", f"seed {seed_text(seed)}: {quality_text(value, metric)}")
            yield element("circle", title, cx=f"{scale.at(value):.2f}%", cy=y, r=4, class_="seed")
    if found and math.isfinite(found.mean):
        yield element(
            "circle",
            element("title", f"mean {mean}"),
            cx=f"{scale.at(found.mean):.2f}%",
            cy=y,
            r=5.5,
            class_="mean",
        )


def _description(comparison: Comparison) -> str:
    parts = [
        f"{row.method}: {_cell_text(row.estimate('plug_in'), 'plug_in', comparison.metric)}"
        for row in comparison.rows
    ]
    return "; ".join(parts) + "."
