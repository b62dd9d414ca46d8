"""The tables of the live page: participants, rounds, what went wrong, and runs inside the run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from fedpeat.report.markup import Html, element, join
from fedpeat.report.participation import status_mark
from fedpeat.report.quantities import (
    bytes_text,
    number_text,
    quality_text,
    seconds_text,
)
from fedpeat.report.records import RoundRecord
from fedpeat.report.standing import ParticipantStanding, Stage, Standing

__all__ = ["cut_text", "events_table", "participants_table", "rounds_table", "stages_list"]

_MOST_ROWS: Final = 200
_MOST_ROUNDS: Final = 25
_MOST_EVENTS: Final = 40
_MOST_NAME: Final = 60
_MOST_TEXT: Final = 240
_MARK: Final = 13.0
_STAGES: Final = {"full_tuned": "upper bound, the full model tuned itself"}


def participants_table(standing: Standing) -> Html:
    """Return a row for each participant, in the order of the names, the server first."""
    if not standing.participants:
        return _empty("No participant has been drawn yet.")
    shown = _shown(standing.participants)
    last_round, aside = standing.run.last_round, frozenset(standing.set_aside)
    head = _head(
        "Participant",
        "Last status",
        "Last rounds",
        "#Last seen",
        "#Accepted",
        "Rung",
        "#Loss",
        "#Down",
        "#Up",
    )
    rows = (element("tr", *_participant(item, last_round, aside)) for item in shown)
    table = element("table", head, element("tbody", *rows), class_="who live")
    cut = (
        f"Shown: {len(shown)} of {len(standing.participants):,} participants, those whose last "
        "update did not count first; /status.json has them all."
    )
    note = element("p", cut, class_="note") if len(shown) < len(standing.participants) else ""
    return join([note, _scroll(table, "Participants")])


def _shown(participants: Sequence[ParticipantStanding]) -> Sequence[ParticipantStanding]:
    if len(participants) <= _MOST_ROWS:
        return participants
    return sorted(participants, key=lambda item: item.status == "accepted")[:_MOST_ROWS]


def _participant(
    item: ParticipantStanding, last_round: int, aside: frozenset[str]
) -> Iterator[Html]:
    label = "set aside" if item.client_id in aside else ""
    label = "server" if item.role == "server" else label
    badge = element("span", label, class_="badge") if label else ""
    name = element("span", cut_text(item.client_id, _MOST_NAME) or "(no name)", class_="name")
    yield element("th", name, badge, scope="row")
    mark = element(
        "svg", status_mark(item.status, 0.0, _MARK), width=13, height=13, aria_hidden="true"
    )
    reason = element("small", cut_text(item.reason, _MOST_TEXT)) if item.reason else ""
    yield element("td", mark, item.status, reason, class_="now")
    yield element("td", _strip(item))
    yield _number(_seen(item, last_round))
    yield _number(f"{item.statuses.get('accepted', 0)} of {item.num_drawn}")
    yield element("td", cut_text(item.rung, _MOST_NAME) or "-")
    yield _number("-" if item.last_loss is None else number_text(item.last_loss, 3))
    yield _number(bytes_text(item.bytes_down))
    yield _number(bytes_text(item.bytes_up))


def _seen(item: ParticipantStanding, last_round: int) -> str:
    """Return the last round in which its update came in."""
    if item.last_seen_round is None:
        return "never"
    behind = last_round - item.last_seen_round
    return f"round {item.last_seen_round}" + (f", {behind} ago" if behind else "")


def _strip(item: ParticipantStanding) -> Html:
    marks = [
        status_mark(status, index * _MARK, _MARK, element("title", f"round {number}: {status}"))
        for index, (number, status) in enumerate(item.recent[-12:])
    ]
    width = _MARK * len(marks)
    return element(
        "svg",
        *marks,
        width=width,
        height=_MARK,
        viewBox=f"0 0 {width:g} {_MARK:g}",
        role="img",
        aria_label=f"The last {len(marks)} rounds that it was drawn in",
    )


def rounds_table(standing: Standing) -> Html:
    """Return a row for each of the last rounds, the newest first."""
    rounds = standing.run.rounds
    if not rounds:
        return _empty("No round has been recorded.")
    head = _head(
        "#Round",
        f"#Plug-in {standing.run.metric}",
        "#Train loss",
        "#Accepted",
        "#Warnings",
        "#Down",
        "#Up",
        "#Time",
    )
    rows = (_round(record, standing) for record in reversed(rounds[-_MOST_ROUNDS:]))
    table = element("table", head, element("tbody", *rows), class_="dense")
    more = f"Shown: the last {_MOST_ROUNDS} of {len(rounds):,} lines; metrics.jsonl has them all."
    note = element("p", more, class_="note") if len(rounds) > _MOST_ROUNDS else ""
    return join([note, _scroll(table, "Rounds")])


def _round(record: RoundRecord, standing: Standing) -> Html:
    accepted, drawn = standing.accepted.get(record.server_round, (0, 0))
    is_tuning = record.server_round > 0
    texts = (
        quality_text(record.plug_in, standing.run.metric) if record.is_evaluated else "-",
        number_text(record.train_loss) if is_tuning and record.train_loss is not None else "-",
        f"{accepted} of {drawn}" if is_tuning else "-",
        f"{len(record.warnings)}" if record.warnings else "-",
        bytes_text(record.bytes_down) if is_tuning else "-",
        bytes_text(record.bytes_up) if is_tuning else "-",
        seconds_text(record.seconds) if is_tuning else "-",
    )
    heading = element("th", record.server_round, scope="row", class_="n")
    return element("tr", heading, *(_number(text) for text in texts))


def events_table(standing: Standing) -> Html:
    """Return the last warnings and faults, the newest first."""
    shown = standing.events[:_MOST_EVENTS]
    if not shown:
        return _empty("None so far.")
    rows = (
        element(
            "tr",
            element("td", f"round {event.server_round}"),
            element("td", event.kind, class_=f"kind-{event.kind}"),
            element("td", cut_text(event.text, _MOST_TEXT)),
        )
        for event in shown
    )
    head = _head("Round", "Kind", "What")
    table = element("table", head, element("tbody", *rows), class_="dense")
    return element("div", _scroll(table, "Warnings and faults"), class_="events")


def stages_list(standing: Standing) -> Html:
    """Return the runs inside the run, or nothing."""
    if not standing.stages:
        return Html()
    items = (element("li", *_stage(stage)) for stage in standing.stages)
    return join([element("h2", "Runs inside the run"), element("ul", *items, class_="stages")])


def _stage(stage: Stage) -> Iterator[Html]:
    yield element("span", _STAGES.get(stage.name, cut_text(stage.name, _MOST_NAME)))
    yield element("span", stage.life, class_=f"state {stage.life}")
    yield element("span", f"round {stage.last_round}", class_="absent")


def _head(*names: str) -> Html:
    """Return a table's head; a name that begins with # heads a column of numbers."""
    cells = (
        element("th", name.removeprefix("#"), scope="col", class_="n" if name[0] == "#" else None)
        for name in names
    )
    return element("thead", element("tr", *cells))


def _scroll(table: Html, label: str) -> Html:
    return element("div", table, class_="scroll", tabindex=0, role="region", aria_label=label)


def _number(text: str) -> Html:
    return element("td", text, class_="n")


def _empty(text: str) -> Html:
    return element("p", text, class_="empty")


def cut_text(text: str, most: int) -> str:
    """Return a text of at most so many signs."""
    return text if len(text) <= most else text[: most - 3] + "..."
