"""The first screen: key figures, the five qualities, and the checks that make an emulator good."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

from fedpeat.report.headline import is_better, latest_plug_in
from fedpeat.report.markup import Html, element
from fedpeat.report.quantities import (
    NOT_FINITE,
    NOT_MEASURED,
    bytes_text,
    count_text,
    number_text,
    quality_text,
    ratio_text,
    seconds_text,
)
from fedpeat.report.records import BESIDE, QUALITIES, UNITS, Cost, Quality, RunData

__all__ = ["checks_section", "cost_of", "key_figures", "qualities_section"]

_EXPLAINED: Final = {
    "full_zero_shot": ("Full zero-shot", "The full model, untouched: where everything starts."),
    "emulator_zero_shot": (
        "Emulator zero-shot",
        "The stand-in, untouched: how much of the model it gives away.",
    ),
    "emulator_tuned": (
        "Emulator tuned",
        "The stand-in with the tuned adapter: what a device ends up with.",
    ),
    "plug_in": ("Plug-in", "The full model with the tuned adapter: the result."),
    "full_tuned": (
        "Full tuned",
        "The full model tuned directly, same method and budget: the upper bound.",
    ),
}
_CHECKS: Final = (
    ("plug_in", "full_zero_shot", "Tuning helped: plug-in is better than full zero-shot"),
    (
        "plug_in",
        "emulator_tuned",
        "The model is worth keeping: plug-in is better than emulator tuned",
    ),
    (
        "full_zero_shot",
        "emulator_zero_shot",
        "The emulator gives less away: it is worse than full zero-shot",
    ),
)


def cost_of(run: RunData) -> Cost:
    """Return the summary's cost, or what the recorded rounds of an unfinished run add up to."""
    if run.summary is not None:
        return run.summary.cost
    last = run.rounds[-1] if run.rounds else None
    peaks = [record.peak_rss_bytes for record in run.rounds if record.peak_rss_bytes is not None]
    return Cost(
        bytes_down=_sum(record.bytes_down for record in run.rounds),
        bytes_up=_sum(record.bytes_up for record in run.rounds),
        wall_seconds=last.elapsed_seconds if last else None,
        peak_rss_bytes=max(peaks) if peaks else None,
    )


