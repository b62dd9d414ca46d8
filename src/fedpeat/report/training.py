"""How controllers were trained: the policy's returns along the way, and all of them at the end."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Final

from fedpeat.report.axes import Scale, nice_ticks, padded_range
from fedpeat.report.markup import Html, element, join
from fedpeat.report.plots import key, tick_label
from fedpeat.report.quantities import count_text, number_text, seconds_text
from fedpeat.report.records import Learning, Trained, Worth

__all__ = ["learning_steps", "training_section"]

_WIDTH, _HEIGHT = 400.0, 236.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 12.0, 10.0, 44.0
_NAMES, _ROW, _NUMBERS = 92.0, 24.0, 96.0
_MOST_WORTHS: Final = 20
_MOST_NAME: Final = 15
_LEVELS: Final = {"tuned_fixed": "full", "random": "zero"}
_FARTHEST: Final = 2.0
"""A level is drawn up to so many times the curves' own range away, lest it squeeze them."""

Step = tuple[float, float, float, float]
"""Simulated rounds, and mean, lowest and highest return of all policies by then."""


def learning_steps(curves: Sequence[Learning]) -> list[Step | None]:
    """Return the steps that a policy has reached, None where not all have a finite return.

    A policy without any return is left out.
    """
    known = [found for curve in curves if (found := _known(curve))]
    steps = sorted({step for curve in curves for step in curve.steps})
    return [_step(step, known) for step in steps] if known else []


def _known(curve: Learning) -> Mapping[float, float]:
    pairs = zip(curve.steps, curve.returns, strict=True)
    return {step: value for step, value in pairs if value is not None and math.isfinite(value)}


def _step(step: float, known: Sequence[Mapping[float, float]]) -> Step | None:
    values = [curve[step] for curve in known if step in curve]
    if len(values) < len(known):
        return None
    return step, math.fsum(values) / len(values), min(values), max(values)


def training_section(trained: Trained) -> Html:
    """Return both charts, or a line that says why there are none."""
    if trained.fault:
        return _empty(f"Not shown, as the file is damaged. {trained.fault}")
    steps = learning_steps(trained.curves)
    num_policies = sum(bool(_known(curve)) for curve in trained.curves)
    figures = [
        *([_training(steps, num_policies, trained.worths)] if any(steps) else []),
        *([_returns(trained.worths)] if trained.worths else []),
    ]
    if not figures:
        return _empty("controller.json does not tell how it was trained.")
    note = _empty("No return of a policy was recorded while it was trained.")
    return join([element("div", *figures, class_="charts"), "" if any(steps) else note])


def _empty(text: str) -> Html:
    return element("p", text, class_="empty")


def _training(steps: Sequence[Step | None], num_policies: int, worths: Sequence[Worth]) -> Html:
    drawn = [step for step in steps if step]
    low, high = min(step[2] for step in drawn), max(step[3] for step in drawn)
    levels = {
        worth.kind: worth.mean
        for worth in worths
        if worth.kind in _LEVELS and math.isfinite(worth.mean)
    }
    room = _FARTHEST * max(high - low, 0.1 * abs(high), 1e-3)
    near = [mean for mean in levels.values() if low - room <= mean <= high + room]
    up = Scale(*padded_range([low, high, *near], is_log=False), _HEIGHT - _BOTTOM, _TOP)
    across = Scale(0.0, max(drawn[-1][0], 1.0), _LEFT, _WIDTH - _RIGHT)
    last = drawn[-1]
    one = "one policy" if num_policies == 1 else f"mean of {num_policies} policies"
    entries = [key("plug", f"{one}, {number_text(last[1], 3)} at the end")]
    if num_policies > 1:
        entries.append(_band_key("lowest to highest of them"))
    for kind, mean in levels.items():
        away = "" if mean in near else ", off the chart"
        entries.append(key(_LEVELS[kind], f"{kind}, {number_text(mean, 3)}{away}"))
    svg = element(
        "svg",
        element("title", "Return of the policy while it was trained", id="training-title"),
        element("desc", _told(drawn, one), id="training-desc"),
        *_grid(up, across),
        *(_level(kind, mean, up) for kind, mean in levels.items() if mean in near),
        *_curve(steps, up, across, has_band=num_policies > 1),
        viewBox=f"0 0 {_WIDTH:.0f} {_HEIGHT:.0f}",
        role="img",
        aria_labelledby="training-title training-desc",
    )
    caption = element("figcaption", "Return while the policy was trained")
    return element("figure", caption, svg, element("ul", *entries, class_="legend below"))


def _band_key(label: str) -> Html:
    sample = element("path", d="M1 1H27V11H1z", class_="band")
    return element("li", element("svg", sample, width=28, height=12, aria_hidden="true"), label)


def _told(steps: Sequence[Step], one: str) -> str:
    first, last = steps[0], steps[-1]
    return (
        f"Over {count_text(last[0])} simulated rounds, {one}: from {number_text(first[1], 3)} "
        f"to {number_text(last[1], 3)}."
    )


def _grid(up: Scale, across: Scale) -> Iterator[Html]:
    bottom = _HEIGHT - _BOTTOM
    for tick in nice_ticks(up.low, up.high):
        y = up.at(tick)
        yield element("path", d=f"M{_LEFT:.0f} {y:.1f}H{_WIDTH - _RIGHT:.0f}", class_="grid")
        yield element("text", tick_label(tick), x=_LEFT - 8, y=y + 4, class_="y")
    yield element("path", d=f"M{_LEFT:.0f} {bottom:.0f}H{_WIDTH - _RIGHT:.0f}", class_="axis")
    for tick in nice_ticks(0.0, across.high, smallest_step=1.0):
        yield element("text", _short_count(tick), x=across.at(tick), y=bottom + 17, class_="x")
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    yield element("text", "simulated rounds", x=middle, y=_HEIGHT - 8, class_="x name")


