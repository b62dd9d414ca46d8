"""What an audit found: read from audit.json, told in words, a chart and a table."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from fedpeat.report.axes import Scale, nice_ticks, padded_range, value_ticks
from fedpeat.report.fields import Fields, read_record
from fedpeat.report.markup import Html, element, join
from fedpeat.report.quantities import count_text, number_text, quality_text, ratio_text
from fedpeat.report.records import METRICS, Attack, AttackPoint, Audit, AuditedEmulator

__all__ = ["ATTACK_NAMES", "audit_lead", "audit_section", "load_audit"]

ATTACK_NAMES: Final = {
    "from_scratch": "Random network, trained",
    "fine_tune": "Emulator, fine-tuned",
    "reinsert": "Missing blocks re-inserted, trained",
}
_MEANING: Final = (
    "Recovered: share of the way from the network trained from scratch to the full model; "
    "regained: from the untouched emulator; both in log perplexity, at the best point."
)
_STYLES: Final = {"from_scratch": "zero", "fine_tune": "plug", "reinsert": "tuned"}
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 460.0, 250.0, 46.0, 12.0, 10.0, 44.0


def load_audit(run_dir: Path) -> Audit | None:
    """Return what audit.json of a folder says; None where there is none.

    Raises:
        DataError: If it is not as expected.
    """
    fields = read_record(run_dir / "audit.json")
    if fields is None:
        return None
    return Audit(
        fields.choice("metric", METRICS),
        _source(fields.child("public_text")),
        _source(fields.child("held_out")),
        tuple(_emulator(item) for item in fields.children("emulators")),
    )


def _source(fields: Fields | None) -> str:
    return (fields.text("source") if fields else "") or "not recorded"


def _emulator(fields: Fields) -> AuditedEmulator:
    verbatim, capability, attacks = (
        fields.child(name) or Fields({}, fields.where)
        for name in ("verbatim", "capability", "attacks")
    )
    made = [(name, attacks.child(name)) for name in ATTACK_NAMES]
    return AuditedEmulator(
        name=fields.text("name"),
        recipe=fields.text("recipe"),
        equal_ratio=verbatim.number("equal_ratio"),
        near_ratio=verbatim.number("near_ratio"),
        leaked_ratio=capability.number("leaked_ratio"),
        recovered_ratio=fields.number("recovered_ratio"),
        full=capability.number("full"),
        untouched=capability.number("emulator"),
        attacks=tuple(_attack(name, found) for name, found in made if found),
        verdicts=fields.texts("verdicts"),
    )


def _attack(name: str, fields: Fields) -> Attack:
    curve = tuple(
        AttackPoint(point.whole("num_tokens"), point.measured("perplexity"))
        for point in fields.children("curve")
    )
    return Attack(
        name,
        fields.number("learning_rate"),
        fields.number("recovered_ratio"),
        fields.number("regained_ratio"),
        curve,
    )


def audit_lead(audit: Audit) -> str:
    """Return what was measured, in a line."""
    return (
        f"What an attacker with text of his own ({audit.public_text}) gets back; {audit.metric} on "
        f"the {audit.held_out}. Another attacker may do better."
    )


def audit_section(audit: Audit) -> Html:
    """Return verdicts, curves and numbers of each emulator."""
    return join(_emulator_part(item, audit, f"audit-{i}") for i, item in enumerate(audit.emulators))


def _emulator_part(item: AuditedEmulator, audit: Audit, key: str) -> Html:
    heading = element("h3", f"{item.name}, {item.recipe}") if len(audit.emulators) > 1 else ""
    words = element("ul", *[element("li", line) for line in item.verdicts], class_="remarks")
    chart = element("div", _chart(item, audit.metric, key), class_="charts")
    return join(
        [heading, words, element("p", _MEANING, class_="note"), chart, _table(item, audit.metric)]
    )


def _table(item: AuditedEmulator, metric: str) -> Html:
    longest = max((attack.curve for attack in item.attacks), key=len, default=())
    titles = [f"{count_text(point.num_tokens)} tokens" for point in longest]
    head = [
        element("th", title, scope="col", class_="n" if i else None)
        for i, title in enumerate(["Attack", *titles, "Recovered", "Regained"])
    ]
    rows = [_row(attack, metric, len(longest)) for attack in item.attacks]
    caption = element(
        "caption",
        f"{metric.capitalize()} of the full model {quality_text(item.full, metric)}, of the "
        f"untouched emulator {quality_text(item.untouched, metric)}",
    )
    table = element(
        "table", caption, element("thead", element("tr", *head)), element("tbody", *rows)
    )
    return element("div", table, class_="scroll", tabindex=0, role="region", aria_label="Attacks")


def _row(attack: Attack, metric: str, width: int) -> Html:
    texts = [quality_text(point.value, metric) for point in attack.curve]
    texts += [""] * (width - len(texts))
    ratios = (attack.recovered_ratio, attack.regained_ratio)
    texts += ["-" if ratio is None else ratio_text(ratio) for ratio in ratios]
    rate = element("small", f"learning rate {number_text(attack.learning_rate)}")
    return element(
        "tr",
        element("th", ATTACK_NAMES[attack.name], rate, scope="row"),
        *[element("td", text, class_="n") for text in texts],
    )


def _chart(item: AuditedEmulator, metric: str, key: str) -> Html:
    points = [point for attack in item.attacks for point in attack.curve]
    values = [
        value for value in (item.full, *(point.value for point in points)) if _is_plottable(value)
    ]
    most = max((point.num_tokens for point in points), default=0.0)
    if not values or not most:
        return element("p", "Nothing to draw.", class_="empty")
    low, high = padded_range([v for v in values if v is not None], is_log=True)
    quality = Scale(low, high, _HEIGHT - _BOTTOM, _TOP, is_log=True)
    across = Scale(0.0, most, _LEFT, _WIDTH - _RIGHT)
    svg = element(
        "svg",
        element("title", f"{metric} that attacks reach", id=f"{key}-title"),
        element("desc", _description(item, metric), id=f"{key}-desc"),
        *_axes(quality, across),
        *_level(item, quality),
        *(part for attack in item.attacks for part in _line(attack, quality, across, metric)),
        viewBox=f"0 0 {_WIDTH:.0f} {_HEIGHT:.0f}",
        role="img",
        aria_labelledby=f"{key}-title {key}-desc",
    )
    return join([element("figure", svg), _legend(item, metric)])


def _is_plottable(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and value > 0


def _axes(quality: Scale, across: Scale) -> Iterator[Html]:
    bottom = _HEIGHT - _BOTTOM
    for tick in value_ticks(quality.low, quality.high, is_log=True):
        y = quality.at(tick)
        yield element("path", d=f"M{_LEFT:.0f} {y:.1f}H{_WIDTH - _RIGHT:.0f}", class_="grid")
        yield element("text", f"{tick:.6g}", x=_LEFT - 8, y=y + 4, class_="y")
    yield element("path", d=f"M{_LEFT:.0f} {bottom:.0f}H{_WIDTH - _RIGHT:.0f}", class_="axis")
    for tick in nice_ticks(0.0, across.high):
        label = count_text(tick)
        yield element("text", label, x=across.at(tick), y=bottom + 17, class_="x")
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    yield element("text", "tokens of public text", x=middle, y=_HEIGHT - 8, class_="x name")


def _level(item: AuditedEmulator, quality: Scale) -> Iterator[Html]:
    if item.full is not None and _is_plottable(item.full):
        d = f"M{_LEFT:.0f} {quality.at(item.full):.1f}H{_WIDTH - _RIGHT:.0f}"
        yield element("path", element("title", "full model"), d=d, class_="line full")


def _line(attack: Attack, quality: Scale, across: Scale, metric: str) -> Iterator[Html]:
    places = [
        (across.at(point.num_tokens), quality.at(point.value), point)
        for point in attack.curve
        if point.value is not None and _is_plottable(point.value)
    ]
    if places:
        d = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y, _ in places)
        yield element("path", d=d, class_=f"line {_STYLES[attack.name]}")
    for x, y, point in places:
        text = f"{count_text(point.num_tokens)} tokens: {quality_text(point.value, metric)}"
        title = element("title", f"{ATTACK_NAMES[attack.name]}, {text}")
        yield element("circle", title, cx=x, cy=y, r=3.2, class_="mark")


def _legend(item: AuditedEmulator, metric: str) -> Html:
    entries = [(_STYLES[attack.name], ATTACK_NAMES[attack.name]) for attack in item.attacks]
    entries.append(("full", f"full model, {quality_text(item.full, metric)}"))
    keys = [
        element(
            "li",
            element(
                "svg",
                element("path", d="M1 6H27", class_=f"line {style}"),
                width=28,
                height=12,
                aria_hidden="true",
            ),
            label,
        )
        for style, label in entries
    ]
    return element("ul", *keys, class_="legend")


def _description(item: AuditedEmulator, metric: str) -> str:
    ends = [
        f"{ATTACK_NAMES[attack.name]}: {quality_text(attack.curve[-1].value, metric)}"
        for attack in item.attacks
        if attack.curve
    ]
    return "At the end of the budget, " + "; ".join(ends) + "."