def _sum(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def key_figures(run: RunData) -> Html:
    """Return the row of key figures."""
    cost = cost_of(run)
    tiles = [
        _gap_tile(run),
        _plug_in_tile(run),
        _emulator_tile(run),
        _tile("Bytes moved", bytes_text(_sum((cost.bytes_down, cost.bytes_up))), _ways(cost)),
        _tile("Wall time", seconds_text(cost.wall_seconds), _speed(cost, UNITS[run.metric])),
        _tile("Peak memory", bytes_text(cost.peak_rss_bytes), "of the process, resident"),
    ]
    return element("dl", *tiles, class_="figures")


def _tile(name: str, value: str, note: str) -> Html:
    style = "absent" if value in {NOT_MEASURED, NOT_FINITE} else None
    note_cell = element("dd", note, class_="note") if note else ""
    return element("div", element("dt", name), element("dd", value, class_=style), note_cell)


def _gap_tile(run: RunData) -> Html:
    gap = run.summary.quality.gap_closed if run.summary else None
    return _tile("Gap closed", ratio_text(gap), "of the way from zero-shot to full tuning")


def _plug_in_tile(run: RunData) -> Html:
    before = run.summary.quality.full_zero_shot if run.summary else run.before_tuning
    note = f"{run.metric}, zero-shot {quality_text(before, run.metric)}"
    return _tile("Plug-in", quality_text(latest_plug_in(run), run.metric), note)


def _emulator_tile(run: RunData) -> Html:
    summary = run.summary
    if summary is None:
        return _tile("Emulator size", NOT_MEASURED, "known when the run ends")
    if summary.emulator is None:
        return _tile(
            "Emulator size", "no emulator", "devices held the model itself, or there were none"
        )
    part, whole = summary.emulator.num_parameters, summary.num_parameters
    share = part / whole if part is not None and whole else None
    return _tile(
        "Emulator size", ratio_text(share), f"{count_text(part)} of {count_text(whole)} parameters"
    )


def _ways(cost: Cost) -> str:
    return f"{bytes_text(cost.bytes_down)} down, {bytes_text(cost.bytes_up)} up"


def _speed(cost: Cost, unit: str) -> str:
    speed = cost.tokens_per_second
    return "" if speed is None else f"{count_text(speed)} {unit}/s"


def qualities_section(run: RunData) -> Html:
    """Return the table of the five qualities."""
    quality = run.summary.quality if run.summary else _partial(run)
    unit = "Perplexity per token" if run.metric == "perplexity" else "Accuracy"
    beside = _LABELS[BESIDE[run.metric]]
    names = ["Quality", unit, *([beside] if quality.beside else []), "What it is"]
    numeric = {unit, beside}
    head = [
        element("th", name, scope="col", class_="n" if name in numeric else None) for name in names
    ]
    rows = [_quality_row(name, quality) for name in QUALITIES]
    better = "lower" if run.metric == "perplexity" else "higher"
    caption = element("caption", f"{run.metric.capitalize()}: {better} is better")
    table = element(
        "table", caption, element("thead", element("tr", *head)), element("tbody", *rows)
    )
    return element("div", table, class_="scroll")


_LABELS: Final = {"bits_per_byte": "Bits per byte", "cross_entropy": "Cross-entropy"}


def _partial(run: RunData) -> Quality:
    """Return what an unfinished run knows: its validation quality before tuning and now."""
    last = next((record for record in reversed(run.tuning_rounds) if record.is_evaluated), None)
    first = run.rounds[0] if run.before_tuning is not None else None
    beside = {
        "plug_in": last.plug_in_beside if last else None,
        "full_zero_shot": first.plug_in_beside if first else None,
    }
    return Quality(
        metric=run.metric,
        values={"plug_in": last.plug_in if last else None, "full_zero_shot": run.before_tuning},
        beside=beside if any(value is not None for value in beside.values()) else {},
    )


def _quality_row(name: str, quality: Quality) -> Html:
    label, explanation = _EXPLAINED[name]
    cells = [_number_cell(quality_text(quality.values.get(name), quality.metric))]
    if quality.beside:
        cells.append(_number_cell(number_text(quality.beside.get(name))))
    style = "result" if name == "plug_in" else None
    return element(
        "tr", element("th", label, scope="row"), *cells, element("td", explanation), class_=style
    )


def _number_cell(text: str) -> Html:
    return element("td", text, class_="n absent" if text in {NOT_MEASURED, NOT_FINITE} else "n")


def checks_section(run: RunData) -> Html:
    """Return the three checks, each passed, failed or not measured."""
    values = run.summary.quality.values if run.summary else {}
    items = [
        _check(text, values.get(good), values.get(bad), run.metric) for good, bad, text in _CHECKS
    ]
    return element("ul", *items, class_="checks")


def _check(text: str, good: float | None, bad: float | None, metric: str) -> Html:
    verdict = _verdict(good, bad, metric)
    compared = (
        ""
        if verdict == NOT_MEASURED
        else f"{quality_text(good, metric)} against {quality_text(bad, metric)}"
    )
    style = {"pass": "pass", "fail": "fail"}.get(verdict, "open")
    mark = element(
        "svg",
        element("path", d=_MARKS[style]),
        width=16,
        height=16,
        viewBox="0 0 16 16",
        aria_hidden="true",
    )
    badge = element("span", mark, verdict, class_=f"verdict {style}")
    return element(
        "li", badge, element("span", text, element("small", compared) if compared else "")
    )


_MARKS: Final = {"pass": "M3.5 8.5l3 3l6-7", "fail": "M4 4l8 8m0-8l-8 8", "open": "M4 8h8"}


def _verdict(good: float | None, bad: float | None, metric: str) -> str:
    if good is None or bad is None:
        return NOT_MEASURED
    if math.isnan(good):
        return "fail"
    if math.isnan(bad):
        return NOT_FINITE
    return "pass" if is_better(good, bad, metric) else "fail"
