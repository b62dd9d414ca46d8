"""What a policy has learnt: how likely it asks a device, and for what, by uplink and memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Final

from fedpeat.report.axes import Scale, nice_ticks, padded_range
from fedpeat.report.markup import Html, element, join
from fedpeat.report.plots import tick_label
from fedpeat.report.quantities import number_text, ratio_text
from fedpeat.report.records import Habit
from fedpeat.report.rungs import by_size, shade_of

__all__ = ["habits_section"]

_WIDTH, _HEIGHT = 340.0, 200.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 12.0, 10.0, 44.0
_MOST_CHOICES: Final = 12
_MOST_NAME: Final = 30
_TRAITS: Final = {
    "snr_up_db": ("By the uplink", "uplink SNR [dB]", "dB"),
    "free_memory_gb": ("By memory", "free memory [GB]", "GB"),
}
_CHOICES: Final = {
    "rung": ("Which rung, if it takes part", "rung"),
    "local_steps": ("How many local steps, if it takes part", "local steps"),
}
_UP: Final = Scale(0.0, 1.0, _HEIGHT - _BOTTOM, _TOP)

Bin = tuple[float, tuple[float, ...]]
"""Center of a bin, and a probability of each choice there."""


def habits_section(habits: Sequence[Habit]) -> Html:
    """Return a row of charts per trait, with one legend for each kind of choice."""
    names = {
        choice: by_size(dict.fromkeys(n for habit in habits for n in habit.choices[choice]))
        for choice in _CHOICES
    }
    rows = [_row(habit, names) for habit in habits]
    return join([*(_legend(choice, own) for choice, own in names.items() if own), *rows])


def _legend(choice: str, names: Sequence[str]) -> Html:
    items = [
        element(
            "li",
            element(
                "svg",
                element("path", d="M1 1H13V13H1z", class_=shade_of(place, len(names))),
                width=14,
                height=14,
                aria_hidden="true",
            ),
            f"{_CHOICES[choice][1]} {_short(name)}",
        )
        for place, name in enumerate(names[:_MOST_CHOICES])
    ]
    if len(names) > _MOST_CHOICES:
        items.append(element("li", f"and {len(names) - _MOST_CHOICES:,} more"))
    return element("ul", *items, class_="legend")


def _short(name: str) -> str:
    return name if len(name) <= _MOST_NAME else name[: _MOST_NAME - 3] + "..."


def _row(habit: Habit, names: Mapping[str, Sequence[str]]) -> Html:
    centers = [c for c in habit.centers if c is not None and math.isfinite(c)]
    heading, axis, unit = _TRAITS[habit.trait]
    title = element("h3", heading)
    if not centers:
        return join([title, element("p", "Nothing was recorded.", class_="empty")])
    low, high = min(centers), max(centers)
    if not high > low:
        low, high = padded_range(centers, is_log=False)
    frame = Scale(low, high, _LEFT, _WIDTH - _RIGHT)
    figures = [
        _figure(
            f"{habit.trait}-takes-part",
            f"Takes part: {_range(habit.takes_part)}",
            axis,
            frame,
            [*_line(_bins(habit.centers, [habit.takes_part]), frame, unit)],
        ),
        *(
            _figure(
                f"{habit.trait}-{choice.replace('_', '-')}",
                _CHOICES[choice][0],
                axis,
                frame,
                [*_areas(habit, choice, names[choice], frame)],
            )
            for choice in _CHOICES
            if habit.choices[choice]
        ),
    ]
    return join([title, element("div", *figures, class_="charts")])


def _range(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "not recorded"
    low, high = ratio_text(min(known)), ratio_text(max(known))
    return low if low == high else f"{low} to {high}"


def _bins(
    centers: Sequence[float | None], columns: Sequence[Sequence[float | None]]
) -> list[Bin | None]:
    """Return the bins in order; None where a number is missing."""
    found: list[Bin | None] = []
    for center, values in zip(centers, zip(*columns, strict=True), strict=True):
        known = tuple(value for value in values if value is not None)
        is_whole = center is not None and math.isfinite(center) and len(known) == len(values)
        found.append((center, known) if is_whole and center is not None else None)
    return found


def _pieces(bins: Sequence[Bin | None]) -> Iterator[list[Bin]]:
    for is_there, group in groupby(bins, lambda one: one is not None):
        if is_there:
            yield [one for one in group if one]


def _figure(name: str, caption: str, axis: str, across: Scale, parts: Sequence[Html]) -> Html:
    said = parts or [element("text", "not recorded", x=_WIDTH / 2, y=_HEIGHT / 2, class_="x")]
    svg = element(
        "svg",
        element("title", f"{caption}, by {axis}", id=f"{name}-title"),
        *_axes(across, axis),
        *said,
        viewBox=f"0 0 {_WIDTH:.0f} {_HEIGHT:.0f}",
        role="img",
        aria_labelledby=f"{name}-title",
    )
    return element("figure", element("figcaption", caption), svg)


def _axes(across: Scale, axis: str) -> Iterator[Html]:
    bottom = _HEIGHT - _BOTTOM
    for tick in nice_ticks(0.0, 1.0, most=4):
        y = _UP.at(tick)
        yield element("path", d=f"M{_LEFT:.0f} {y:.1f}H{_WIDTH - _RIGHT:.0f}", class_="grid")
        yield element("text", f"{100 * tick:.0f}%", x=_LEFT - 8, y=y + 4, class_="y")
    yield element("path", d=f"M{_LEFT:.0f} {bottom:.0f}H{_WIDTH - _RIGHT:.0f}", class_="axis")
    for tick in nice_ticks(across.low, across.high):
        yield element("text", tick_label(tick), x=across.at(tick), y=bottom + 17, class_="x")
    yield element("text", axis, x=(_LEFT + _WIDTH - _RIGHT) / 2, y=_HEIGHT - 8, class_="x name")


def _line(bins: Sequence[Bin | None], across: Scale, unit: str) -> Iterator[Html]:
    for piece in _pieces(bins):
        if len(piece) > 1:
            places = (f"{across.at(center):.1f} {_UP.at(p[0]):.1f}" for center, p in piece)
            yield element("path", d="M" + "L".join(places), class_="line plug")
        for center, p in piece:
            title = element("title", f"{number_text(center, 3)} {unit}: {ratio_text(p[0])}")
            yield element(
                "circle", title, cx=across.at(center), cy=_UP.at(p[0]), r=3.2, class_="mark"
            )


def _areas(habit: Habit, choice: str, names: Sequence[str], across: Scale) -> Iterator[Html]:
    """Yield an area per choice, the largest at the bottom, one upon another."""
    unit, own = _TRAITS[habit.trait][2], [n for n in names if n in habit.choices[choice]]
    bins = _bins(habit.centers, [habit.choices[choice][name] for name in own])
    for piece in _pieces(bins):
        wide = piece if len(piece) > 1 else _widened(piece[0], across)
        for place, name in enumerate(own):
            told = "; ".join(
                f"{number_text(center, 3)} {unit}: {ratio_text(p[place])}" for center, p in piece
            )
            yield element(
                "path",
                element("title", f"{_CHOICES[choice][1]} {_short(name)}: {told}"),
                d=_outline(wide, place, across),
                class_=f"area {shade_of(names.index(name), len(names))}",
            )


def _widened(one: Bin, across: Scale) -> list[Bin]:
    """Return a lone bin with some width."""
    air = 0.01 * (across.high - across.low)
    return [(one[0] - air, one[1]), (one[0] + air, one[1])]


def _outline(bins: Sequence[Bin], place: int, across: Scale) -> str:
    def points(count: int, order: Sequence[Bin]) -> list[str]:
        # what is no distribution must not leave the chart
        heights = (min(math.fsum(p[:count]), 1.0) for _, p in order)
        return [
            f"{across.at(center):.1f} {_UP.at(height):.1f}"
            for (center, _), height in zip(order, heights, strict=True)
        ]

    return "M" + "L".join([*points(place + 1, bins), *points(place, bins[::-1])]) + "z"
