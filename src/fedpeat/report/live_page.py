"""The live page: where a run stands, in the look of the report; each part has an id to replace."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Final

from fedpeat.report.curves import curves_section
from fedpeat.report.headline import headline, latest_plug_in
from fedpeat.report.live_script import LIVE_STYLE, SCRIPT
from fedpeat.report.live_tables import (
    cut_text,
    events_table,
    participants_table,
    rounds_table,
    stages_list,
)
from fedpeat.report.markup import Html, element, join, literal
from fedpeat.report.overview import cost_of
from fedpeat.report.quantities import (
    bytes_text,
    contrast_texts,
    count_text,
    quality_text,
    seconds_text,
)
from fedpeat.report.records import UNITS
from fedpeat.report.standing import Life, Standing
from fedpeat.report.style import STYLE

__all__ = ["live_page", "policy"]

_STYLE: Final = STYLE + LIVE_STYLE
_MOST_REMARKS: Final = 12
_MOST_ASIDE: Final = 20
_MOST_TEXT: Final = 240
_STATES: Final[dict[Life, str]] = {
    "running": "running",
    "finished": "finished",
    "stopped": "stopped: no process works on it; fedpeat run ... --resume goes on",
    "unknown": "not known whether it runs: there is no lock file",
}


def policy() -> str:
    """Return the page's Content-Security-Policy: its own script and style may run, nothing else."""
    script, style = _digest(SCRIPT), _digest(_STYLE)
    return (
        f"default-src 'none'; script-src '{script}'; style-src '{style}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def live_page(standing: Standing) -> str:
    """Return the page; it asks for itself again and shows what has changed."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name_="color-scheme", content="light dark"),
        element("link", rel="icon", href="data:,"),
        element("title", f"{_progress(standing)} \u00b7 {standing.run.name} - fedpeat"),
        element("style", literal(_STYLE)),
    )
    said = element("p", id="link", role="status", hidden="hidden")
    footer = element(
        "footer",
        "Made by fedpeat from the files of the run folder; it only reads. For scripts: "
        "/status.json; for Prometheus: /metrics.",
    )
    script = element("script", literal(SCRIPT))
    body = element("body", element("main", *_parts(standing), footer), said, script)
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _parts(standing: Standing) -> Iterator[Html]:
    yield element("header", *_header(standing), id="top")
    yield element("div", _bar(standing), _figures(standing), id="figures")
    yield element("div", _remarks(standing), id="remarks")
    quality = "Quality of the plug-in on the validation split, against what it cost."
    charts = element("div", curves_section(standing.run), class_="progress")
    yield _section("progress", "Progress", quality, charts)
    yield _section("participants", "Participants", "", participants_table(standing))
    yield _section("events", "Warnings and faults", "", events_table(standing))
    yield _section("rounds", "Rounds", "", rounds_table(standing))
    yield element("section", stages_list(standing), id="stages")


def _section(name: str, title: str, lead: str, content: Html) -> Html:
    told = element("p", lead, class_="lead") if lead else ""
    return element("section", element("h2", title), told, content, id=name)


def _header(standing: Standing) -> Iterator[Html]:
    state = element("span", _STATES[standing.life], class_=f"state {standing.life}")
    yield element(
        "p", element("span", "fedpeat, run ", element("b", standing.run.name)), state, class_="over"
    )
    yield element("h1", _headline(standing).replace(" %", "\u00a0%"))
    about = [
        *([f"model {standing.model}"] if standing.model else []),
        *([f"method {standing.method}"] if standing.method else []),
    ]
    yield element("p", join(_apart([*about, *_changed(standing)])), class_="meta")
    if standing.life == "running" and standing.last_log:
        yield element("p", "log: ", cut_text(standing.last_log, _MOST_TEXT), class_="meta log")


def _apart(parts: list[Html | str]) -> Iterator[Html | str]:
    for index, part in enumerate(parts):
        yield " \u00b7 " if index else ""
        yield part


def _changed(standing: Standing) -> list[Html | str]:
    """Return when the last round was written; the script counts on from there."""
    if standing.changed_seconds is None:
        return []
    moment = datetime.fromtimestamp(standing.changed_seconds, UTC)
    text = moment.strftime("%Y-%m-%d %H:%M:%S UTC")
    stamp = moment.isoformat(timespec="milliseconds")
    time = element("time", text, datetime=stamp, title=text, data_ago="")
    return [join(["last round written ", time])]


def _progress(standing: Standing) -> str:
    if not standing.run.rounds:
        return "No round yet"
    whole = f" of {standing.num_rounds:,}" if standing.num_rounds is not None else ""
    return f"Round {standing.run.last_round:,}{whole}"


def _headline(standing: Standing) -> str:
    """Return in one sentence how far the run is, and what it has reached."""
    if standing.life == "finished":
        return headline(standing.run)
    start, run = _progress(standing), standing.run
    value, before = latest_plug_in(run), run.before_tuning
    if value is None or before is None or not run.tuning_rounds:
        return f"{start}."
    if not (math.isfinite(value) and math.isfinite(before)):
        return f"{start}: plug-in {run.metric} {quality_text(value, run.metric, 3)}."
    new, old = contrast_texts(value, before, run.metric)
    return f"{start}: plug-in {run.metric} {new}, from {old} before tuning."


def _bar(standing: Standing) -> Html:
    """Return how much of the rounds is done."""
    if not standing.num_rounds:
        return Html()
    share = min(standing.run.last_round / standing.num_rounds, 1.0)
    return element(
        "svg",
        element("rect", width="100%", height=6, rx=3, class_="all"),
        element("rect", width=f"{100 * share:.2f}%", height=6, rx=3, class_="part"),
        class_="done",
        role="img",
        aria_label=f"{100 * share:.0f} % of the rounds done",
    )


def _figures(standing: Standing) -> Html:
    run, cost = standing.run, cost_of(standing.run)
    last = run.tuning_rounds[-1] if run.tuning_rounds else None
    accepted, drawn = standing.accepted.get(last.server_round, (0, 0)) if last else (0, 0)
    down, up = bytes_text(cost.bytes_down or 0.0), bytes_text(cost.bytes_up or 0.0)
    remaining = standing.remaining_seconds
    tiles = [
        (
            f"Plug-in {run.metric}",
            quality_text(latest_plug_in(run), run.metric),
            _quality_note(standing),
        ),
        ("Last round", f"{accepted} of {drawn}" if last else "none yet", "updates accepted"),
        (
            "A round takes",
            seconds_text(last.seconds if last else None),
            "" if remaining is None else f"about {seconds_text(remaining)} to go",
        ),
        (
            "Moved",
            bytes_text((cost.bytes_down or 0.0) + (cost.bytes_up or 0.0)),
            f"{down} down, {up} up",
        ),
        ("Trained on", count_text(sum(r.num_tokens or 0.0 for r in run.rounds)), UNITS[run.metric]),
        ("Warnings", f"{standing.num_warnings:,}", _sits_out(standing)),
    ]
    return element("dl", *(_tile(*tile) for tile in tiles), class_="figures")


def _tile(name: str, value: str, note: str) -> Html:
    absent = "absent" if value.startswith(("no", "not ")) else None
    return element(
        "div",
        element("dt", name),
        element("dd", value, class_=absent),
        element("dd", note, class_="note") if note else "",
    )


def _quality_note(standing: Standing) -> str:
    if standing.run.summary is not None and standing.life == "finished":
        return "on the test split"
    evaluated = [record for record in standing.run.rounds if record.is_evaluated]
    return f"validation, round {evaluated[-1].server_round:,}" if evaluated else ""


def _sits_out(standing: Standing) -> str:
    sits_out, set_aside = len(standing.sits_out), len(standing.set_aside)
    told = [f"{sits_out:,} {'sits' if sits_out == 1 else 'sit'} out"] if sits_out else []
    told += [f"{set_aside:,} set aside"] if set_aside else []
    return ", ".join(told) or "nobody sits out"


def _set_aside(standing: Standing) -> list[str]:
    names = standing.set_aside
    if not names:
        return []
    more = f" and {len(names) - _MOST_ASIDE:,} more" if len(names) > _MOST_ASIDE else ""
    shown = ", ".join(cut_text(name, 60) for name in names[:_MOST_ASIDE])
    return [f"Set aside after too many rejected updates: {shown}{more}."]


def _remarks(standing: Standing) -> Html:
    notes = [*standing.run.notes, *_set_aside(standing), *standing.sits_out]
    shown = [cut_text(note, _MOST_TEXT) for note in notes[:_MOST_REMARKS]]
    if len(notes) > len(shown):
        shown.append(f"{len(notes) - len(shown):,} more of these.")
    if not shown:
        return Html()
    style = "remarks single" if len(shown) == 1 else "remarks"
    return element("ul", *(element("li", note) for note in shown), class_=style)
