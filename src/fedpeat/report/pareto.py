"""Emulators against each other: plug-in quality and what an attacker recovers, as page and table.

A good emulator is at the bottom left: the tuned adapter helps the full model much, and an attacker
gets little of it back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedpeat.core.errors import DataError
from fedpeat.report.audit import load_audit
from fedpeat.report.axes import Scale, nice_ticks, padded_range, value_ticks
from fedpeat.report.headline import is_better
from fedpeat.report.load import load_run
from fedpeat.report.markup import Html, element, join
from fedpeat.report.page import document, section, write_page
from fedpeat.report.quantities import quality_text, ratio_text

__all__ = ["Candidate", "front", "pareto_markdown", "write_pareto"]

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 640.0, 400.0, 56.0, 20.0, 14.0, 48.0


@dataclass(frozen=True)
class Candidate:
    """One audited emulator of a run."""

    name: str
    recipe: str
    metric: str
    plug_in: float | None
    gap_closed: float | None
    leaked_ratio: float | None
    recovered_ratio: float | None
    equal_ratio: float | None

    @property
    def place(self) -> tuple[float, float] | None:
        """Recovered capability and plug-in quality, if both are finite."""
        pair = (self.recovered_ratio, self.plug_in)
        if pair[0] is None or pair[1] is None or not math.isfinite(pair[0] + pair[1]):
            return None
        return pair[0], pair[1]


def write_pareto(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write ``audit.html`` and ``audit.md`` over some audited run folders.

    Raises:
        DataError: If a folder is no run folder, was not audited, or they differ in their metric.
        StorageError: If the files cannot be written.
    """
    candidates = [candidate for run_dir in run_dirs for candidate in _candidates(Path(run_dir))]
    metrics = {candidate.metric for candidate in candidates}
    if len(metrics) > 1:
        raise DataError(
            f"{out}: all runs must be measured by one metric, got {', '.join(sorted(metrics))}"
        )
    write_page(out / "audit.md", pareto_markdown(candidates))
    return write_page(out / "audit.html", _page(candidates))


def _candidates(run_dir: Path) -> list[Candidate]:
    run, audit = load_run(run_dir), load_audit(run_dir)
    if audit is None:
        raise DataError(f"{run_dir}: must have an audit.json, got none; fedpeat audit writes it")
    quality = run.summary.quality if run.summary else None
    several = len(audit.emulators) > 1
    return [
        Candidate(
            name=f"{run.name}, {item.name}" if several else run.name,
            recipe=item.recipe,
            metric=run.metric,
            plug_in=quality.plug_in if quality else None,
            gap_closed=quality.gap_closed if quality else None,
            leaked_ratio=item.leaked_ratio,
            recovered_ratio=item.recovered_ratio,
            equal_ratio=item.equal_ratio,
        )
        for item in audit.emulators
    ]