def _short_count(value: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{tick_label(value / size)} {unit}"
    return tick_label(value)


def _level(kind: str, mean: float, up: Scale) -> Html:
    d = f"M{_LEFT:.0f} {up.at(mean):.1f}H{_WIDTH - _RIGHT:.0f}"
    return element("path", element("title", kind), d=d, class_=f"line {_LEVELS[kind]}")


def _curve(
    steps: Sequence[Step | None], up: Scale, across: Scale, *, has_band: bool
) -> Iterator[Html]:
    """Yield band and mean, broken where a return is missing; a lone step is a dot."""
    for is_there, group in groupby(steps, lambda step: step is not None):
        piece = [step for step in group if step] if is_there else []
        if len(piece) == 1:
            step, mean, low, high = piece[0]
            x = across.at(step)
            if has_band:
                d = f"M{x:.1f} {up.at(low):.1f}V{up.at(high):.1f}"
                yield element("path", d=d, class_="line plug")
            yield element("circle", cx=x, cy=up.at(mean), r=3.2, class_="mark")
        elif piece:
            if has_band:
                yield element("path", d=_band(piece, up, across), class_="band")
            places = (f"{across.at(step[0]):.1f} {up.at(step[1]):.1f}" for step in piece)
            yield element("path", d="M" + "L".join(places), class_="line plug")


def _band(steps: Sequence[Step], up: Scale, across: Scale) -> str:
    upper = [f"{across.at(step[0]):.1f} {up.at(step[3]):.1f}" for step in steps]
    lower = [f"{across.at(step[0]):.1f} {up.at(step[2]):.1f}" for step in reversed(steps)]
    return "M" + "L".join([*upper, *lower]) + "z"


def _returns(worths: Sequence[Worth]) -> Html:
    """Return a row per controller, the best at the top, those without a finite mean at the end."""
    ordered = sorted(
        worths, key=lambda worth: -worth.mean if math.isfinite(worth.mean) else math.inf
    )
    shown = ordered[:_MOST_WORTHS]
    ends = [end for worth in shown if math.isfinite(worth.mean) for end in _interval(worth)]
    low, high = padded_range(ends or [0.0], is_log=False)
    across = Scale(low, high, _NAMES, _WIDTH - _NUMBERS)
    bottom = _ROW * len(shown) + 4
    svg = element(
        "svg",
        element("title", "Return of each controller", id="returns-title"),
        element("desc", "; ".join(_worth_text(worth) for worth in shown) + ".", id="returns-desc"),
        *_returns_axis(across, bottom),
        *(
            part
            for index, worth in enumerate(shown)
            for part in _worth(worth, (index + 0.5) * _ROW + 4, across)
        ),
        viewBox=f"0 0 {_WIDTH:.0f} {bottom + _BOTTOM:.0f}",
        role="img",
        class_="worths",
        aria_labelledby="returns-title returns-desc",
    )
    cut = f" (the best {_MOST_WORTHS} of {len(worths)})" if len(worths) > len(shown) else ""
    caption = f"Return of each controller in worlds none was trained in{cut}"
    return element("figure", element("figcaption", caption), svg)


def _interval(worth: Worth) -> tuple[float, float]:
    half = worth.half_width or 0.0
    return worth.mean - half, worth.mean + half


def _worth_text(worth: Worth) -> str:
    took = f", {seconds_text(worth.seconds)} to train" if worth.seconds is not None else ""
    return f"{worth.kind}: {_number_text(worth)}{took}"


def _number_text(worth: Worth) -> str:
    mean, half = number_text(worth.mean, 3), worth.half_width
    if half is None or not math.isfinite(worth.mean):
        return mean
    decimals = len(mean.partition(".")[2])
    return f"{mean} \u00b1 {half:,.{decimals}f}"


def _returns_axis(across: Scale, bottom: float) -> Iterator[Html]:
    for tick in nice_ticks(across.low, across.high):
        x = across.at(tick)
        yield element("path", d=f"M{x:.1f} 4V{bottom:.0f}", class_="grid")
        yield element("text", tick_label(tick), x=x, y=bottom + 17, class_="x")
    middle = (across.start_px + across.end_px) / 2
    yield element("text", "mean return", x=middle, y=bottom + 36, class_="x name")


def _worth(worth: Worth, y: float, across: Scale) -> Iterator[Html]:
    name = worth.kind if len(worth.kind) <= _MOST_NAME else worth.kind[: _MOST_NAME - 3] + "..."
    title = element("title", _worth_text(worth))
    yield element("text", title, name, x=_NAMES - 12, y=y + 4, class_="y label")
    yield element("text", _number_text(worth), x=_WIDTH, y=y + 4, class_="y")
    if not math.isfinite(worth.mean):
        return
    low, high = _interval(worth)
    if high > low:
        d = f"M{across.at(low):.1f} {y:.1f}H{across.at(high):.1f}"
        yield element("path", d=d, class_="line plug")
    yield element("circle", title, cx=across.at(worth.mean), cy=y, r=4.0, class_="mark")