def front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return those to which no other is better in one of the two and not worse in the other.

    They come by rising recovered capability.
    """
    placed = [(candidate, place) for candidate in candidates if (place := candidate.place)]
    best = [
        (place, candidate)
        for candidate, place in placed
        if not any(_dominates(other, place, candidate.metric) for _, other in placed)
    ]
    return [candidate for _, candidate in sorted(best, key=lambda pair: pair[0])]


def _dominates(one: tuple[float, float], other: tuple[float, float], metric: str) -> bool:
    no_worse = one[0] <= other[0] and not is_better(other[1], one[1], metric)
    return no_worse and one != other


_COLUMNS = ("Emulator", "Recipe", "Plug-in", "Gap closed", "Verbatim", "Untouched", "Recovered")


def _texts(candidate: Candidate) -> list[str]:
    return [
        candidate.name,
        candidate.recipe,
        quality_text(candidate.plug_in, candidate.metric),
        *(
            ratio_text(ratio)
            for ratio in (
                candidate.gap_closed,
                candidate.equal_ratio,
                candidate.leaked_ratio,
                candidate.recovered_ratio,
            )
        ),
    ]


def pareto_markdown(candidates: Sequence[Candidate]) -> str:
    """Return a table of the emulators; those of the front are bold."""
    best = front(candidates)
    lines = [f"| {' | '.join(_COLUMNS)} |", "|:--|:--|" + "--:|" * (len(_COLUMNS) - 2)]
    for candidate in candidates:
        name, *rest = (text.replace("|", "\\|") for text in _texts(candidate))
        shown = f"**{name}**" if candidate in best else name
        lines.append(f"| {' | '.join([shown, *rest])} |")
    return "\n".join([*lines, "", _CAPTION, ""])


_CAPTION = (
    "Verbatim: share of the full model's parameters that stand in the emulator bit for bit. "
    "Untouched and recovered: share of the way to the full model, in log perplexity, from a random "
    "network and from one trained from scratch on the attacker's text. Bold: no other emulator is "
    "better in plug-in or recovered and not worse in the other."
)


def _page(candidates: Sequence[Candidate]) -> str:
    metric = candidates[0].metric if candidates else "perplexity"
    header = element(
        "header",
        element("p", "fedpeat audit", class_="over"),
        element("h1", f"{len(candidates)} emulators: what they bring, and what they give away"),
        element("p", _CAPTION, class_="meta"),
    )
    better = "lower" if metric == "perplexity" else "higher"
    lead = f"To the left less is recovered; {better} {metric} is better. The line joins the front."
    return document(
        "fedpeat audit",
        join(
            [
                header,
                section("Plug-in quality against recovered capability", lead, _chart(candidates)),
                section("Numbers", "", _table(candidates)),
            ]
        ),
    )


def _table(candidates: Sequence[Candidate]) -> Html:
    best = front(candidates)
    head = [
        element("th", name, scope="col", class_="n" if i > 1 else None)
        for i, name in enumerate(_COLUMNS)
    ]
    rows = []
    for candidate in candidates:
        name, recipe, *numbers = _texts(candidate)
        cells = [element("td", text, class_="n") for text in numbers]
        style = "result" if candidate in best else None
        label = element("th", name, scope="row")
        rows.append(element("tr", label, element("td", recipe), *cells, class_=style))
    table = element("table", element("thead", element("tr", *head)), element("tbody", *rows))
    return element(
        "div", table, class_="scroll dense", tabindex=0, role="region", aria_label="Numbers"
    )


def _chart(candidates: Sequence[Candidate]) -> Html:
    placed = [(candidate, place) for candidate in candidates if (place := candidate.place)]
    if not placed:
        return element("p", "No emulator has both numbers.", class_="empty")
    is_log = candidates[0].metric == "perplexity"
    low, high = padded_range([place[1] for _, place in placed], is_log=is_log)
    quality = Scale(low, high, _HEIGHT - _BOTTOM, _TOP, is_log=is_log)
    left, right = padded_range([place[0] for _, place in placed], is_log=False)
    across = Scale(left, right, _LEFT, _WIDTH - _RIGHT)
    path = [place for candidate in front(candidates) if (place := candidate.place)]
    d = "M" + "L".join(f"{across.at(x):.1f} {quality.at(y):.1f}" for x, y in path)
    svg = element(
        "svg",
        element("title", "Plug-in quality against recovered capability", id="pareto-title"),
        element("desc", "; ".join(_said(c) for c, _ in placed) + ".", id="pareto-desc"),
        *_axes(quality, across, candidates[0].metric),
        element("path", d=d, class_="line plug"),
        *(part for c, place in placed for part in _dot(c, place, quality, across)),
        viewBox=f"0 0 {_WIDTH:.0f} {_HEIGHT:.0f}",
        role="img",
        class_="pareto",
        aria_labelledby="pareto-title pareto-desc",
    )
    return element("figure", svg)


def _said(candidate: Candidate) -> str:
    return (
        f"{candidate.name}: plug-in {quality_text(candidate.plug_in, candidate.metric)}, "
        f"recovered {ratio_text(candidate.recovered_ratio)}"
    )


def _axes(quality: Scale, across: Scale, metric: str) -> Iterator[Html]:
    bottom = _HEIGHT - _BOTTOM
    for tick in value_ticks(quality.low, quality.high, is_log=quality.is_log):
        y = quality.at(tick)
        label = f"{100 * tick:.4g}%" if metric == "accuracy" else f"{tick:.6g}"
        yield element("path", d=f"M{_LEFT:.0f} {y:.1f}H{_WIDTH - _RIGHT:.0f}", class_="grid")
        yield element("text", label, x=_LEFT - 8, y=y + 4, class_="y")
    yield element("path", d=f"M{_LEFT:.0f} {bottom:.0f}H{_WIDTH - _RIGHT:.0f}", class_="axis")
    for tick in nice_ticks(100 * across.low, 100 * across.high):
        x = across.at(tick / 100)
        yield element("text", f"{tick:.4g}%", x=x, y=bottom + 18, class_="x")
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    yield element("text", "recovered capability", x=middle, y=_HEIGHT - 8, class_="x name")


def _dot(
    candidate: Candidate, place: tuple[float, float], quality: Scale, across: Scale
) -> Iterator[Html]:
    x, y = across.at(place[0]), quality.at(place[1])
    yield element("circle", element("title", _said(candidate)), cx=x, cy=y, r=4.5, class_="mark")
    is_right = x > (_LEFT + _WIDTH) / 2
    label = candidate.name if len(candidate.name) <= 40 else candidate.name[:37] + "..."
    yield element(
        "text",
        label,
        x=x - 8 if is_right else x + 8,
        y=y - 7,
        text_anchor="end" if is_right else "start",
    )
